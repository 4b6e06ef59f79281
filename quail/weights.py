"""The weights that a forward pass computes with, and those that are saved."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quail_kernels import FORMATS, fake_quant, get_format
from quail_kernels.formats import check_weight, group_chunks

from .losses import innermost

NOISES = Literal["uniform", "gaussian"]
_GROUP_SIZES = (32, 64, 128, 256)  # that 4-bit checkpoints are shipped with


def deployed_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that a deployment in 4 bits quantizes, by name: those that ``quantizers.deploy`` does.

    All but the output head, ``head_modules``, PEFT's adapters and, in a model of transformers, a layer whose weight is
    the last parameter. Raises ValueError where none is left.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapters = _adapters(model)
    inner, last, kept = innermost(model), None, {head} | adapters
    if isinstance(inner, PreTrainedModel):
        beside = {p for module in adapters for p in module.parameters(recurse=False)}
        *_, last = (p for p in inner.parameters() if p not in beside)
        kept |= {module for name in head_modules(inner) for module in inner.get_submodule(name).modules()}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer not in kept and layer.weight is not last
    }
    if not layers:
        raise ValueError(f"model: expected nn.Linear layers besides the head; got a {type(model).__name__} without")
    return layers


def _adapters(model: nn.Module) -> set[nn.Module]:
    """What PEFT has put beside the layers of ``model``."""
    found: set[nn.Module] = set()
    for adapted in model.modules():
        for name in getattr(adapted, "adapter_layer_names", ()):  # of its BaseTunerLayer
            if isinstance(child := getattr(adapted, name, None), nn.Module):
                found.update(child.modules())
    return found


def head_modules(model: PreTrainedModel) -> list[str]:
    """What a model without a vocabulary at its output, such as a sequence classifier, has besides its backbone.

    transformers keeps a head from the quantizers that is tied, that is the output embedding, or whose last parameter
    is a weight; a classifier with a bias is none of them.
    """
    if model.get_output_embeddings() is not None or model.base_model is model:
        return []
    return [name for name, child in model.named_children() if child is not model.base_model]


@contextlib.contextmanager
def fake_quantized(model: nn.Module, format: str | None) -> Iterator[nn.Module]:
    """Within it, the linear layers of ``model`` compute with the weights that a bf16 deployment in ``format`` has.

    Output head and embeddings are left alone, as ``deployed_linears`` says. Gradients go to the unquantized weights
    unchanged. The weights are quantized once, on entry, however many passes follow: change them outside only.
    ``format`` None does nothing. Raises ValueError where there is no layer to quantize.
    """
    weight_of = (lambda w: _DeployedWeight.apply(w, format)) if format is not None else None
    with _computing_with(model, weight_of):
        yield model


@contextlib.contextmanager
def noisy(
    model: nn.Module, format: str, noise: NOISES, generator: torch.Generator | None = None
) -> Iterator[nn.Module]:
    """Within it, the linear layers that a deployment quantizes compute with weights moved by quantization noise.

    With s the width of the bucket of each weight under ``format``: ``uniform`` adds a number between -s/2 and s/2, the
    error of rounding a weight that lies anywhere in its bucket, and ``gaussian`` a normal one of that variance, s^2 /
    12. The noise is drawn once, on entry, from ``generator`` (of the weights' device); gradients go to the weights
    unchanged. Uniform noise in place of rounding is from UNIQ, Baskin et al. 2018, https://arxiv.org/abs/1804.10969.
    Raises ValueError as ``fake_quantized`` does.
    """

    def moved(w: Tensor) -> Tensor:
        draw = torch.rand if noise == "uniform" else torch.randn
        sample = draw(w.shape, generator=generator, device=w.device)
        sample = sample - 0.5 if noise == "uniform" else sample / math.sqrt(12)
        return w + (sample * bucket_widths(w, format)).to(w.dtype)

    with _computing_with(model, moved):
        yield model


@torch.no_grad()
def bucket_widths(w: Tensor, format: str, group_size: int | None = None) -> Tensor:
    """The width of the bucket that each weight lies in, in units of ``w``: fp32, like ``w``, as bf16 deploys it."""
    recipe = get_format(format, group_size)
    check_weight("w", w, recipe)
    w = w.detach().to(torch.bfloat16)
    of_tensor, widths = recipe.fit_tensor(w), torch.empty(w.shape, dtype=torch.float32, device=w.device)
    for span, _, x, short in group_chunks(w, recipe):
        params = recipe.params(x, short, of_tensor)
        widths.view(-1)[span] = recipe.step(recipe.rank(x, params, short), params).reshape(-1)
    return widths


@torch.no_grad()
def lies_on_a_grid(model: nn.Module) -> bool:
    """Whether the linear layers that a deployment quantizes were shipped in 4 bits, of whatever recipe.

    Dequantized weights take at most sixteen values in a group, and 32 neighbours are in one group of most recipes
    (nvfp4's groups are of 16). So 99 % of a sample's groups of 32, without those that are one value throughout, have so
    few values.
    """
    few = groups = 0
    for w in _sample(model):
        values = w.reshape(-1)[: w.numel() // 32 * 32].float().view(-1, 32).sort(dim=1).values
        distinct = 1 + (values.diff(dim=1) != 0).sum(dim=1)
        few += int(((distinct > 1) & (distinct <= 16)).sum())
        groups += int((distinct > 1).sum())
    return few > 0.99 * groups


@torch.no_grad()
def recipe_of_grid(model: nn.Module) -> str | None:
    """The recipe that the linear layers were shipped in, by name with its group size; None where none shows.

    Of all recipes, in their own group size and in those of ``_GROUP_SIZES``, it is the one that leaves most of a
    sample's weights, zeros apart, as they are, and at least 99 %; with a scale for a whole tensor the sample is the
    smallest layer. Not told are those that do not reproduce their own values, compressed-tensors' int4 for one, which
    fits a new scale to them.
    """
    sample = _sample(model)
    smallest = min((layer.weight.detach() for layer in deployed_linears(model).values()), key=torch.numel)
    sized = [f"{name}@{n}" for name, recipe in FORMATS.items() for n in _GROUP_SIZES if n in recipe.legal_group_sizes]
    found, most = None, 0.99
    for name in (*FORMATS, *sized):
        weights = [smallest.to(torch.bfloat16)] if get_format(name).looks_at_tensor else sample
        try:
            kept = torch.cat([(fake_quant(w, name) == w)[w != 0] for w in weights]).double().mean().item()
        except ValueError:  # a group size that does not divide the rows of a layer
            continue
        if kept > most:
            found, most = name, kept
    return found


def _sample(model: nn.Module) -> list[Tensor]:
    """The first 2^16 weights, in whole rows, of each of up to eight layers, as a checkpoint in bf16 holds them."""
    layers = list(deployed_linears(model).values())
    chosen = layers[:: -(-len(layers) // 8)]
    return [w.weight.detach()[: max((1 << 16) // w.in_features, 1)].to(torch.bfloat16) for w in chosen]


@torch.no_grad()
def deploy_weights_(model: nn.Module, format: str) -> nn.Module:
    """Replaces the weights that ``fake_quantized`` would quantize by the dequantized values, in place.

    A checkpoint trained with ``fake_quant`` is saved so: then it computes the same whether it is quantized or not.
    For that the format must reproduce its own values, which the bitsandbytes formats do; ``ct-int4-sym`` and
    ``minmax-int4`` fit a new scale to them.
    """
    for layer in deployed_linears(model).values():
        layer.weight.copy_(_DeployedWeight.apply(layer.weight, format))
    return model


@torch.no_grad()
def store_in_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Gives the parameters the values that a checkpoint in ``dtype`` keeps, in place and in their own dtype."""
    for p in model.parameters():
        p.copy_(p.to(dtype))
    return model


@contextlib.contextmanager
@torch.no_grad()
def stored_in(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Within it, the parameters have the values that a checkpoint in ``dtype`` keeps, adapters of PEFT merged.

    Weights that came from such a checkpoint lie on its grid, and an update below half of a number's last place is gone
    when it is stored again. Afterwards they are what they were, to the bit; that takes a copy of the model in the
    memory of the CPU.
    """
    kept = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters()]
    adapters = hasattr(model, "merge_adapter")
    if adapters:
        model.merge_adapter()
    try:
        yield store_in_(model, dtype)
    finally:
        if adapters:
            model.unmerge_adapter()
        for p, values in kept:
            p.copy_(values)


@contextlib.contextmanager
def _computing_with(model: nn.Module, weight_of: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    patched = []
    try:
        for layer in deployed_linears(model).values() if weight_of is not None else ():
            forward = functools.partial(F.linear, weight=weight_of(layer.weight), bias=layer.bias)
            patched.append((layer, layer.__dict__.get("forward")))
            layer.forward = forward
        yield
    finally:
        for layer, forward in patched:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


class _DeployedWeight(torch.autograd.Function):
    """Straight through, bf16 included: forget and retain gradients nearly cancel, so rounding each would show."""

    @staticmethod
    def forward(ctx, w: Tensor, format: str) -> Tensor:
        return fake_quant(w.to(torch.bfloat16), format).to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
