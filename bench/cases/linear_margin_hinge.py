"""linear_logit_margin_hinge, forward and backward, against fp64: the hinge and gradient ascent's log-probabilities
from one pass, and the gradients of hidden states and output head.

Nearly all of its time goes to the products of the heads, two forward and four backward, so that the bytes of inputs
and outputs come nowhere near a copy's bandwidth; what it saves is memory.

``expected`` rounds the exact products to the dtype of the model, as every peer's logits are, and goes on in fp64.
``max_error`` is the largest of four errors: of the loss, relative; of the log-probabilities, in nats; and of the two
gradients, the norm of the error relative to the norm. Tokens whose gradient errs by more than 1/32 of its norm count
as different: where two logits are rounded apart, linf may take the other one for the farthest. Liger's base class for
distillation losses returns the mean of the log-probabilities only, and is judged by that.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from quail_kernels import linear_logit_margin_hinge

from ..case import Case, Check, Peer, import_peer
from ..models import GEMMA_2_9B, LLAMA_32_1B, SMOLLM2_135M, Model
from .margin_hinge import MARGINS, hinge

_LOSS_MAY_ERR = 1e-3
_LOG_PROBS_MAY_ERR = 0.02
_GRADIENTS_MAY_ERR = {"linf": 1 / 8, "others": 1 / 64}
_TOKENS_MAY_DIFFER = 20_000  # of a million
_EXACT_LOGITS = 2**26


def _capped(u: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """In fp32 and rounded once; fp64 stays fp64."""
    if softcap is None:
        return u
    return (torch.tanh(u.to(torch.promote_types(u.dtype, torch.float32)) / softcap) * softcap).to(u.dtype)


def _log_probs(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), labels, reduction="none")


def _gamma(norm: str, vocabulary: int) -> float:
    """The weight of the hinge that makes its gradient about as long as that of the log-probabilities.

    A label's is that of its log-probability, or minus that: of half of it something is left, which can be checked.
    """
    return {"per_logit": vocabulary**0.5, "label": 0.5}.get(norm, 1.0)


def _step(loss: Callable, hidden: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor, norm: str) -> tuple:
    """The gradient of gamma times the hinge plus the mean log-probability: the hinge and gradient ascent."""
    value, log_probs = loss(hidden, weight, *others, norm=norm)
    total = _gamma(norm, weight.shape[0]) * value + log_probs.mean()
    grads = torch.autograd.grad(total, (hidden, weight))
    return value.detach(), log_probs.detach(), *grads


def _quail(hidden, weight, ref_hidden, ref_weight, labels, softcap, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, labels, softcap=softcap, **options)[:2]


def _eager(hidden, weight, ref_hidden, ref_weight, labels, softcap, **options) -> tuple[torch.Tensor, torch.Tensor]:
    z = _capped(F.linear(hidden, weight), softcap)
    with torch.no_grad():
        z_ref = _capped(F.linear(ref_hidden, ref_weight), softcap)
    return hinge(z, z_ref, labels, **options).mean(), _log_probs(z, labels)


def _chunked(options: dict, chunk: int, backend: str) -> Callable[..., tuple]:
    """Gradients of a chunk of tokens at a time, summed in the dtype of the weight: the loss, compiled, as one graph."""

    def chunk_loss(hidden, weight, ref_hidden, ref_weight, labels, tokens):
        value, log_probs = _eager(hidden, weight, ref_hidden, ref_weight, labels, **options)
        share = labels.numel() / tokens
        total = _gamma(options["norm"], weight.shape[0]) * value + log_probs.mean()
        return total * share, (value * share, log_probs)

    of_chunk = torch.func.grad_and_value(chunk_loss, argnums=(0, 1), has_aux=True)
    of_chunk = torch.compile(of_chunk, backend=backend, dynamic=False)

    def step(hidden, weight, ref_hidden, ref_weight, labels):
        hidden, weight = hidden.detach(), weight.detach()
        grad_weight = torch.zeros_like(weight)
        values, log_probs, grads = [], [], []
        for x, x_ref, targets in zip(hidden.split(chunk), ref_hidden.split(chunk), labels.split(chunk), strict=True):
            (grad, of_weight), (_, (value, log_prob)) = of_chunk(x, weight, x_ref, ref_weight, targets, labels.numel())
            grad_weight += of_weight
            values.append(value)
            log_probs.append(log_prob)
            grads.append(grad)
        return torch.stack(values).sum(), torch.cat(log_probs), torch.cat(grads), grad_weight

    return step


def _liger(options: dict, chunk: int) -> Peer:
    """The hinge as the distillation loss of Liger's base class, which takes the log-probabilities for the hard loss."""

    def build(inputs: tuple, backend: str) -> Callable[[], tuple]:
        base = import_peer("liger_kernel.chunked_loss.fused_linear_distillation").LigerFusedLinearDistillationBase
        hidden, weight, ref_hidden, ref_weight, labels = inputs
        of_hinge = {name: value for name, value in options.items() if name != "softcap"}
        compiled = {"chunk_size": chunk, "compiled": backend == "inductor", "return_soft_hard_loss": True}

        class Hinge(base):
            @staticmethod
            def distillation_loss_fn(student_logits, teacher_logits, target, ignore_index, beta):
                return hinge(student_logits, teacher_logits, target, **of_hinge).sum()

            @classmethod
            def forward(cls, ctx, *tensors):
                # It takes no gradient of a weighted sum but of this one.
                weights = {"weight_hard_loss": -1.0, "weight_soft_loss": _gamma(options["norm"], weight.shape[0])}
                return base.forward(cls, ctx, *tensors, **weights, **compiled)

        def step() -> tuple:
            total, value, nll = Hinge.apply(hidden, weight, ref_hidden, ref_weight, labels)
            grads = torch.autograd.grad(total, (hidden, weight))
            return value.detach(), -nll.detach(), *grads[:2]

        return step

    return build


