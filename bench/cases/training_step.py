"""A whole training step: forward and backward of a Llama whose linear layers run on NF4-fake-quantized weights, with
gradient ascent, retain loss and the hinge of the label on log-probabilities.

``useful_bytes`` are those of the parameters, read once, and of their gradients, written once: a step moves many times
that, and here only times of peers compare. ``max_error`` is the larger of the relative errors of the loss and of the
gradients' norm of difference, against the same step in fp64 on the same quantized weights.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from quail_kernels import fake_quant, get_format, logit_margin_hinge

from ..case import Case, Check, Peer, import_peer
from ..models import LLAMA_32_1B, SMOLLM2_135M, Model
from .margin_hinge import hinge
from .plain_recipes import quantized, values

_FORMAT = "bnb-nf4"
_LAYERS, _TOKENS, _SEQUENCES = 2, 128, 8
_OPTIONS = {"norm": "label", "space": "log_probs", "margin": 5.0}
_MAY_ERR = 1e-3


def _model(model: Model, small: bool, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    transformers = import_peer("transformers")
    sizes = dict(hidden_size=64, intermediate_size=128, vocab_size=128)
    if not small:
        sizes = dict(hidden_size=model.hidden, intermediate_size=model.intermediate, vocab_size=model.vocabulary)
    heads = sizes["hidden_size"] // 64
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=_LAYERS, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.LlamaForCausalLM(config)
    return made.to(device=device, dtype=dtype)


def _quantized_weights(model: torch.nn.Module) -> list[str]:
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def _plain_fake_quant(w: torch.Tensor) -> torch.Tensor:
    """The recipe's arithmetic over the whole weight, the gradient straight through."""
    recipe = get_format(_FORMAT)
    return w + (values(*quantized(w.detach(), recipe), recipe).to(w.dtype).view(w.shape) - w).detach()


def _our_hinge(z: torch.Tensor, ref: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logit_margin_hinge(z, ref, labels, **_OPTIONS)


def _plain_hinge(z: torch.Tensor, ref: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return hinge(z, ref, labels, **_OPTIONS).mean()


def _step(
    model: torch.nn.Module,
    ids: torch.Tensor,
    ref: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    hinge_of: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """(loss, gradients of the parameters); the first half of the sequences is to be forgotten."""
    weights = {name: quantize(model.get_parameter(name)) for name in _quantized_weights(model)}
    logits = torch.func.functional_call(model, weights, (ids,)).logits[:, :-1]
    labels = ids[:, 1:]
    forget, retain = (part.flatten(0, 1) for part in logits.chunk(2))
    forget_labels, retain_labels = (part.flatten() for part in labels.chunk(2))
    loss = F.cross_entropy(retain.float(), retain_labels) - F.cross_entropy(forget.float(), forget_labels)
    loss = loss + hinge_of(forget, ref, forget_labels)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def _exact(inputs: tuple) -> tuple[torch.Tensor, ...]:
    model, ids, ref = inputs
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in _quantized_weights(model):
        state[name] = fake_quant(state[name], _FORMAT)
    exact = type(model)(model.config).to(ids.device, torch.float64)
    exact.load_state_dict(state)
    logits = exact(ids).logits[:, :-1]
    forget, retain = (part.flatten(0, 1) for part in logits.chunk(2))
    forget_labels, retain_labels = (part.flatten() for part in ids[:, 1:].chunk(2))
    loss = F.cross_entropy(retain, retain_labels) - F.cross_entropy(forget, forget_labels)
    loss = loss + hinge(forget, ref.double(), forget_labels, **_OPTIONS).mean()
    return loss.detach(), *torch.autograd.grad(loss, list(exact.parameters()))


def _check(inputs: tuple, expected: tuple, answer: tuple, peer: str) -> Check:
    errors = []
    for want, got in zip(expected, answer, strict=True):
        want, got = want.double(), got.double()
        errors.append(((got - want).norm() / want.norm()).item())
    off = sum(error > _MAY_ERR for error in errors) / len(errors) * 1e6
    return Check(max(errors), off, max(errors) <= _MAY_ERR)


def _inputs(model: Model, sequences: int, small: bool, device: torch.device) -> tuple:
    made = _model(model, small, device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(made.config.vocab_size, (sequences, _TOKENS if not small else 16), generator=generator)
    ids = ids.to(device)
    with torch.no_grad():
        ref = made(ids[: sequences // 2]).logits[:, :-1].flatten(0, 1)
    return made, ids, ref


def _case(model: Model, size: float, headline: bool) -> Case:
    sequences = max(round(_SEQUENCES * size), 1) * 2
    weights = 2 * model.vocabulary * model.hidden + _LAYERS * (
        4 * model.hidden**2 + 3 * model.hidden * model.intermediate
    )
    peers: dict[str, Peer] = {
        "quail": lambda inputs, backend: partial(_step, *inputs, lambda w: fake_quant(w, _FORMAT), _our_hinge),
        "eager": lambda inputs, backend: partial(_step, *inputs, _plain_fake_quant, _plain_hinge),
    }
    return Case(
        op="training_step",
        variant=f"{_FORMAT} {_LAYERS} layers",
        model=model.name,
        shape=(sequences, _TOKENS if size else 16),
        dtype=torch.float32,
        useful_bytes=8 * weights,
        working_bytes=weights * 40 + sequences * _TOKENS * model.vocabulary * 48,
        inputs=lambda device: _inputs(model, sequences, not size, device),
        peers=peers,
        expected=_exact,
        check=_check,
        headline=headline,
    )


def cases(size: float) -> list[Case]:
    return [_case(SMOLLM2_135M, size, headline=True), _case(LLAMA_32_1B, size, headline=False)]
