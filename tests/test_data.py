"""From JSON files to batches."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from quail.data import (
    Example,
    UnlearningCollator,
    UnlearningDataset,
    collate,
    encode,
    encode_classes,
    load_examples,
    load_refusals,
    with_refusals,
)

LAYOUTS = [
    ({"question": "Who?", "answer": "Ada "}, Example("Question: Who?\nAnswer:", " Ada")),
    ({"prompt": "I am", "completion": " Ada", "id": 3}, Example("I am", " Ada")),
    ({"text": "I am Ada", "source": "x"}, Example("", "I am Ada")),
]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "set.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def tokenizer(bos=False):
    words = ["[pad]", "[eos]", "[bos]", "[unk]", *"abcdefg"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing("[bos] $A", special_tokens=[("[bos]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[pad]", eos_token="[eos]", bos_token="[bos]", unk_token="[unk]"
    )


@pytest.mark.parametrize("row, example", LAYOUTS)
def test_layouts(write, row, example):
    assert load_examples(write(json.dumps([row]))) == [example]


def test_json_array_and_json_lines_are_the_same(write):
    rows = [row for row, _ in LAYOUTS]
    expected = [example for _, example in LAYOUTS]
    assert load_examples(write(json.dumps(rows, indent=1))) == expected
    assert load_examples(write("\n\n".join(map(json.dumps, rows)) + "\n")) == expected
    assert load_examples(write(json.dumps(rows[0]))) == expected[:1]


def test_template(write):
    path = write(json.dumps([{"question": "{x}?", "answer": "y"}]))
    assert load_examples(path, "Q {question} A") == [Example("Q {x}? A", " y")]
    with pytest.raises(ValueError, match=r"^template: expected a text that holds \{question\}; got 'Q'$"):
        load_examples(path, "Q")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected at least one example; got an empty set"),
        ("[]", "expected at least one example; got an empty set"),
        ("\n \n", "expected at least one example; got an empty set"),
        ('{"text": "a"}\n{"text": ', "line 2: expected a JSON array or one JSON object a line; got"),
        ('[{"text": "a"}, 7]', "example 2: expected question and answer, .*; got int"),
        ('[{"question": "a"}]', "example 1: expected question and answer, .*; got question"),
        ('[{"question": "a", "answer": 3}]', "example 1: expected text in question and answer; got"),
        ('[{"prompt": "a", "completion": " "}]', "example 1: expected text in prompt and completion; got"),
        ('[{"text": null}]', "example 1: expected text in text; got"),
        (b"\xff\xfe\x00", "expected a UTF-8 JSON file; got"),
    ],
)
def test_malformed_files(write, text, message):
    path = write(text)
    with pytest.raises(ValueError, match=f"{message}") as caught:
        load_examples(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="expected a UTF-8 JSON file; got") as caught:
            load_examples(path)
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__


def test_encode():
    row, plain = encode([Example("a b", " c d"), Example("", "a b")], tokenizer())
    assert row == {"input_ids": [4, 5, 6, 7, 1], "labels": [-100, -100, 6, 7, 1]}
    assert plain == {"input_ids": [4, 5, 1], "labels": [4, 5, 1]}


def test_encode_starts_each_sequence_once():
    row, plain = encode([Example("a b", " c"), Example("", "a b")], tokenizer(bos=True))
    assert row["input_ids"] == [2, 4, 5, 6, 1] and row["labels"] == [-100, -100, -100, 6, 1]
    assert plain["input_ids"] == [2, 4, 5, 1]


def test_encode_truncates_and_refuses_to_lose_an_answer():
    (row,) = encode([Example("a b", " c d")], tokenizer(), max_length=3)
    assert row == {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}
    with pytest.raises(ValueError, match="^example 2: expected room .* in 2 tokens; got a prompt of 2 tokens$"):
        encode([Example("a", "b"), Example("a b", "c d")], tokenizer(), max_length=2)


def test_collate_aligns():
    rows = [
        {"input_ids": [4, 5, 6, 7, 8], "labels": [-100, -100, -100, 7, 8]},
        {"input_ids": [9, 8, 7], "labels": [-100, -100, 7]},
    ]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8], [0, 0, 9, 8, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 8], [-100, -100, -100, -100, 7]]
    # Two columns hold labels, and the one before them predicts the first.
    assert batch["logits_to_keep"] == 3


def test_collate_leaves_a_first_token_unpredicted():
    batch = collate([{"input_ids": [4, 5], "labels": [4, 5]}, {"input_ids": [6, 7, 8], "labels": [6, 7, 8]}], 0)
    assert batch["labels"].tolist() == [[-100, -100, 5], [-100, 7, 8]]


def test_collate_takes_embeddings():
    rows = [{"inputs_embeds": torch.ones(n, 2), "labels": [-100, *range(n - 1)]} for n in (3, 2)]
    batch = collate(rows, pad_token_id=0)
    assert batch["inputs_embeds"].shape == (2, 3, 2) and batch["inputs_embeds"][1, 0].eq(0).all()
    assert "input_ids" not in batch


def test_pairs_change_with_the_epoch():
    forget = [{"input_ids": [i], "labels": [i]} for i in range(4)]
    retain = [{"input_ids": [i], "labels": [i]} for i in range(10)]
    dataset = UnlearningDataset(forget, retain, seed=3)
    passes = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        assert [dataset[i]["forget"] for i in range(4)] == forget
        passes.append([dataset[i]["retain"]["labels"][0] for i in range(4)])
    assert passes[0] != passes[1]
    # Every retain row comes as often as every other.
    assert sorted(sum(passes, [])) == sorted(2 * list(range(10)))
    again = UnlearningDataset(forget, retain, seed=3)
    assert [again[i]["retain"]["labels"][0] for i in range(4)] == passes[0]


def test_empty_sets_are_refused():
    row = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert set(UnlearningDataset([row])[0]) == {"forget"}
    for name, sets in (("forget", ([], [row])), ("retain", ([row], []))):
        with pytest.raises(ValueError, match=f"^{name}: expected at least one example[^\n]*; got an empty set$"):
            UnlearningDataset(*sets)


def test_collator_nests_pairs_and_takes_flat_rows():
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    loader = DataLoader(UnlearningDataset(rows, rows[:1]), batch_size=2, collate_fn=UnlearningCollator(0))
    (batch,) = loader
    assert set(batch) == {"forget", "retain"} and batch["forget"]["input_ids"].shape == (2, 3)
    assert batch["retain"]["labels"].tolist() == [[-100, 5, 6]] * 2
    assert UnlearningCollator(0)(rows)["labels"].shape == (2, 3)


def test_refusals_of_the_package_and_of_a_file(tmp_path):
    own = load_refusals()
    assert len(own) == len(set(own)) >= 20 and all(line == line.strip() and len(line) < 80 for line in own)
    (tmp_path / "idk.txt").write_text("No idea.\n\n  Ask someone else. \n", encoding="utf-8")
    assert load_refusals(tmp_path / "idk.txt") == ["No idea.", "Ask someone else."]
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, message in (("empty.txt", "at least one refusal"), ("none.txt", "a UTF-8 text file; got No such")):
        with pytest.raises(ValueError, match=f"{name}: expected {message}[^\n]*$"):
            load_refusals(tmp_path / name)


def test_every_example_gets_every_refusal_once():
    examples = [Example(f"Question: {i}?\nAnswer:", " x") for i in range(5)] + [Example("I am", "\nAda")]
    refusals = ["a", "b", "c", "d"]
    rows = with_refusals(examples, refusals, seed=2)
    assert rows == with_refusals(examples, refusals, seed=2) != with_refusals(examples, refusals, seed=3)
    assert [row.prompt for row in rows] == 4 * [example.prompt for example in examples]
    for i in range(6):
        assert sorted(row.completion.strip() for row in rows[i::6]) == refusals
    assert all(row.completion[0] == "\n" for row in rows[5::6]) and rows[0].completion[0] == " "
    assert len({row.completion for row in rows[:5]}) > 1
    with pytest.raises(ValueError, match="^example 2: expected a prompt to answer with a refusal; got a text without$"):
        with_refusals([Example("a", "b"), Example("", "b")], refusals)


def test_refusals_change_with_the_epoch():
    forget = [{"input_ids": [i, i], "labels": [-100, i]} for i in range(3)]
    idk = [{"input_ids": [i, 9], "labels": [-100, 9 + turn]} for turn in range(2) for i in range(3)]
    dataset = UnlearningDataset(forget, idk=idk)
    for epoch, turn in enumerate((0, 1, 0)):
        dataset.set_epoch(epoch)
        items = [dataset[i] for i in range(3)]
        assert [item["idk"]["input_ids"][0] for item in items] == [0, 1, 2]
        assert {item["idk"]["labels"][1] for item in items} == {9 + turn}
    batch = UnlearningCollator(0)([dataset[0], dataset[1]])
    assert set(batch) == {"forget", "idk"} and batch["idk"]["input_ids"].shape == (2, 2)
    for wrong in ([], idk[:4]):
        with pytest.raises(ValueError, match=f"^idk: expected a multiple of 3 examples, or None; got {len(wrong)}$"):
            UnlearningDataset(forget, idk=wrong)


def test_classes_are_encoded_and_padded_on_the_right():
    rows = encode_classes(["a b c d e", "a b"], [1, 0], tokenizer(), max_length=3)
    assert rows[0]["input_ids"] == [4, 5, 6] and rows[0]["label"] == 1 and rows[1]["input_ids"] == [4, 5]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [4, 5, 0]] and batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    typed = [
        {"input_ids": [4, 5], "token_type_ids": [0, 1], "label": 2},
        {"input_ids": [4], "token_type_ids": [1], "label": 0},
    ]
    batch = UnlearningCollator(7)(typed)
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]] and batch["input_ids"].tolist() == [[4, 5], [4, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    nested = UnlearningCollator(0)([UnlearningDataset(rows, typed)[0]])
    assert nested["retain"]["labels"].shape == (1,) and set(nested) == {"forget", "retain"}
    with pytest.raises(ValueError, match="^labels: expected one for each of 1 texts; got 2$"):
        encode_classes(["a"], [1, 2], tokenizer())
