"""Unlearning losses: pure functions of logits, for any training loop.

    loss = forget_loss + alpha * retain_loss + gamma * hinge

All take ``logits`` [..., tokens, vocabulary] and ``labels`` [..., tokens], aligned: ``logits[..., t, :]`` predicts
``labels[..., t]``, as ``answer_logits`` returns them. Labels of -100 do not count. A sequence classifier has one
token an example, and classes for a vocabulary. Arithmetic is fp32. Each loss is a mean over the batch; ``count``
replaces the number that the sum is divided by, which is how micro-batches of unequal length add up to the loss of
the whole batch. The hinge is ``quail_kernels.logit_margin_hinge``.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quail_kernels.formats import check_weight, get_format, group_chunks

from .data import IGNORE_INDEX


def answer_logits(model: nn.Module, batch: Mapping) -> tuple[Tensor, Tensor]:
    """The logits that predict the labels of a batch from ``data.collate``, and those labels, aligned.

    Returns ``logits`` [examples, columns, vocabulary] and ``labels`` [examples, columns]; of a sequence classifier,
    whose batches have one label an example, [examples, 1, classes] and [examples, 1]. Where the model can, its
    head runs over the last ``logits_to_keep`` columns only: prompts need no logits, and the head of a small model
    is a third of its work.
    """
    outputs, keep = _forward(model, batch)
    return _aligned_logits(outputs, batch, keep), aligned_labels(batch)


def answer_states(model: nn.Module, batch: Mapping, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``answer_logits``, and what the block ``layer``, counted from 0, gave: (logits, labels, states, kept).

    ``states`` is [examples, columns, hidden] and ``kept``, bool [examples, columns], says which of them count: in
    a causal model the positions that predict an answer's tokens, in a sequence classifier all that are no padding.
    What transformers reports for the last block is behind the final norm.
    """
    outputs, keep = _forward(model, batch, output_hidden_states=True)
    labels, states = aligned_labels(batch), outputs.hidden_states[layer + 1]
    if keep is None:
        kept = batch["attention_mask"].bool()
    else:
        states, kept = states[:, -keep:][:, :-1], labels != IGNORE_INDEX
    return _aligned_logits(outputs, batch, keep), labels, states, kept


def aligned_labels(batch: Mapping) -> Tensor:
    """The labels of a batch as ``answer_logits`` returns them, without a model."""
    labels = batch["labels"]
    if labels.dim() == 1:
        return labels[:, None]
    return labels[:, -batch.get("logits_to_keep", labels.shape[1]) :][:, 1:]


def model_inputs(model: nn.Module, batch: Mapping) -> dict:
    """What of a batch the model reads; the labels stay outside."""
    inputs = {key: batch[key] for key in ("input_ids", "inputs_embeds", "attention_mask") if key in batch}
    for key in ("position_ids", "token_type_ids"):
        if key in batch and _forward_takes(model, key):
            inputs[key] = batch[key]
    return inputs


def _forward(model: nn.Module, batch: Mapping, **options):
    """(the model's outputs, of how many columns it has the logits; None of a sequence classifier)."""
    inputs, labels, keep = model_inputs(model, batch) | options, batch["labels"], None
    if labels.dim() > 1:
        keep = batch.get("logits_to_keep", labels.shape[1])
        if _forward_takes(model, "logits_to_keep"):
            inputs["logits_to_keep"] = keep
    if _forward_takes(model, "use_cache"):
        inputs["use_cache"] = False
    return model(**inputs), keep


def _aligned_logits(outputs, batch: Mapping, keep: int | None) -> Tensor:
    return outputs.logits[:, None] if keep is None else outputs.logits[:, -keep:][:, :-1]


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Each label's log-probability, like ``labels``, fp32; 0 where the label is ignored."""
    nll = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nll.view(labels.shape)


def answer_tokens(labels: Tensor) -> Tensor:
    """How many labels count, 0-dim, on their device."""
    return (labels != IGNORE_INDEX).sum()