def _peers(options: dict, chunk: int, compile: bool) -> dict[str, Peer]:
    norm, others = options["norm"], {name: value for name, value in options.items() if name != "norm"}
    peers = {
        "quail": lambda inputs, backend: partial(_step, partial(_quail, **others), *inputs, norm=norm),
        "eager": lambda inputs, backend: partial(_step, partial(_eager, **others), *inputs, norm=norm),
    }
    if compile:
        peers["torch.compile"] = lambda inputs, backend: partial(_chunked(options, chunk, backend), *inputs)
    if options["softcap"] is None:  # which Liger's class does not have
        peers["liger"] = _liger(options, chunk)
    return peers


def _inputs(
    tokens: int, vocabulary: int, features: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, features, generator=generator, device=device).mul_(scale).to(dtype)

    hidden, weight = randn(tokens, 1.0), randn(vocabulary, features**-0.5)
    ref_hidden, ref_weight = randn(tokens, 1.0), weight + randn(vocabulary, 0.02 * features**-0.5)
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, labels


def _exact(inputs: tuple, softcap: float | None, **options) -> tuple[torch.Tensor, ...]:
    hidden, weight, ref_hidden, ref_weight, labels = (x.detach() for x in inputs)
    n, vocabulary = labels.numel(), weight.shape[0]
    blocks = [slice(start, start + 2**15) for start in range(0, vocabulary, 2**15)]
    grad_weight = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    losses, log_probs, grads = [], [], []
    rows = max(_EXACT_LOGITS // vocabulary, 1)
    for x, x_ref, targets in zip(hidden.split(rows), ref_hidden.split(rows), labels.split(rows), strict=True):
        x, x_ref = x.double(), x_ref.double()

        def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            u = torch.cat([x @ w[block].double().t() for block in blocks], dim=1).to(weight.dtype)
            return _capped(u, softcap).double()

        z, z_ref = logits(x, weight).requires_grad_(), logits(x_ref, ref_weight)
        loss, log_prob = hinge(z, z_ref, targets, **options).sum() / n, _log_probs(z, targets)
        (grad,) = torch.autograd.grad(_gamma(options["norm"], vocabulary) * loss + log_prob.sum() / n, z)
        if softcap is not None:
            grad *= 1 - (z.detach() / softcap).square()
        grads.append(sum(grad[:, block] @ weight[block].double() for block in blocks))
        grad_weight.addmm_(grad.t(), x)
        losses.append(loss.detach())
        log_probs.append(log_prob.detach())
    return torch.stack(losses).sum(), torch.cat(log_probs), torch.cat(grads), grad_weight.float()


def _check(inputs: tuple, expected: tuple, answer: tuple, peer: str, norm: str) -> Check:
    (loss, log_probs, *grads), (exact_loss, exact_log_probs, *exact_grads) = answer, expected
    loss_error = ((loss.double() - exact_loss).abs() / exact_loss.abs()).item()
    if log_probs.dim() == 0:
        exact_log_probs = exact_log_probs.mean()
    log_prob_error = (log_probs.double() - exact_log_probs).abs().max().item()
    grad_errors = []
    for grad, exact in zip(grads, exact_grads, strict=True):
        error = torch.linalg.vector_norm(grad.to(exact.dtype) - exact, dim=1).double()
        size = torch.linalg.vector_norm(exact, dim=1).double()
        grad_errors.append((error.square().sum() / size.square().sum()).sqrt().item())
        if grad is grads[0]:
            per_million = (error > size / 32).double().mean().item() * 1e6
    fits = exact_loss.item() > 0 and loss_error <= _LOSS_MAY_ERR and log_prob_error <= _LOG_PROBS_MAY_ERR
    may_err = _GRADIENTS_MAY_ERR.get(norm, _GRADIENTS_MAY_ERR["others"])
    fits = fits and max(grad_errors) <= may_err and per_million <= _TOKENS_MAY_DIFFER
    return Check(max(loss_error, log_prob_error, *grad_errors), per_million, fits)


def _case(
    model: Model,
    tokens: int,
    norm: str,
    space: str,
    size: float,
    softcap: float | None = None,
    headline: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    n, vocabulary = model.logits(size, tokens)
    features = model.hidden if size else 64
    options = {"norm": norm, "space": space, "margin": MARGINS[norm], "softcap": softcap}
    weights, states = vocabulary * features, n * features
    return Case(
        op="linear_logit_margin_hinge",
        variant=f"{norm} {space}" + ("" if softcap is None else f" softcap {softcap:g}"),
        model=model.name,
        shape=(n, vocabulary, features),
        dtype=dtype,
        # Hidden states and heads of both models, the labels; two gradients, the loss and the log-probabilities.
        useful_bytes=3 * (weights + states) * dtype.itemsize + n * 12 + 4,
        working_bytes=n * vocabulary * 32 + weights * 40 + states * 64 + min(n * vocabulary, _EXACT_LOGITS) * 64,
        inputs=lambda device: _inputs(n, vocabulary, features, dtype, device),
        peers=_peers(options, 1024 if size else 4, compile=headline),
        expected=lambda inputs: _exact(inputs, **options),
        check=partial(_check, norm=norm),
        headline=headline,
    )


def cases(size: float) -> list[Case]:
    made = [_case(LLAMA_32_1B, 4096, "per_logit", "logits", size, headline=True)]
    for norm, space in (("label", "log_probs"), ("linf", "log_probs")):
        made.append(_case(LLAMA_32_1B, 4096, norm, space, size))
    made.append(_case(SMOLLM2_135M, 4096, "per_logit", "logits", size))
    return [*made, _case(GEMMA_2_9B, 2048, "per_logit", "log_probs", size, softcap=30.0)]
