"""Unlearning losses: pure functions of logits, for any training loop.

    loss = forget_loss + alpha * retain_loss + gamma * hinge

All take ``logits`` [..., tokens, vocabulary] and ``labels`` [..., tokens], aligned: ``logits[..., t, :]`` predicts
``labels[..., t]``, as ``answer_logits`` returns them. Labels of -100 do not count. Arithmetic is fp32. Each loss is a
mean over the batch; ``count`` replaces the number that the sum is divided by, which is how micro-batches of unequal
length add up to the loss of the whole batch. The hinge is ``quail_kernels.logit_margin_hinge``.
"""

import inspect
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quail_kernels.formats import check_weight, get_format, group_chunks

from .data import IGNORE_INDEX


def answer_logits(model: nn.Module, batch: Mapping) -> tuple[Tensor, Tensor]:
    """The logits that predict the labels of a batch from ``data.collate``, and those labels, aligned.

    Returns ``logits`` [examples, columns, vocabulary] and ``labels`` [examples, columns]. Where the model can, its
    head runs over the last ``logits_to_keep`` columns only: prompts need no logits, and the head of a small model
    is a third of its work.
    """
    inputs = model_inputs(model, batch)
    labels, keep = batch["labels"], batch.get("logits_to_keep", batch["labels"].shape[1])
    if _forward_takes(model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    if _forward_takes(model, "use_cache"):
        inputs["use_cache"] = False
    logits = model(**inputs).logits[:, -keep:]
    return logits[:, :-1], labels[:, -keep:][:, 1:]


def model_inputs(model: nn.Module, batch: Mapping) -> dict:
    """What of a batch the model reads; the labels stay outside."""
    inputs = {key: batch[key] for key in ("input_ids", "inputs_embeds", "attention_mask") if key in batch}
    if "position_ids" in batch and _forward_takes(model, "position_ids"):
        inputs["position_ids"] = batch["position_ids"]
    return inputs


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
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError("model: expected an output head to measure the step on, or a step; got a model without")
        step = mean_step(head.weight.detach(), format)
    if not 0 < step < float("inf"):
        raise ValueError(f"step: expected a positive number; got {step}")
    return step / 2


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


def _forward_takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(_innermost(model).forward).parameters


def _innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside DistributedDataParallel, PEFT and the like."""
    while True:
        inner: Callable | nn.Module | None = getattr(model, "get_base_model", None) or getattr(model, "module", None)
        if inner is None:
            return model
        model = inner if isinstance(inner, nn.Module) else inner()


def _count(given: Tensor | None, own: Tensor) -> Tensor:
    return (own if given is None else given).clamp(min=1)