def nll(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the answer tokens; on the retain set this is GDR."""
    return -token_log_probs(logits, labels).sum() / _count(count, answer_tokens(labels))


def gradient_ascent(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """GA: minus the mean negative log-likelihood of the answer tokens. Unbounded below."""
    return -nll(logits, labels, count)


def npo(logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float = 0.1, count: Tensor | None = None) -> Tensor:
    """Negative preference optimization: mean over examples of 2/beta * log(1 + (p / p_ref) ** beta).

    p and p_ref are the probabilities of the whole answer. Zhang et al. 2024, https://arxiv.org/abs/2404.05868, eq. 3.
    """
    log_ratio = (token_log_probs(logits, labels) - token_log_probs(ref_logits, labels)).sum(dim=-1)
    examples = torch.tensor(log_ratio.numel(), device=logits.device)
    return -(2 / beta) * F.logsigmoid(-beta * log_ratio).sum() / _count(count, examples)


def simnpo(
    logits: Tensor, labels: Tensor, beta: float = 4.5, gamma: float = 0.0, count: Tensor | None = None
) -> Tensor:
    """SimNPO: mean over examples of -2/beta * log sigmoid(-beta/|y| * log p - gamma), with |y| the answer's tokens.

    NPO without a reference: the answer's probability p is compared with nothing, but normalized by its length, so
    that short answers are forgotten as fast as long ones. ``gamma`` is a margin of the reward; open-unlearning's
    delta is gamma / beta. Fan et al. 2024, https://arxiv.org/abs/2410.07163, the loss it calls SimNPO.
    """
    length = (labels != IGNORE_INDEX).sum(dim=-1).clamp(min=1)
    per_token = token_log_probs(logits, labels).sum(dim=-1) / length
    examples = torch.tensor(per_token.numel(), device=logits.device)
    return -(2 / beta) * F.logsigmoid(-beta * per_token - gamma).sum() / _count(count, examples)


def dpo(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    idk_logits: Tensor,
    idk_ref_logits: Tensor,
    idk_labels: Tensor,
    beta: float = 0.1,
    count: Tensor | None = None,
) -> Tensor:
    """IdkDPO: preferred is a refusal, rejected the answer to forget.

    Mean over examples of -2/beta * log sigmoid(beta * (r_idk - r)), with r = log p - log p_ref of the whole answer
    and r_idk of the refusal. The losses of Rafailov et al., https://arxiv.org/abs/2305.18290, eq. 7, on the pairs of
    Maini et al., https://arxiv.org/abs/2401.06121 (their "preference optimization"), scaled by 2/beta as NPO is
    (https://arxiv.org/abs/2404.05868, eq. 3): without r_idk it is ``npo``. At the reference its gradient is that of
    the answer's log-probability minus that of the refusal's.
    """
    rejected = (token_log_probs(logits, labels) - token_log_probs(ref_logits, labels)).sum(dim=-1)
    preferred = (token_log_probs(idk_logits, idk_labels) - token_log_probs(idk_ref_logits, idk_labels)).sum(dim=-1)
    examples = torch.tensor(rejected.numel(), device=logits.device)
    return -(2 / beta) * F.logsigmoid(beta * (preferred - rejected)).sum() / _count(count, examples)


def rmu(states: Tensor, control: Tensor, kept: Tensor, count: Tensor | None = None) -> Tensor:
    """RMU's forget loss: hidden states of the forget set are drawn to one fixed vector, ``control`` [hidden].

    ``states`` [examples, columns, hidden] and ``kept`` [examples, columns] are as ``answer_states`` returns them.
    Mean over examples of the mean over kept positions of ||h - c u||^2 / hidden. Li et al. 2024 (WMDP),
    https://arxiv.org/abs/2403.03218, L_forget; its formula has the squared norm, its code divides by the hidden
    size, as here.
    """
    return embed_diff(states, control, kept, count)


def embed_diff(states: Tensor, ref_states: Tensor, kept: Tensor, count: Tensor | None = None) -> Tensor:
    """RMU's retain loss: mean over examples of the mean over kept positions of ||h - h_ref||^2 / hidden.

    The same paper, L_retain; open-unlearning's name for it is EMBED_DIFF. 0 where the model is the reference.
    """
    distance = (states.float() - ref_states.float()).square().mean(-1).masked_fill(~kept, 0).sum(-1)
    examples = torch.tensor(len(states), device=states.device)
    return (distance / kept.sum(-1).clamp(min=1)).sum() / _count(count, examples)


def rmu_control(hidden_size: int, coefficient: float, seed: int) -> Tensor:
    """c u, fp32 [hidden_size]: u uniform on [0, 1) in each dimension, then normalized, as the code of WMDP draws it."""
    u = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
    return coefficient * u / u.norm()


def kl_to_reference(logits: Tensor, ref_logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """KLR: mean over answer tokens of KL(reference || model), a KL between log-softmaxes, 0 where they agree."""
    log_p, log_ref = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    kl = F.kl_div(log_p, log_ref, reduction="none", log_target=True).sum(-1)
    return kl.masked_fill(labels == IGNORE_INDEX, 0).sum() / _count(count, answer_tokens(labels))


def paper_margin(model: nn.Module, format: str = "bnb-nf4", step: float | None = None) -> float:
    """The hinge's margin as the QUAIL abstract has it: half the quantization step.

    ``step`` is Delta_q where it is given; else it is measured as the mean bucket width of the output head's weights
    under ``format``. It is a step of *weights* used as a distance of *logits*: the abstract does not say how one
    becomes the other, so read it as the paper's scale, not as a bound.
    """
    if step is None:
        head = _head(model)
        if head is None:
            raise ValueError("model: expected an output head to measure the step on, or a step; got a model without")
        step = mean_step(head.weight.detach(), format)
    if not 0 < step < float("inf"):
        raise ValueError(f"step: expected a positive number; got {step}")
    return step / 2


@torch.no_grad()
def rms_difference(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor]], norm: str = "per_logit", space: str = "logits"
) -> float:
    """The root mean square of what the hinge compares with its margin, between two models.

    ``pairs`` are (logits, other_logits, labels). With d their difference in ``space`` (``log_probs``: of both
    log-softmaxes), in fp32: ``per_logit`` is over every |d_v| of every answer token, ``l2`` and ``linf`` are over the
    tokens' norms of d, ``label`` over their |d_label|. Between a model and its own quantized copy it is the noise
    that forgetting has to stand out from. 0 where there is no answer token.
    """
    total, number = 0.0, 0
    for logits, other, labels in pairs:
        answers = labels != IGNORE_INDEX
        a, b, label = logits[answers].float(), other[answers].float(), labels[answers]
        d = a.log_softmax(-1) - b.log_softmax(-1) if space == "log_probs" else a - b
        if norm == "label":
            d = d.gather(-1, label[:, None])
        elif norm in ("l2", "linf"):
            d = torch.linalg.vector_norm(d, 2 if norm == "l2" else torch.inf, dim=-1)
        total += d.double().square().sum().item()
        number += d.numel()
    return math.sqrt(total / max(number, 1))


@torch.no_grad()
def mean_step(w: Tensor, format: str, group_size: int | None = None) -> float:
    """The mean width of the buckets that the weights of ``w`` lie in under a recipe, in units of ``w``."""
    recipe = get_format(format, group_size)
    check_weight("w", w, recipe)
    of_tensor, total = recipe.fit_tensor(w), 0.0
    for _, _, x, short in group_chunks(w, recipe):
        params = recipe.params(x, short, of_tensor)
        total += recipe.step(recipe.rank(x, params, short), params).double().sum().item()
    return total / max(w.numel(), 1)


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits: the output embeddings, or a sequence classifier's last linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    is_classifier = type(innermost(model)).__name__.endswith("ForSequenceClassification")
    return linears[-1] if head is None and is_classifier and linears else head


def _forward_takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(innermost(model).forward).parameters


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside DistributedDataParallel, PEFT and the like."""
    while True:
        inner: Callable | nn.Module | None = getattr(model, "get_base_model", None) or getattr(model, "module", None)
        if inner is None:
            return model
        model = inner if isinstance(inner, nn.Module) else inner()


def _count(given: Tensor | None, own: Tensor) -> Tensor:
    return (own if given is None else given).clamp(min=1)
