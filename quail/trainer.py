"""``QuailTrainer``: a ``transformers.Trainer`` that unlearns a forget set and holds on to a retain set.

    loss = forget + alpha * retain + gamma * hinge

The terms are those of ``losses`` and the hinge of ``quail_kernels``, each a sum over its tokens (NPO: examples)
divided by their number in the whole accumulated batch on all processes: gradient accumulation gives the gradient
of one large batch, whatever the answers' lengths. The trained model runs in training mode, dropout included, the
reference in evaluation mode; set a model's dropout to 0 to compare like with like.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from quail_kernels import fake_quant, get_format, logit_margin_hinge

from . import losses
from .data import UnlearningCollator
from .references import make_reference

_FORGET_LOSSES = Literal["ga", "npo"]
_RETAIN_LOSSES = Literal["gdr", "klr", "none"]
_HINGE_NORMS = Literal["per_logit", "l2", "linf", "label"]
_HINGE_SPACES = Literal["logits", "log_probs"]
_MARGIN_MODES = Literal["paper", "absolute"]


@dataclass
class QuailConfig(TrainingArguments):
    """``TrainingArguments`` and what the unlearning loss needs. Raises ValueError on a value out of its range."""

    forget_loss: _FORGET_LOSSES = field(
        default="ga", metadata={"help": "Gradient ascent, or negative preference optimization."}
    )
    retain_loss: _RETAIN_LOSSES = field(
        default="gdr", metadata={"help": "Likelihood of the retain set, KL to the reference on it, or nothing."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of the retain loss."})
    gamma: float = field(default=1.0, metadata={"help": "Weight of the logit margin hinge; 0 is off."})
    npo_beta: float = field(default=0.1, metadata={"help": "NPO's inverse temperature."})
    hinge_norm: _HINGE_NORMS = field(default="per_logit", metadata={"help": "What has to exceed the margin."})
    hinge_space: _HINGE_SPACES = field(
        default="logits", metadata={"help": "Raw logits, or log-probabilities, which no constant can satisfy."}
    )
    margin_mode: _MARGIN_MODES = field(
        default="paper", metadata={"help": "Half a quantization step as in the QUAIL paper, or margin itself."}
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "absolute: the margin, in logits. paper: the step; measured on the head if not given."},
    )
    margin_format: str = field(
        default="bnb-nf4", metadata={"help": "Format whose step on the output head the paper's margin is half of."}
    )
    fake_quant: str | None = field(
        default=None, metadata={"help": "Format whose fake-quantized weights the training passes run on."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be off: a training example holds a forget and a retain row."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Integrations to report to, as in TrainingArguments."}
    )

    def __post_init__(self):
        for name, choices in (
            ("forget_loss", _FORGET_LOSSES),
            ("retain_loss", _RETAIN_LOSSES),
            ("hinge_norm", _HINGE_NORMS),
            ("hinge_space", _HINGE_SPACES),
            ("margin_mode", _MARGIN_MODES),
        ):
            if getattr(self, name) not in get_args(choices):
                expected = f"expected one of {', '.join(get_args(choices))}"
                raise ValueError(f"{name}: {expected}; got {getattr(self, name)!r}")
        for name in ("alpha", "gamma"):
            if not (_is_finite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0; got {value!r}")
        if not (_is_finite(self.npo_beta) and self.npo_beta > 0):
            raise ValueError(f"npo_beta: expected a finite number above 0; got {self.npo_beta!r}")
        if self.margin is not None and not (_is_finite(self.margin) and self.margin > 0):
            raise ValueError(f"margin: expected a finite number above 0, or None; got {self.margin!r}")
        if self.margin is None and self.margin_mode == "absolute" and self.gamma:
            raise ValueError("margin: expected a finite number above 0 for margin_mode 'absolute'; got None")
        for name in ("margin_format", "fake_quant"):
            if (value := getattr(self, name)) is None and name == "fake_quant":
                continue
            try:
                get_format(value)
            except (ValueError, AttributeError) as error:
                reason = str(error).partition(": ")[2] or f"expected the name of a format; got {value!r}"
                raise ValueError(f"{name}: {reason}") from None
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, as forget and retain would go; got True")
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        return bool(self.gamma) or self.forget_loss == "npo" or self.retain_loss == "klr"


class _SetEpoch(TrainerCallback):
    """Tells the data set its epoch: accelerate's loader tells only a sampler where that can be told."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class QuailTrainer(Trainer):
    """Trains ``model`` to forget, with the loss at the top of this file.

    Args:
        model: a causal language model with fp32 weights, or a PEFT model around one.
        args: what to minimize.
        train_dataset: an ``UnlearningDataset``.
        ref_model: the original model where it is not ``model`` as it is now; made if the loss needs one.
        data_collator: gives ``{"forget": batch, "retain": batch}``; by default an ``UnlearningCollator``.
        processing_class: the tokenizer, whose padding token the default collator takes.
        kwargs: as for ``transformers.Trainer``. An evaluation set holds flat rows, as ``data.encode`` returns them,
            and is measured by the model's own loss.

    Raises:
        ValueError: where ``ref_model`` shares parameters with ``model``, where the retain loss has no retain set,
            or where ``fake_quant`` meets adapters or a model without linear layers.
    """

    # The losses are divided by the whole accumulated batch's counts: nothing is to divide them again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: QuailConfig,
        train_dataset: Dataset | None = None,
        ref_model: nn.Module | None = None,
        data_collator=None,
        processing_class=None,
        **kwargs,
    ):
        if args.retain_loss != "none" and getattr(train_dataset, "retain", ()) is None:
            got = "a train_dataset without"
            raise ValueError(f"retain_loss: expected 'none' or a retain set for {args.retain_loss!r}; got {got}")
        if args.fake_quant:
            if hasattr(model, "disable_adapter"):
                expected = "expected None for a PEFT model, whose weights are not those deployed"
                raise ValueError(f"fake_quant: {expected}; got {args.fake_quant!r}")
            _deployed_linears(model)
        if data_collator is None:
            pad_token_id = getattr(processing_class, "pad_token_id", None)
            if pad_token_id is None:
                expected = "expected a tokenizer with a padding token, or a data_collator"
                raise ValueError(f"processing_class: {expected}; got {type(processing_class).__name__}")
            data_collator = UnlearningCollator(pad_token_id)
        _warn_of_coarse_weights(model)
        self.reference = None
        if args.needs_reference or ref_model is not None:
            self.reference = make_reference(model, ref_model)
        self.hinge_margin = None
        if args.gamma:
            self.hinge_margin = args.margin
            if args.margin_mode == "paper":
                self.hinge_margin = losses.paper_margin(model, args.margin_format, args.margin)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(_SetEpoch(train_dataset))
        self._parts: dict[str, Tensor] = {}
        self._parts_steps = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device=None):
        """The batches of one optimizer step and, as tensors, how many items their losses are divided by."""
        samples = []
        for _ in range(num_batches):
            try:
                samples.append(next(epoch_iterator))
            except StopIteration:
                break
        self._parts_steps += 1
        return samples, self._counts(samples, device) if samples else None

    def _counts(self, samples: Sequence[Mapping], device) -> dict[str, Tensor]:
        totals = []
        for sample in samples:
            if "forget" not in sample:
                expected = "expected batches with forget and retain, as from an UnlearningDataset"
                raise ValueError(f"train_dataset: {expected}; got {', '.join(sample)}")
            labels = sample["forget"]["labels"]
            retain = sample.get("retain")
            # The first label has no logits before it.
            tokens = losses.answer_tokens(labels[:, 1:])
            retained = losses.answer_tokens(retain["labels"][:, 1:]) if retain else torch.zeros_like(tokens)
            totals.append(torch.stack((tokens, torch.full_like(tokens, len(labels)), retained)))
        total = torch.stack(totals).sum(0)
        if device is not None:
            total = total.to(device)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        return dict(zip(("forget_tokens", "forget_examples", "retain_tokens"), total.unbind(), strict=True))

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Around the backward pass, too: gradient checkpointing runs the forward pass again in it.
        with fake_quantized(self.model, self.args.fake_quant):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ):
        """The unlearning loss of a nested batch, or the model's own loss of a flat one (evaluation).

        ``num_items_in_batch`` is as ``get_batch_samples`` returns it; without it the batch stands for itself.
        """
        if "forget" not in inputs:
            # A model that computes its own loss needs logits for every label.
            outputs = model(**losses.model_inputs(model, inputs), labels=inputs["labels"])
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        args, counts, parts = self.args, num_items_in_batch or {}, {}
        forget = inputs["forget"]
        ref_logits = self.reference(forget)[0] if args.gamma or args.forget_loss == "npo" else None
        logits, labels = losses.answer_logits(model, forget)
        if args.forget_loss == "npo":
            examples = counts.get("forget_examples")
            loss = losses.npo(logits, ref_logits, labels, args.npo_beta, examples)
        else:
            loss = losses.gradient_ascent(logits, labels, counts.get("forget_tokens"))
        parts["forget_loss"] = loss
        if args.gamma:
            total = logit_margin_hinge(
                logits,
                ref_logits,
                labels,
                margin=self.hinge_margin,
                norm=args.hinge_norm,
                space=args.hinge_space,
                reduction="sum",
            )
            tokens = counts.get("forget_tokens", losses.answer_tokens(labels))
            parts["hinge"] = total / tokens.clamp(min=1)
            loss = loss + args.gamma * parts["hinge"]
        if args.retain_loss != "none":
            parts["retain_loss"] = self._retain_loss(model, inputs["retain"], counts.get("retain_tokens"))
            loss = loss + args.alpha * parts["retain_loss"]
        # Data parallelism averages gradients over processes, but the counts are already those of all of them.
        scale = self.accelerator.num_processes if counts else 1
        if model.training:
            for name, value in parts.items():
                self._parts[name] = self._parts.get(name, 0) + value.detach() * scale
        loss = loss * scale
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _retain_loss(self, model: nn.Module, batch: Mapping, count: Tensor | None) -> Tensor:
        if self.args.retain_loss == "klr":
            ref_logits, _ = self.reference(batch)
            logits, labels = losses.answer_logits(model, batch)
            return losses.kl_to_reference(logits, ref_logits, labels, count)
        return losses.nll(*losses.answer_logits(model, batch), count)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the unweighted terms to what is logged, each a mean over the steps since the last time."""
        if "loss" in logs and self._parts:
            sums = self.accelerator.reduce(torch.stack(list(self._parts.values())).float(), "mean")
            means = (sums / max(self._parts_steps, 1)).tolist()
            logs.update(zip(self._parts, means, strict=True))
            self._parts, self._parts_steps = {}, 0
        super().log(logs, *args, **kwargs)


@contextlib.contextmanager
def fake_quantized(model: nn.Module, format: str | None) -> Iterator[nn.Module]:
    """Within it, the linear layers of ``model`` compute with the weights that a bf16 deployment in ``format`` has.

    Output head and embeddings are left alone, as bitsandbytes leaves them. Gradients go to the unquantized weights
    unchanged. The weights are quantized once, on entry, however many passes follow: change them outside only.
    ``format`` None does nothing. Raises ValueError where there is no layer to quantize.
    """
    patched = []
    try:
        for layer in _deployed_linears(model) if format is not None else ():
            patched.append((layer, layer.__dict__.get("forward")))
            weight = _DeployedWeight.apply(layer.weight, format)
            layer.forward = functools.partial(F.linear, weight=weight, bias=layer.bias)
        yield model
    finally:
        for layer, forward in patched:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@torch.no_grad()
def deploy_weights_(model: nn.Module, format: str) -> nn.Module:
    """Replaces the weights that ``fake_quantized`` would quantize by the dequantized values, in place.

    A checkpoint trained with ``fake_quant`` is saved so: then it computes the same whether it is quantized or not.
    For that the format must reproduce its own values, which the bitsandbytes formats do; ``ct-int4-sym`` and
    ``minmax-int4`` fit a new scale to them.
    """
    for layer in _deployed_linears(model):
        layer.weight.copy_(_DeployedWeight.apply(layer.weight, format))
    return model


class _DeployedWeight(torch.autograd.Function):
    """Straight through, bf16 included: forget and retain gradients nearly cancel, so rounding each would show."""

    @staticmethod
    def forward(ctx, w: Tensor, format: str) -> Tensor:
        return fake_quant(w.to(torch.bfloat16), format).to(w.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _deployed_linears(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    if not layers:
        raise ValueError(f"model: expected nn.Linear layers besides the head; got a {type(model).__name__} without")
    return layers


def _warn_of_coarse_weights(model: nn.Module) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
    if dtypes:
        got = ", ".join(sorted(str(dtype) for dtype in dtypes))
        warnings.warn(
            f"model: expected fp32 master weights, got {got}; "
            "with bf16 weights an AdamW step at 1e-5 changes only about 15 % of them",
            stacklevel=3,
        )


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
