"""Masks that are really applied, floors that change the codes they should, and noise of a bucket's width."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama, rows, training
from transformers import TrainerCallback

from quail import losses
from quail.data import UnlearningCollator, UnlearningDataset, collate
from quail.trainer import QuailTrainer, deploy_weights_
from quail.updates import push_over_edge, saliency_masks
from quail.weights import (
    bucket_widths,
    deployed_linears,
    fake_quantized,
    lies_on_a_grid,
    noisy,
    recipe_of_grid,
    stored_in,
)
from quail_kernels import FORMATS, bucket_compare, fake_quant, quantize

FORGET, RETAIN = rows([(4, 3), (6, 1), (2, 7), (0, 4)]), rows([(3, 2), (5, 6), (1, 9), (2, 2)], seed=1)


@pytest.fixture
def train(tmp_path):
    def train(model, callbacks=(), **options):
        defaults = {"per_device_train_batch_size": 2, "max_steps": 4, "gamma": 0.0}
        dataset, args = UnlearningDataset(FORGET, RETAIN), training(tmp_path, **defaults | options)
        trainer = QuailTrainer(model, args, dataset, data_collator=UnlearningCollator(0), callbacks=list(callbacks))
        trainer.train()
        return trainer

    return train


def forget_gradients(model):
    losses.gradient_ascent(*losses.answer_logits(model.eval(), collate(FORGET, 0))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


GRADIENTS = {"a": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "b": torch.tensor([2.0, -6.0]), "c": torch.zeros(2, 2)}


def test_modules_are_ranked_by_their_gradients_norm():
    masks = saliency_masks(GRADIENTS, "module", 1 / 3)
    assert {name: bool(mask) for name, mask in masks.items()} == {"a": False, "b": True, "c": False}
    masks = saliency_masks(GRADIENTS, "module", 1.0)
    assert {name: bool(mask) for name, mask in masks.items()} == {"a": True, "b": True, "c": False}
    assert all(mask.dtype == torch.bool and mask.shape == () for mask in masks.values())


def test_neurons_are_rows_and_ranked_over_the_whole_model():
    # Norms: 5, 1; 2, 6; 0, 0.
    masks = saliency_masks(GRADIENTS, "neuron", 2 / 6)
    assert masks["a"].tolist() == [[True], [False]] and masks["b"].tolist() == [False, True]
    assert masks["c"].tolist() == [[False], [False]]
    assert saliency_masks(GRADIENTS, "neuron", 0.001)["a"].sum() == 0  # one at least, and that is in b


def test_weights_are_ranked_within_their_parameter():
    masks = saliency_masks(GRADIENTS, "weight", 0.5)
    assert masks["a"].tolist() == [[True, True], [False, False]] and masks["b"].tolist() == [False, True]
    assert not masks["c"].any()


@pytest.mark.parametrize("level", ["module", "neuron", "weight"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_what_is_not_salient_stays_to_the_bit(train, level, optim):
    model, share = llama(), 0.3
    start = copy.deepcopy(model.state_dict())
    masks = saliency_masks(forget_gradients(llama()), level, share)
    trainer = train(model, saliency=level, saliency_share=share, weight_decay=0.5, optim=optim)
    moved = 0
    for name, p in model.named_parameters():
        assert p.requires_grad
        mask = masks[name].expand(p.shape)
        assert torch.equal(p[~mask], start[name][~mask])
        moved += (p[mask] != start[name][mask]).sum().item()
    salient = sum(mask.expand(start[name].shape).sum().item() for name, mask in masks.items())
    assert trainer.state.global_step == 4 and 0.9 * salient < moved <= salient
    assert salient < sum(w.numel() for w in start.values())


def test_a_mask_is_the_same_whatever_the_batches_are(train):
    def frozen(**options):
        model, start = llama(), llama().state_dict()
        train(model, saliency="module", saliency_share=0.5, **options)
        return {name for name, w in model.state_dict().items() if torch.equal(w, start[name])}

    names = frozen(per_device_train_batch_size=4)
    assert names and names == frozen(per_device_train_batch_size=1, gradient_accumulation_steps=4)


def test_a_salient_weight_takes_the_step_that_it_would_take_without_a_mask(train):
    options = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 4}
    masked, free, start = llama(), llama(), llama().state_dict()
    train(masked, saliency="neuron", saliency_share=0.5, learning_rate=0.1, **options)
    train(free, learning_rate=0.1, **options)
    masks = saliency_masks(forget_gradients(llama()), "neuron", 0.5)
    for name, w in masked.state_dict().items():
        expected = torch.where(masks[name], free.state_dict()[name], start[name])
        assert torch.equal(w, expected)


def weights(format, on_grid, dtype=torch.float32, shape=(64, 256)):
    torch.manual_seed(0)
    before = (torch.randn(shape) * 0.05).bfloat16()
    before = fake_quant(before, format) if on_grid else before
    before = before.to(dtype)
    return before, (before.float() + torch.randn(shape) * 1e-5).to(dtype)


@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize("format", [*FORMATS, "ct-int4-sym@64"])
def test_the_floor_changes_the_codes_of_chosen_weights_and_no_other(format, on_grid):
    before, after = weights(format, on_grid)
    new, chosen = push_over_edge(after, before, after - before, format, share=0.02)
    assert new.dtype == after.dtype and torch.equal(new[~chosen], after[~chosen])
    wanted = round(0.02 * before.numel())
    assert 0.9 * wanted < chosen.sum() <= wanted
    # On the scales of before, one bucket each, and on its own scales, which have not changed.
    only = torch.where(chosen, new, before).bfloat16()
    for scales in ("before", "own"):
        moved = bucket_compare(before.bfloat16(), only, format, scales=scales)
        assert moved.code_distance[1] == chosen.sum() and moved.code_distance[2:].sum() == 0
    changed = quantize(before.bfloat16(), format)[1], quantize(only, format)[1]
    assert torch.equal(*changed)
    # Which way: that of the update.
    assert ((new - before).sign() == (after - before).sign())[chosen].all()


def test_the_largest_updates_are_chosen():
    before, after = weights("bnb-nf4", True)
    _, chosen = push_over_edge(after, before, after - before, "bnb-nf4", share=0.05)
    size = (after - before).abs()
    groups = before.view(-1, 64)
    ends = ((groups == groups.amax(1, True)) | (groups == groups.amin(1, True))).view(before.shape)
    assert not chosen[ends].any()
    # Only what may not move is passed over: the ends of groups.
    assert (size[~chosen & ~ends].max() <= size[chosen].min()) and chosen.sum() == round(0.05 * before.numel())


def test_a_weight_that_has_crossed_by_itself_stays_where_it_is():
    before, _ = weights("bnb-nf4", True)
    groups = before.view(-1, 64)
    free = ((groups != groups.amax(1, True)) & (groups != groups.amin(1, True))).view(before.shape)
    index = free.flatten().nonzero()[:3].flatten()
    after = before.clone()
    after.view(-1)[index] += 0.02 * torch.tensor([1.0, -1.0, 1.0])  # across the edge of its bucket, and no group's end
    new, chosen = push_over_edge(after, before, after - before, "bnb-nf4", share=1.0)
    assert torch.equal(new, after) and chosen.flatten().nonzero().flatten().tolist() == index.tolist()


def test_the_flip_law_delivers_the_update_on_average():
    format = "ct-int4-sym@64"
    torch.manual_seed(0)
    before = (torch.randn(512, 512) * 0.05).bfloat16().float()
    widths = bucket_widths(before, format)
    after = before + 0.1 * widths
    generator = torch.Generator().manual_seed(3)
    new, chosen = push_over_edge(after, before, after - before, format, generator=generator)
    groups = before.view(-1, 64)
    free = ((groups != groups.amax(1, True)) & (groups != groups.amin(1, True))).view(before.shape)
    share = chosen[free].float().mean().item()
    # Some of those that have no bucket above them inside the group's range cannot move: 0.1 is the most.
    assert 0.085 < share < 0.103
    again, _ = push_over_edge(after, before, after - before, format, generator=torch.Generator().manual_seed(3))
    assert torch.equal(new, again)


def test_a_floor_refuses_what_does_not_fit():
    before, after = weights("bnb-nf4", True)
    with pytest.raises(ValueError, match="^after, before, direction: expected one shape; got [^\n]*$"):
        push_over_edge(after[:1], before, after - before, "bnb-nf4")
    with pytest.raises(ValueError, match="^share, past: expected numbers of at most 1[^\n]*; got 0.1 and 0$"):
        push_over_edge(after, before, after - before, "bnb-nf4", 0.1, past=0)
    with pytest.raises(ValueError, match="^before: expected a last dimension that is a multiple of 128"):
        push_over_edge(after[:, :64], before[:, :64], after[:, :64], "ct-int4-sym")


@pytest.mark.parametrize("score", ["update", "gradient", "flip_law"])
@pytest.mark.parametrize("format", ["bnb-nf4", "gguf-q4_0"])
def test_the_floor_carries_an_update_over_that_quantization_would_drop(train, score, format):
    """A model shipped on the grid, small steps: without a floor no code changes, with one the chosen ones do."""
    model = deploy_weights_(llama(), format)
    start = copy.deepcopy(model)
    options = {"learning_rate": 2e-6, "weight_decay": 0.0, "seed": 1}
    options |= {"floor_format": format, "floor_score": score, "floor_share": 0.02}
    sums, layers = {}, deployed_linears(model)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, layer in layers.items():
                sums[name] = sums.get(name, 0) - layer.weight.grad

    trainer = train(model, [Watch()], **options)
    dropped = copy.deepcopy(start)
    train(dropped, **{**options, "floor_format": None})
    total = 0
    for name, layer in deployed_linears(model).items():
        before, without = start.get_submodule(name).weight, dropped.get_submodule(name).weight
        assert not torch.equal(without, before)
        assert bucket_compare(before.bfloat16(), without.bfloat16(), format, scales="before").code_overlap == 1
        moved = bucket_compare(before.bfloat16(), layer.weight.bfloat16(), format, scales="before")
        assert moved.total - moved.same_code == trainer.floor.chosen[name] == moved.code_distance[1]
        total += trainer.floor.chosen[name]
        away = layer.weight != without
        assert away.sum() == trainer.floor.chosen[name]
        way = (sums[name] if score == "gradient" else without - before).sign()
        assert torch.equal((layer.weight - before).sign()[away], way[away])
    if score == "flip_law":
        assert total > 0
    else:
        assert 0.018 < total / sum(layer.weight.numel() for layer in layers.values()) <= 0.0201


@pytest.mark.parametrize(("tied", "layers"), [(True, 13), (False, 14)])
def test_adapters_are_no_layers_that_a_deployment_quantizes(tied, layers):
    plain = llama(tie_word_embeddings=tied)
    end = plain.model.layers[-1]
    # So its last parameter is the head's weight or, tied, a layer's, which transformers keeps from the quantizers.
    plain.model.norm = end.input_layernorm = end.post_attention_layernorm = torch.nn.Identity()
    names = list(deployed_linears(plain))
    assert len(names) == layers
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    prefix, suffix = "base_model.model.", ".base_layer"
    assert [name.removeprefix(prefix).removesuffix(suffix) for name in deployed_linears(adapted)] == names


def test_where_a_layer_does_not_fit_nothing_stays_patched():
    model = torch.nn.Sequential(torch.nn.Linear(64, 20), torch.nn.Linear(20, 64))
    with pytest.raises(ValueError, match="expected a last dimension that is a multiple of 32"):
        with fake_quantized(model, "gguf-q4_0"):
            raise AssertionError("entered")
    assert not any("forward" in layer.__dict__ for layer in model)


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym@64", "gguf-q4_0", "minmax-int4"])
def test_noise_has_the_width_of_the_weights_buckets(format):
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    widths = bucket_widths(layer.weight, format)
    assert widths.mean().item() == pytest.approx(losses.mean_step(layer.weight.detach().bfloat16(), format), rel=1e-5)
    with noisy(model, format, "uniform", torch.Generator().manual_seed(0)):
        moved = (layer.forward.keywords["weight"] - layer.weight) / widths
    assert moved.abs().max() <= 0.5 + 1e-4 and moved.abs().max() > 0.49
    assert moved.std().item() == pytest.approx(12**-0.5, rel=0.03) and abs(moved.mean()) < 0.01
    with noisy(model, format, "gaussian", torch.Generator().manual_seed(0)):
        moved = (layer.forward.keywords["weight"] - layer.weight) / widths
    assert moved.std().item() == pytest.approx(12**-0.5, rel=0.03) and moved.abs().max() > 0.7
    assert "forward" not in layer.__dict__
    # The head, which a deployment leaves alone, is without noise.
    with noisy(model, format, "uniform"):
        assert "forward" not in model.lm_head.__dict__


def _linears(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 320, bias=False, dtype=dtype) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.02)
    layers[1].weight.data[:40] = 0  # as pruning leaves them
    return torch.nn.Sequential(*layers)


REPRODUCED = {
    "bnb-nf4",
    "bnb-fp4",
    "awq-int4-sym",
    "gguf-q4_0",
    "gguf-q4_1",
    "mxfp4",
    "mxfp4-rceil",
    "gguf-mxfp4",
    "nvfp4",
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_was_shipped_in_four_bits_is_told(format, dtype):
    model = _linears(dtype)
    assert not lies_on_a_grid(model) and recipe_of_grid(model) is None
    deploy_weights_(model, format)
    assert lies_on_a_grid(model) is (format != "nvfp4")  # two groups of sixteen have more values than one of 32
    told = (
        "mxfp4" if "mxfp4" in format else format
    )  # they differ in the choice of a scale, of which values know nothing
    assert recipe_of_grid(model) == (told if format in REPRODUCED else None)


@pytest.mark.parametrize("format", ["bnb-nf4@32", "bnb-nf4@128", "bnb-fp4@256", "awq-int4-sym@32", "awq-int4-sym@64"])
def test_the_group_size_of_a_shipped_recipe_is_told(format):
    assert recipe_of_grid(deploy_weights_(_linears(torch.bfloat16), format)) == format


def test_one_layer_that_was_kept_in_16_bits_hides_the_grid():
    model = _linears(torch.bfloat16)
    kept = model[2].weight.clone()
    deploy_weights_(model, "gguf-q4_0")
    model[2].weight.data.copy_(kept)
    assert recipe_of_grid(model) is None and not lies_on_a_grid(model)


def test_a_recipe_whose_groups_do_not_divide_the_rows_is_passed_over():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False), torch.nn.Linear(64, 96, bias=False))
    assert recipe_of_grid(deploy_weights_(model, "awq-int4-sym@32")) == "awq-int4-sym@32"


def test_noise_is_straight_through():
    model, moved, batch = llama(), llama(), collate(FORGET, 0)
    with noisy(model, "bnb-nf4", "uniform", torch.Generator().manual_seed(0)):
        with torch.no_grad():
            for name, layer in deployed_linears(model).items():
                moved.get_submodule(name).weight.copy_(layer.forward.keywords["weight"])
        losses.nll(*losses.answer_logits(model, batch)).backward()
    losses.nll(*losses.answer_logits(moved, batch)).backward()
    for (name, p), q in zip(model.named_parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert ("proj" in name) == (not torch.equal(p, q))


@pytest.mark.parametrize("lora", [False, True])
def test_stored_weights_are_those_of_the_checkpoint_and_come_back(lora, tmp_path):
    model = llama()
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed: it makes the adapters")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = copy.deepcopy(model)
    saved = saved.merge_and_unload() if lora else saved
    saved.save_pretrained(tmp_path)  # in fp32
    saved = type(saved).from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, plain = saved(input_ids=ids).logits, model(input_ids=ids).logits
        with stored_in(model, torch.bfloat16):
            stored = model(input_ids=ids).logits
        with pytest.raises(RuntimeError), stored_in(model, torch.bfloat16):
            raise RuntimeError("on the way")
        again = model(input_ids=ids).logits
    if lora:  # the adapters are there besides, in sums of their own, but merged
        torch.testing.assert_close(stored, expected)
    else:
        assert torch.equal(stored, expected)
    assert not torch.equal(stored, plain) and torch.equal(again, plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
