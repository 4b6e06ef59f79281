"""logit_margin_hinge, forward and backward, against fp64.

``max_error`` is the larger of two relative errors: of the loss, and of the gradient, relative to its largest
entry. An entry that is off by more than a hundredth of that is counted as different: where |d| lies within
rounding of the margin, or of another entry's, the gradient may take the other branch.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
import torch.nn.functional as F

from quail_kernels import logit_margin_hinge

from ..case import Case, Check, Peer
from ..models import GEMMA_2_9B, GPT2, LLAMA_2_7B, LLAMA_3_8B, QWEN3_8B, SMOLLM2_135M, SQUARE, Model

_LOSS_MAY_ERR = 1e-4
_MAY_DIFFER = 100  # of a million
MARGINS = {"per_logit": 1.0, "l2": 1e4, "linf": 100.0, "label": 1.0}


def hinge(
    z: torch.Tensor, ref: torch.Tensor, labels: torch.Tensor, norm: str, space: str, margin: float
) -> torch.Tensor:
    """The op's formula as one writes it in PyTorch, in fp32 or, for fp64 logits, in fp64: one number a token."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, ref = z.to(dtype), ref.to(dtype)
    d = z - ref if space == "logits" else F.log_softmax(z, dim=-1) - F.log_softmax(ref, dim=-1)
    if norm == "per_logit":
        return F.relu(margin - d.abs()).mean(dim=-1)
    if norm == "label":
        return F.relu(margin - d.gather(-1, labels[:, None]).squeeze(-1).abs())
    order = 2 if norm == "l2" else float("inf")
    return F.relu(margin - torch.linalg.vector_norm(d, order, dim=-1))


def _eager_loss(
    z: torch.Tensor, ref: torch.Tensor, labels: torch.Tensor, norm: str, space: str, margin: float
) -> torch.Tensor:
    return hinge(z, ref, labels, norm, space, margin).mean()


def _step(loss: Callable, z: torch.Tensor, ref: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    value = loss(z, ref, labels)
    return value.detach(), *torch.autograd.grad(value, z)


def _peers(options: dict, compile: bool, inplace: bool) -> dict[str, Peer]:
    def ours(z, ref, labels, **more):
        return logit_margin_hinge(z, ref, labels, **options, **more)

    def in_place(inputs: tuple, backend: str):
        # The gradient takes the place of the logits: those of the other peers have to stay.
        z = inputs[0].detach().clone().requires_grad_()
        return partial(_step, partial(ours, inplace_backward=True), z, *inputs[1:])

    eager = partial(_eager_loss, **options)
    peers = {
        "quail": lambda inputs, backend: partial(_step, ours, *inputs),
        "eager": lambda inputs, backend: partial(_step, eager, *inputs),
    }
    if inplace:
        peers["quail, in place"] = in_place
    if compile:
        peers["torch.compile"] = lambda inputs, backend: partial(
            _step, torch.compile(eager, backend=backend, dynamic=False), *inputs
        )
    return peers


def _inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(shape, generator=generator, device=device).to(dtype)
    ref = torch.randn(shape, generator=generator, device=device).to(dtype)
    labels = torch.randint(shape[1], shape[:1], generator=generator, device=device)
    return z.requires_grad_(), ref, labels


def _exact_loss(inputs: tuple, options: dict) -> torch.Tensor:
    """In fp64; the gradient, which would be four times the logits, is computed again for each answer."""
    pieces = [hinge(*(x.detach() for x in piece), **options) for piece in _pieces(inputs)]
    return torch.cat(pieces).mean()


def _pieces(tensors: tuple):
    """About 16 million logits of each at a time; the first tensor and the second in fp64."""
    rows = max(2**24 // tensors[0].shape[1], 1)
    for z, ref, *more in zip(*(x.split(rows) for x in tensors), strict=True):
        yield z.detach().double(), ref.double(), *more


def _check(inputs: tuple, expected: torch.Tensor, answer: tuple, peer: str, options: dict) -> Check:
    loss, grad = answer
    loss_error = ((loss.double() - expected).abs() / expected.abs()).item()
    worst = different = torch.zeros((), dtype=torch.float64, device=grad.device)
    peak = torch.zeros((), dtype=torch.float64, device=grad.device)
    tokens = grad.shape[0]
    for z, ref, labels, got in _pieces((inputs[0], inputs[1], inputs[2], grad)):
        z.requires_grad_()
        (exact,) = torch.autograd.grad(hinge(z, ref, labels, **options).sum() / tokens, z)
        error = (got.double() - exact).abs()
        peak = torch.maximum(peak, exact.abs().max())
        worst = torch.maximum(worst, error.max())
        different = different + (error > exact.abs().amax(dim=1, keepdim=True) / 100).sum()
    per_million = different.item() / grad.numel() * 1e6
    grad_error = (worst / peak).item()
    fits = peak.item() > 0 and loss_error <= _LOSS_MAY_ERR and per_million <= _MAY_DIFFER
    return Check(max(loss_error, grad_error), per_million, fits)


def _case(
    model: Model, tokens: int, norm: str, space: str, dtype: torch.dtype, size: float, headline: bool = False
) -> Case:
    shape = model.logits(size, tokens)
    options = {"norm": norm, "space": space, "margin": MARGINS[norm]}
    one = prod(shape) * dtype.itemsize
    # The hinge of a label on raw logits needs one logit of each row; its gradient is written whole.
    useful = one if (norm, space) == ("label", "logits") else 3 * one
    return Case(
        op="logit_margin_hinge",
        variant=f"{norm} {space}",
        model=model.name,
        shape=shape,
        dtype=dtype,
        useful_bytes=useful,
        working_bytes=prod(shape) * (4 * dtype.itemsize + 24) + 2**24 * 64,
        inputs=lambda device: _inputs(shape, dtype, device),
        peers=_peers(options, compile=headline, inplace=headline),
        expected=lambda inputs: _exact_loss(inputs, options),
        check=partial(_check, options=options),
        headline=headline,
    )


def cases(size: float) -> list[Case]:
    bf16 = torch.bfloat16
    made = [
        _case(LLAMA_3_8B, 4096, "per_logit", "logits", bf16, size, headline=True),
        _case(LLAMA_3_8B, 4096, "label", "log_probs", bf16, size, headline=True),
    ]
    for norm, space in (("per_logit", "log_probs"), ("l2", "logits"), ("linf", "logits"), ("label", "logits")):
        made.append(_case(LLAMA_3_8B, 4096, norm, space, bf16, size))
    for model, tokens in ((SMOLLM2_135M, 4096), (GPT2, 4096), (LLAMA_2_7B, 4096), (QWEN3_8B, 2048), (GEMMA_2_9B, 2048)):
        made.append(_case(model, tokens, "per_logit", "logits", bf16, size))
    for dtype in (torch.float32, torch.bfloat16):
        for norm, space in (("per_logit", "logits"), ("label", "log_probs")):
            made.append(_case(SQUARE, 512, norm, space, dtype, size))
    return [*made, _case(SMOLLM2_135M, 4096, "per_logit", "logits", torch.float32, size)]
