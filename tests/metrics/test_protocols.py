"""The protocols on models: what they hand to the metrics is what a model does with one text at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from quail import evaluate, inference
from quail.data import QA_TEMPLATE, Example, encode
from quail.metrics import memorization, muse

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"question": "a b", "answer": "c d e", "paraphrased_answer": "d c e", "perturbed_answer": ["c d f", "g"]},
    {"question": "h", "answer": "i", "paraphrased_answer": "j i", "perturbed_answer": ["k l m n", "o p"]},
    {"question": "q r s t u", "answer": "v w", "paraphrased_answer": "w v", "perturbed_answer": ["x", "y z"]},
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def one_by_one(model, tokenizer, prompt, room):
    """Greedy decoding without a cache, a batch or generate."""
    ids = tokenizer(prompt).input_ids
    said = []
    while len(said) < room and tokenizer.eos_token_id not in said:
        logits = model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
    return tokenizer.decode(said, skip_special_tokens=True)


def nll(model, tokenizer, question, answer):
    (row,) = encode([Example(QA_TEMPLATE.format(question=question), f" {answer}")], tokenizer)
    return model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_answers_do_not_depend_on_their_batch(model, tokenizer, batch_size):
    prompts = [QA_TEMPLATE.format(question=row["question"]) for row in ROWS] * 2
    expected = [one_by_one(model, tokenizer, prompt, 12) for prompt in prompts]
    assert inference.greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected
    rooms = [1, 2, 3, 4, 5, 6]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    said = inference.greedy_ids(model, tokenizer, ids, rooms, batch_size=batch_size)
    assert [len(row) <= room for row, room in zip(said, rooms, strict=True)] == [True] * 6
    assert said[5][:1] == inference.greedy_ids(model, tokenizer, ids[5:], [1])[0]


def test_a_checkpoints_own_generation_settings_change_nothing(model, tokenizer, monkeypatch):
    plain = inference.greedy(model, tokenizer, ["a b c", "d"], max_new_tokens=16)
    for name, value in (
        ("repetition_penalty", 5.0),
        ("num_beams", 3),
        ("no_repeat_ngram_size", 1),
        ("do_sample", True),
    ):
        monkeypatch.setattr(model.generation_config, name, value)
    assert inference.greedy(model, tokenizer, ["a b c", "d"], max_new_tokens=16) == plain


def test_scores_are_taken_without_dropout_and_the_mode_is_given_back(tiny_checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attention_dropout=0.5).train()
    examples = [Example("a b", " c d")]
    first, second = (inference.token_scores(model, tokenizer, examples)[0] for _ in range(2))
    assert np.array_equal(first.log_probs, second.log_probs) and model.training


@torch.no_grad()
def test_token_scores_of_batches_within_a_budget_are_those_of_each_alone(model, tokenizer, monkeypatch):
    examples = [Example("", "a b c d"), Example("a " * 9, " b"), Example("a", " c d e f g h"), Example("b", " c")]
    alone = [inference.token_scores(model, tokenizer, [example])[0] for example in examples]
    monkeypatch.setattr(inference, "_TOKENS_AT_ONCE", 20)
    for score, other, example in zip(inference.token_scores(model, tokenizer, examples), alone, examples, strict=True):
        np.testing.assert_allclose(score.log_probs, other.log_probs, rtol=1e-4)
        assert np.array_equal(score.hits, other.hits) and score.ended
        words = tokenizer(example.completion).input_ids
        assert len(score.without_end().log_probs) == len(words) - (not example.prompt)
    (cut,) = inference.token_scores(model, tokenizer, examples[2:3], max_length=4)
    assert not cut.ended and len(cut.log_probs) == len(cut.without_end().log_probs) == 3


def test_tofu_figures_are_those_of_each_answer_alone(model, tokenizer):
    found = evaluate.score_tofu(model, tokenizer, ROWS, "forget", max_new_tokens=8, batch_size=4)
    losses = [
        [nll(model, tokenizer, row["question"], a) for a in (row["answer"], row["paraphrased_answer"])] for row in ROWS
    ]
    wrong = [[nll(model, tokenizer, row["question"], a) for a in row["perturbed_answer"]] for row in ROWS]
    np.testing.assert_allclose(found.probability.per_example, np.exp([-answer for answer, _ in losses]), rtol=1e-4)
    np.testing.assert_allclose(
        found.ratios, [np.exp(p - np.mean(w)) for (_, p), w in zip(losses, wrong, strict=True)], rtol=1e-4
    )
    options = evaluate.score_tofu(model, tokenizer, ROWS, "options", max_new_tokens=8)
    p = np.exp([-answer for answer, _ in losses])
    total = p + [np.exp([-x for x in w]).sum() for w in wrong]
    np.testing.assert_allclose(options.probability.per_example, p / total, rtol=1e-4)
    np.testing.assert_allclose(
        options.ratios, [np.exp(a - np.mean(w)) for (a, _), w in zip(losses, wrong, strict=True)], rtol=1e-4
    )
    with torch.no_grad():
        said = [one_by_one(model, tokenizer, QA_TEMPLATE.format(question=row["question"]), 8) for row in ROWS]
    expected = memorization.rouge_l([row["answer"] for row in ROWS], said, stem=True).recall
    assert found.rouge.per_example.tolist() == expected.per_example.tolist()


@torch.no_grad()
def test_knowmem_asks_each_question_after_the_shots(model, tokenizer):
    shots = [{"question": "c", "answer": "d"}]
    found = evaluate.score_knowmem(model, tokenizer, ROWS, shots, batch_size=2)
    prompts = [f"Question: c\nAnswer: d\n\nQuestion: {row['question']}\nAnswer: " for row in ROWS]
    said = [one_by_one(model, tokenizer, prompt, 32) for prompt in prompts]
    expected = muse.knowmem([row["answer"] for row in ROWS], said)
    assert found.f1.per_example.tolist() == expected.f1.per_example.tolist()


def test_memorization_of_a_model_that_learned_one_answer(tiny_checkpoint, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    examples = [Example(QA_TEMPLATE.format(question=row["question"]), f" {row['answer']}") for row in ROWS]
    (row,) = encode(examples[:1], tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate.score_memorization(model, tokenizer, examples)
    assert found.exact.per_example[0] == found.extraction.per_example[0] == 1
    assert found.exact.value < 1


def test_class_probabilities_of_a_padded_batch_are_those_of_each_text(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=64, num_labels=3, pad_token_id=1, initializer_range=0.5, **sizes)
    model = BertForSequenceClassification(config).train()
    texts, labels = ["a b c d e", "f", "g h", "i j k l m n o p q"], [0, 2, 1, 0]
    found = inference.class_probabilities(model, tokenizer, texts, batch_size=3)
    assert model.training and found.shape == (4, 3)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    model.eval()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0]
        np.testing.assert_allclose(row, logits.softmax(-1), rtol=1e-4)
    scored = evaluate.score_classifier(model, tokenizer, texts, labels)
    assert scored.nll.value == pytest.approx(-np.log(found[range(4), labels]).mean(), rel=1e-4)
    cut = inference.class_probabilities(model, tokenizer, texts, max_length=2)
    np.testing.assert_allclose(cut[0], inference.class_probabilities(model, tokenizer, ["a b"])[0], rtol=1e-4)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the data sets are not at {DATA}")
def test_the_files_of_muse_and_tofu_are_taken_as_they_are(model, tokenizer):
    def load(path):
        text = (DATA / path).read_text(encoding="utf-8")
        return (json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()])[:3]

    muse_rows = load("muse_news_knowmem/forget_qa.json"), load("muse_news_knowmem/forget_qa_icl.json")[:1]
    known = evaluate.score_knowmem(model, tokenizer, *muse_rows)
    assert known.f1.per_example.shape == (3,) and 0 <= known.f1.value <= 1
    kinds = {"forget01": "forget", "retain": "retain", "real_authors": "options", "world_facts": "options"}
    sets = {
        name: evaluate.score_tofu(model, tokenizer, load(f"tofu/{name}_perturbed.json"), kind, max_new_tokens=8)
        for name, kind in kinds.items()
    }
    for scores in sets.values():
        for figure in (scores.probability, scores.rouge, scores.truth_ratio):
            assert figure.per_example.shape == (3,) and 0 <= figure.value <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: inference.token_scores(m, t, []), "examples: expected at least one"),
        (lambda m, t: inference.class_probabilities(m, t, []), "texts: expected at least one"),
        (lambda m, t: inference.greedy(m, t, ["a", ""], max_new_tokens=1), "prompt 2: expected at least one token"),
        (lambda m, t: evaluate.score_knowmem(m, t, []), "at least one"),
        (lambda m, t: evaluate.score_tofu(m, t, ROWS, "train"), "kind: expected forget, retain or options"),
    ],
)
def test_bad_input_is_said_in_one_line(model, tokenizer, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(model, tokenizer)
    assert "\n" not in str(caught.value)
