"""The demo's shortcut: the upper layers alone, fed from a cache, are the whole model."""

import pytest
import torch

from quail import losses
from quail.data import Example
from quail.demo import _UpperLayers, embedded_sets
from quail.models import load_for_training

EXAMPLES = [Example("Question: a?\nAnswer:", " b c d"), Example("Question: a b c?\nAnswer:", " a")]


@pytest.fixture
def upper(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("quail.demo.UPPER_LAYERS", 1)
    monkeypatch.setattr("quail.demo.bf16_is_fast", lambda: False)
    return _UpperLayers(*load_for_training(str(tiny_checkpoint)), EXAMPLES)


def test_the_upper_layers_from_the_cache_give_the_whole_models_logits(upper):
    cached, labels = losses.answer_logits(upper.model, upper.batch(upper.rows))
    whole, same = losses.answer_logits(upper.base, upper.batch(upper.encoded))
    kept = labels != -100
    assert torch.equal(labels, same)
    torch.testing.assert_close(cached[kept], whole[kept])


def test_training_the_view_trains_the_model_and_nothing_below(upper):
    before = {name: p.detach().clone() for name, p in upper.base.named_parameters()}
    losses.nll(*losses.answer_logits(upper.model, upper.batch(upper.rows))).backward()
    torch.optim.SGD(upper.trained(), lr=0.1).step()
    moved = {name for name, p in upper.base.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("model.layers.1.") and "proj" in name for name in moved)
    assert len(moved) == len(upper.trained()) == 7


def test_exact_match_under_a_recipe_leaves_the_weights_alone(upper):
    before = upper.weights()
    assert 0 <= upper.exact_match(upper.rows, "bnb-nf4") <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, upper.weights(), strict=True))


def test_another_family_is_refused_in_one_line(tiny_checkpoint):
    model, tokenizer = load_for_training(str(tiny_checkpoint))
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="families llama, mistral, qwen2, qwen3; got gpt2"):
        _UpperLayers(model, tokenizer, EXAMPLES)


def test_embedded_sets_are_what_their_readme_says():
    claims, facts, text = embedded_sets()
    assert (len(claims), len(facts)) == (48, 132) and len(text.split()) > 600
    assert len({e.prompt for e in claims + facts}) == 180
