"""Scores against direct computations, on a tiny random model."""

import copy
import math

import pytest
import torch
from transformers import GenerationConfig

from quail import losses
from quail.data import Example, collate, encode
from quail.evaluate import perplexity, score_answers
from quail.inference import greedy, greedy_ids, row_scores
from quail.models import load_for_training, load_tokenizer, save_checkpoint
from quail.quantizers import deploy

EXAMPLES = [Example("Question: a?\nAnswer:", " b c d"), Example("Question: a b c d e?\nAnswer:", " a")]


@pytest.fixture(scope="module")
def deployed(tiny_checkpoint):
    return deploy(tiny_checkpoint, "none", torch.float32), load_tokenizer(tiny_checkpoint)


def test_nll_is_the_models_own_loss_row_by_row(deployed):
    model, tokenizer = deployed
    answers = score_answers(model, tokenizer, EXAMPLES)
    for answer, row in zip(answers, encode(EXAMPLES, tokenizer), strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        assert answer.nll == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


def test_answers_in_a_padded_batch_are_those_of_each_alone(deployed):
    model, tokenizer = deployed
    together = score_answers(model, tokenizer, EXAMPLES, batch_size=2)
    alone = score_answers(model, tokenizer, EXAMPLES, batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert a.said == b.said and a.nll == pytest.approx(b.nll, rel=1e-4)


def test_a_model_that_says_the_answer_scores_one(deployed, monkeypatch):
    model, tokenizer = deployed

    def parrot(input_ids, **kwargs):
        said = tokenizer(EXAMPLES[0].completion, add_special_tokens=False).input_ids
        return torch.cat([input_ids, torch.tensor([said + [tokenizer.eos_token_id]])], dim=1)

    monkeypatch.setattr(model, "generate", parrot)
    (answer,) = score_answers(model, tokenizer, EXAMPLES[:1])
    assert answer.exact and answer.rouge_l == 1.0


@pytest.fixture(scope="module")
def taught(deployed):
    """The same model once it knows the first of EXAMPLES by heart."""
    model, tokenizer = copy.deepcopy(deployed[0]), deployed[1]
    rows = encode(EXAMPLES, tokenizer)
    assert not any(score.hits.all() for score in row_scores(model, rows, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        losses.nll(*losses.answer_logits(model, collate(rows[:1], tokenizer.pad_token_id))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def test_what_is_foreseen_is_what_greedy_decoding_says(taught):
    model, tokenizer = taught
    assert row_scores(model, encode(EXAMPLES[:1], tokenizer), tokenizer)[0].hits.all()
    (answer,) = score_answers(model, tokenizer, EXAMPLES[:1])
    assert answer.exact and answer.rouge_l == 1.0
    assert greedy(model, tokenizer, [EXAMPLES[0].prompt], max_new_tokens=4) == [answer.said] == ["b c d"]


def test_decoding_starts_where_the_answer_is_no_longer_foreseen(taught, monkeypatch):
    model, tokenizer = taught
    other = Example(EXAMPLES[0].prompt, " b c x")
    (row,), asked = encode([other], tokenizer), []

    def watched(model, tokenizer, prompts, room, **options):
        asked.append((prompts, room))
        return greedy_ids(model, tokenizer, prompts, room, **options)

    monkeypatch.setattr("quail.evaluate.greedy_ids", watched)
    (answer,) = score_answers(model, tokenizer, [other])
    assert asked == [([row["input_ids"][:-2]], [2])]  # of b, c, x and the end of sequence
    assert answer.said == "b c d" and answer.expected == "b c x" and not answer.exact


def test_rouge_recall_counts_the_longest_common_subsequence(deployed, monkeypatch):
    model, tokenizer = deployed
    said = tokenizer("b x d").input_ids
    monkeypatch.setattr("quail.evaluate.greedy_ids", lambda *args, **options: [said])
    (answer,) = score_answers(model, tokenizer, EXAMPLES[:1])
    assert answer.rouge_l == pytest.approx(2 / 3) and not answer.exact


def test_perplexity_of_windows(deployed):
    model, tokenizer = deployed
    text = "a b c d e " * 20
    ids = tokenizer(text, return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert perplexity(model, tokenizer, text, window=4096) == pytest.approx(math.exp(loss), rel=1e-4)
    assert perplexity(model, tokenizer, text, window=16) != pytest.approx(math.exp(loss), rel=1e-6)


def test_a_checkpoint_is_saved_whole_and_never_over_another(tiny_checkpoint, tmp_path):
    model, tokenizer = load_for_training(str(tiny_checkpoint))
    save_checkpoint(model, tokenizer, tmp_path / "out", torch.bfloat16)
    assert deploy(tmp_path / "out", "none").dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="already holds"):
        save_checkpoint(model, tokenizer, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before
    assert not (tmp_path / "out.partial").exists()
    assert isinstance(model.generation_config, GenerationConfig)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: load_for_training(str(path / "nothing-here")), "expected a causal language model"),
        (lambda path: score_answers(None, None, []), "expected at least one; got none"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny_checkpoint, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tiny_checkpoint)
    assert "\n" not in str(caught.value)
