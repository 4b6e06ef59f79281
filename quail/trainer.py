"""``QuailTrainer``: a ``transformers.Trainer`` that unlearns a forget set and holds on to a retain set.

    loss = forget + alpha * retain + gamma * hinge

The terms are those of ``losses`` and the hinge of ``quail_kernels``, each a sum over its tokens (losses of whole
answers: examples) divided by their number in the whole accumulated batch on all processes: gradient accumulation
gives the gradient of one large batch, whatever the answers' lengths. The trained model runs in training mode,
dropout included, the reference in evaluation mode; set a model's dropout to 0 to compare like with like.

Every method is a choice of ``QuailConfig``'s fields, and they combine: what is minimized on the forget set, what on
the retain set, the hinge, the weights that the passes see (``fake_quant``, ``weight_noise``), and which weights an
update reaches, and how far (``saliency``, ``floor_format``, ``lora_rank``, ``trainable_params``). The model is a causal
language model or a sequence classifier.
"""

import contextlib
import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from quail_kernels import get_format, logit_margin_hinge
from quail_kernels.formats import check_weight

from . import losses, updates
from .data import Example, UnlearningCollator, UnlearningDataset, encode, load_refusals, with_refusals
from .references import make_reference
from .weights import deploy_weights_, deployed_linears, fake_quantized, noisy

__all__ = ["QuailConfig", "QuailTrainer", "deploy_weights_", "fake_quantized", "make_dataset"]

MIXED = ("bnb-nf4", "bnb-fp4", "ct-int4-sym", "gguf-q4_0")
_FORGET_LOSSES = Literal["ga", "npo", "simnpo", "idk", "dpo", "rmu"]
_RETAIN_LOSSES = Literal["gdr", "klr", "embed_diff", "none"]
_HINGE_NORMS = Literal["per_logit", "l2", "linf", "label"]
_HINGE_SPACES = Literal["logits", "log_probs"]
_MARGIN_MODES = Literal["paper", "absolute", "calibrated"]
_FAKE_QUANT_ON = Literal["both", "forget"]
_NOISES = Literal["none", "uniform", "gaussian"]
_SALIENCIES = Literal["none", "module", "neuron", "weight"]
_NEEDS_IDK = ("idk", "dpo")


def _field(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class QuailConfig(TrainingArguments):
    """``TrainingArguments`` and what the unlearning loss needs. Raises ValueError on a value out of its range.

    Those who come from open-unlearning: GradAscent is ``ga`` with retain_loss ``none``, GradDiff ``ga`` with ``gdr``
    or ``klr``, its NPO, SimNPO, DPO (on the idk sets) and RMU are ``npo``, ``simnpo``, ``dpo`` and ``rmu``, and
    EMBED_DIFF is ``embed_diff``; its delta of SimNPO is simnpo_gamma / simnpo_beta.
    """

    forget_loss: _FORGET_LOSSES = _field(
        "ga",
        "ga: gradient ascent. npo, simnpo: (simple) negative preference optimization. idk: likelihood of refusals in "
        "place of the answers. dpo: refusals preferred to the answers. rmu: hidden states misdirected.",
    )
    retain_loss: _RETAIN_LOSSES = _field(
        "gdr", "Likelihood of the retain set, KL to the reference on it, its hidden states as the reference's, or none."
    )
    alpha: float = _field(1.0, "Weight of the retain loss.")
    gamma: float = _field(1.0, "Weight of the logit margin hinge; 0 is off.")
    npo_beta: float = _field(0.1, "NPO's inverse temperature.")
    simnpo_beta: float = _field(4.5, "SimNPO's inverse temperature.")
    simnpo_gamma: float = _field(0.0, "SimNPO's reward margin.")
    dpo_beta: float = _field(0.1, "DPO's inverse temperature.")
    idk_answers: str | None = _field(None, "Text file of refusals for idk and dpo, one a line; default: the package's.")
    rmu_layer: int | None = _field(
        None, "Block whose output rmu and embed_diff look at, from 0; default: as deep as block 7 of 32."
    )
    rmu_coefficient: float = _field(20.0, "Length of the vector that rmu draws hidden states to.")
    hinge_norm: _HINGE_NORMS = _field("per_logit", "What has to exceed the margin.")
    hinge_space: _HINGE_SPACES = _field("logits", "Raw logits, or log-probabilities, which no constant can satisfy.")
    margin_mode: _MARGIN_MODES = _field(
        "paper",
        "Half a quantization step as in the QUAIL paper, margin itself, or margin_factor times what quantization "
        "changes in the original model's logits on the forget set.",
    )
    margin: float | None = _field(
        None, "absolute: the margin, in logits. paper: the step; measured on the head if not given."
    )
    margin_factor: float = _field(2.0, "calibrated: how many root mean squares of the quantization noise.")
    margin_format: str = _field(
        "bnb-nf4", "paper: the format whose step on the output head is halved. calibrated: whose noise is measured."
    )
    fake_quant: str | None = _field(
        None,
        "Format whose fake-quantized weights the training passes run on; mixed: another one each step, of "
        + ", ".join(MIXED)
        + ".",
    )
    fake_quant_on: _FAKE_QUANT_ON = _field("both", "Passes that run on them: both, or those of the forget set only.")
    weight_noise: _NOISES = _field("none", "Quantization noise on the weights in the passes of the forget set.")
    noise_format: str = _field("bnb-nf4", "Format whose bucket width weight_noise has.")
    saliency: _SALIENCIES = _field("none", "Update only what the forget gradient is largest on (SURE), at this level.")
    saliency_share: float = _field(0.1, "Share of modules, neurons or weights that is updated.")
    floor_format: str | None = _field(
        None, "Format over whose bucket edges chosen weights are pushed when training ends."
    )
    floor_score: updates.SCORES = _field("update", "What chooses them: |update|, |sum of gradients|, or the flip law.")
    floor_share: float = _field(0.01, "Share of each layer's weights that the floor chooses.")
    lora_rank: int | None = _field(None, "Train LoRA adapters of this rank on all linear layers but the head.")
    lora_alpha: float | None = _field(None, "LoRA's scaling; default: twice the rank.")
    trainable_params: str | None = _field(
        None, "Regular expression: train only parameters whose whole name it matches."
    )
    remove_unused_columns: bool = _field(False, "Must be off: a training example holds a forget and a retain row.")
    report_to: None | str | list[str] = _field("none", "Integrations to report to, as in TrainingArguments.")

    def __post_init__(self):
        for name, choices in (
            ("forget_loss", _FORGET_LOSSES),
            ("retain_loss", _RETAIN_LOSSES),
            ("hinge_norm", _HINGE_NORMS),
            ("hinge_space", _HINGE_SPACES),
            ("margin_mode", _MARGIN_MODES),
            ("fake_quant_on", _FAKE_QUANT_ON),
            ("weight_noise", _NOISES),
            ("saliency", _SALIENCIES),
            ("floor_score", updates.SCORES),
        ):
            if getattr(self, name) not in get_args(choices):
                expected = f"expected one of {', '.join(get_args(choices))}"
                raise ValueError(f"{name}: {expected}; got {getattr(self, name)!r}")
        for name in ("alpha", "gamma", "simnpo_gamma"):
            if not (_is_finite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0; got {value!r}")
        for name in ("npo_beta", "simnpo_beta", "dpo_beta", "rmu_coefficient", "margin_factor"):
            if not (_is_finite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0; got {value!r}")
        for name in ("margin", "lora_alpha"):
            if (value := getattr(self, name)) is not None and not (_is_finite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, or None; got {value!r}")
        for name in ("saliency_share", "floor_share"):
            if not (_is_finite(value := getattr(self, name)) and 0 < value <= 1):
                raise ValueError(f"{name}: expected a number above 0 and of at most 1; got {value!r}")
        for name, least in (("rmu_layer", 0), ("lora_rank", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name}: expected a whole number of at least {least}, or None; got {value!r}")
        if self.margin is None and self.margin_mode == "absolute" and self.gamma:
            raise ValueError("margin: expected a finite number above 0 for margin_mode 'absolute'; got None")
        for name in ("margin_format", "noise_format", "fake_quant", "floor_format"):
            value = getattr(self, name)
            if (name, value) in (("fake_quant", None), ("fake_quant", "mixed"), ("floor_format", None)):
                continue
            try:
                get_format(value)
            except (ValueError, AttributeError) as error:
                reason = str(error).partition(": ")[2] or f"expected the name of a format; got {value!r}"
                raise ValueError(f"{name}: {reason}") from None
        if self.idk_answers is not None and not isinstance(self.idk_answers, str):
            raise ValueError(f"idk_answers: expected the path of a text file, or None; got {self.idk_answers!r}")
        if self.trainable_params is not None:
            try:
                re.compile(self.trainable_params)
            except (re.error, TypeError) as error:
                expected = "expected a regular expression, or None"
                raise ValueError(f"trainable_params: {expected}; got {self.trainable_params!r}: {error}") from None
        if self.weight_noise != "none" and self.fake_quant:
            expected = "expected 'none' beside fake_quant, whose place it takes"
            raise ValueError(f"weight_noise: {expected}; got {self.weight_noise!r}")
        if self.lora_rank is not None:
            for name in ("fake_quant", "floor_format", "trainable_params"):
                if getattr(self, name):
                    raise ValueError(f"{name}: expected None beside lora_rank; got {getattr(self, name)!r}")
            for name in ("weight_noise", "saliency"):
                if getattr(self, name) != "none":
                    raise ValueError(f"{name}: expected 'none' beside lora_rank; got {getattr(self, name)!r}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, as forget and retain would go; got True")
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        return bool(self.gamma) or self.forget_loss in ("npo", "dpo") or self.retain_loss in ("klr", "embed_diff")


def make_dataset(
    config: QuailConfig,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    retain: Sequence[Example] | None = None,
    max_length: int = 512,
) -> UnlearningDataset:
    """The training set that ``config`` asks for: the examples encoded, with refusals where its forget loss needs them.

    Raises ValueError where an example does not fit, or a forget example has no prompt to refuse.
    """
    idk = None
    if config.forget_loss in _NEEDS_IDK:
        refused = with_refusals(forget, load_refusals(config.idk_answers), config.seed)
        idk = encode(refused, tokenizer, max_length)
    return UnlearningDataset(
        encode(forget, tokenizer, max_length),
        encode(retain, tokenizer, max_length) if retain else None,
        config.seed,
        idk,
    )


class _SetEpoch(TrainerCallback):
    """Tells the data set its epoch: accelerate's loader tells only a sampler where that can be told."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class QuailTrainer(Trainer):
    """Trains ``model`` to forget, with the loss at the top of this file.

    Args:
        model: a causal language model or a sequence classifier with fp32 weights, or a PEFT model around one.
        args: what to minimize.
        train_dataset: an ``UnlearningDataset``, as of ``make_dataset``.
        ref_model: the original model where it is not ``model`` as it is now; made if the loss needs one.
        data_collator: gives ``{"forget": batch, "retain": batch}``; by default an ``UnlearningCollator``.
        processing_class: the tokenizer, whose padding token the default collator takes.
        kwargs: as for ``transformers.Trainer``. An evaluation set holds flat rows, as ``data.encode`` returns them,
            and is measured by the model's own loss.

    Attributes:
        hinge_margin: the hinge's margin, None without one.
        reference: where the original's logits come from, None where nothing asks for them.
        fake_quant_formats: the recipes whose weights the training passes run on, one of them a step; empty without.
        floor: the ``updates.WeightFloor`` of ``floor_format``, None without one.

    Raises:
        ValueError: where ``ref_model`` shares parameters with ``model``; where the retain loss has no retain set or
            the forget loss no refusals; where a format does not fit the model's layers or does not change them; or
            where quantization meets adapters or a model without linear layers.
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
        if args.forget_loss in _NEEDS_IDK:
            if type(losses.innermost(model)).__name__.endswith("ForSequenceClassification"):
                expected = "expected another loss for a sequence classifier, which has no refusals"
                raise ValueError(f"forget_loss: {expected}; got {args.forget_loss!r}")
            if getattr(train_dataset, "idk", ()) is None:
                got = "a train_dataset without"
                raise ValueError(f"forget_loss: expected refusals (idk) for {args.forget_loss!r}; got {got}")
        self.fake_quant_formats = _check_weights(model, args)
        if args.trainable_params is not None:
            _train_only(model, args.trainable_params)
        if args.lora_rank is not None:
            model = _with_adapters(model, args)
        if data_collator is None:
            pad_token_id = getattr(processing_class, "pad_token_id", None)
            if pad_token_id is None:
                expected = "expected a tokenizer with a padding token, or a data_collator"
                raise ValueError(f"processing_class: {expected}; got {type(processing_class).__name__}")
            data_collator = UnlearningCollator(pad_token_id)
        _warn_of_coarse_weights(model)
        self._rmu_layer, self._control = None, None
        if "rmu" == args.forget_loss or args.retain_loss == "embed_diff":
            self._rmu_layer = _rmu_layer(model, args.rmu_layer)
        self.reference = None
        if args.needs_reference or ref_model is not None:
            self.reference = make_reference(model, ref_model)
        self.hinge_margin = None
        if args.gamma and args.margin_mode != "calibrated":
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
        self._parts_steps = self._passes = 0
        # Here and not when training begins: a run that is resumed starts from other weights than the original ones.
        if args.gamma and args.margin_mode == "calibrated":
            self.hinge_margin = self._calibrated_margin()
        if args.saliency != "none":
            masks = updates.saliency_masks(self._forget_gradients(), args.saliency, args.saliency_share)
            self.add_callback(updates.SaliencyMask(self.model, masks))
        self.floor = None
        if args.floor_format:
            self.floor = updates.WeightFloor(
                self.model, args.floor_format, args.floor_share, args.floor_score, args.seed
            )
            self.add_callback(self.floor)

    def unlearned(self) -> PreTrainedModel:
        """The trained model as it is to be saved: adapters merged, and the values that ``fake_quant`` deploys.

        With ``fake_quant`` in one format the trained weights themselves are no model any more; with ``mixed`` they have
        been seen on several grids, and stay. It changes the model that was trained.
        """
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "merge_and_unload"):
            return model.merge_and_unload()
        if self.args.fake_quant and self.args.fake_quant != "mixed":
            deploy_weights_(model, self.args.fake_quant)
        return model

    def get_batch_samples(self, epoch_iterator, num_batches, device=None):
        """The batches of one optimizer step and, as tensors, how many items their losses are divided by."""
        samples = []
        for _ in range(num_batches):
            try:
                samples.append(next(epoch_iterator))
            except StopIteration:
                break
        self._parts_steps += 1
        self._passes = 0
        return samples, self._counts(samples, device) if samples else None

    def _counts(self, samples: Sequence[Mapping], device, of_all_processes: bool = True) -> dict[str, Tensor]:
        sides, totals = ("forget", "retain", "idk"), []
        for sample in samples:
            if "forget" not in sample:
                expected = "expected batches with forget and retain, as from an UnlearningDataset"
                raise ValueError(f"train_dataset: {expected}; got {', '.join(sample)}")
            counts, none = [], losses.aligned_labels(sample["forget"])[:0]
            for side in sides:
                labels = losses.aligned_labels(sample[side]) if side in sample else none
                tokens = losses.answer_tokens(labels)
                counts += [tokens, torch.full_like(tokens, len(labels))]
            totals.append(torch.stack(counts))
        total = torch.stack(totals).sum(0)
        if device is not None:
            total = total.to(device)
        if of_all_processes and self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        names = [f"{side}_{what}" for side in sides for what in ("tokens", "examples")]
        return dict(zip(names, total.unbind(), strict=True))

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Around the backward pass, too: gradient checkpointing runs the forward pass again in it.
        args = self.args
        if args.weight_noise == "none" and (args.fake_quant_on == "both" or not self.fake_quant_formats):
            with fake_quantized(self.model, self._format()):
                return super().training_step(model, inputs, num_items_in_batch)
        # Which weights a layer computes with must not change between its passes: each side has a backward pass.
        with self._forget_weights():
            forget = {side: batch for side, batch in inputs.items() if side != "retain"}
            loss = super().training_step(model, forget, num_items_in_batch)
        if args.retain_loss != "none":
            loss = loss + super().training_step(model, {"retain": inputs["retain"]}, num_items_in_batch)
        return loss

    def _format(self) -> str | None:
        """The format of this step; the same on all processes, and in a run that is resumed."""
        if not self.fake_quant_formats:
            return None
        return random.Random(f"{self.args.seed} {self.state.global_step}").choice(self.fake_quant_formats)

    @contextlib.contextmanager
    def _forget_weights(self) -> Iterator[None]:
        args, self._passes = self.args, self._passes + 1
        if args.weight_noise == "none":
            with fake_quantized(self.model, self._format()):
                yield
            return
        place = f"{args.seed} {self.state.global_step} {self._passes} {self.accelerator.process_index}"
        generator = torch.Generator(args.device).manual_seed(random.Random(place).getrandbits(63))
        with noisy(self.model, args.noise_format, args.weight_noise, generator):
            yield

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ):
        """The unlearning loss of a nested batch, or the model's own loss of a flat one (evaluation).

        ``num_items_in_batch`` is as ``get_batch_samples`` returns it; without it the batch stands for itself. The terms
        of a side that is not in the batch are left out.
        """
        if "labels" in inputs:
            # A model that computes its own loss needs logits for every label.
            outputs = model(**losses.model_inputs(model, inputs), labels=inputs["labels"])
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        args, counts, parts, loss, logits = self.args, num_items_in_batch or {}, {}, 0, None
        if "forget" in inputs:
            parts["forget_loss"], hinge, logits = self._forget_terms(model, inputs, counts)
            loss = parts["forget_loss"]
            if hinge is not None:
                parts["hinge"] = hinge
                loss = loss + args.gamma * hinge
        if "retain" in inputs and args.retain_loss != "none":
            parts["retain_loss"] = self._retain_loss(model, inputs["retain"], counts)
            loss = loss + args.alpha * parts["retain_loss"]
        # Data parallelism averages gradients over processes, but the counts are already those of all of them.
        scale = self.accelerator.num_processes if counts else 1
        if model.training:
            for name, value in parts.items():
                self._parts[name] = self._parts.get(name, 0) + value.detach() * scale
        loss = loss * scale
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _forget_terms(
        self, model: nn.Module, inputs: Mapping, counts: Mapping[str, Tensor], with_hinge: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(forget loss, hinge or None, logits of the pass that the loss is of)."""
        args, forget, method = self.args, inputs["forget"], self.args.forget_loss
        with_hinge = with_hinge and bool(args.gamma)
        tokens, examples = counts.get("forget_tokens"), counts.get("forget_examples")
        logits = labels = ref_logits = idk_logits = None
        if with_hinge or method in ("npo", "dpo"):
            ref_logits, _ = self.reference(forget)
        if method == "rmu":
            logits, labels, states, kept = losses.answer_states(model, forget, self._rmu_layer)
        elif with_hinge or method != "idk":
            logits, labels = losses.answer_logits(model, forget)
        if method in _NEEDS_IDK:
            idk_logits, idk_labels = losses.answer_logits(model, inputs["idk"])

        if method == "ga":
            loss = losses.gradient_ascent(logits, labels, tokens)
        elif method == "npo":
            loss = losses.npo(logits, ref_logits, labels, args.npo_beta, examples)
        elif method == "simnpo":
            loss = losses.simnpo(logits, labels, args.simnpo_beta, args.simnpo_gamma, examples)
        elif method == "idk":
            loss = losses.nll(idk_logits, idk_labels, counts.get("idk_tokens"))
        elif method == "dpo":
            idk_ref_logits, _ = self.reference(inputs["idk"])
            refusal = (idk_logits, idk_ref_logits, idk_labels)
            loss = losses.dpo(logits, ref_logits, labels, *refusal, args.dpo_beta, examples)
        else:
            if self._control is None:
                self._control = losses.rmu_control(states.shape[-1], args.rmu_coefficient, args.seed)
            self._control = self._control.to(states.device)
            loss = losses.rmu(states, self._control, kept, examples)
        hinge = None
        if with_hinge:
            total = logit_margin_hinge(
                logits,
                ref_logits,
                labels,
                margin=self.hinge_margin,
                norm=args.hinge_norm,
                space=args.hinge_space,
                reduction="sum",
            )
            hinge = total / (losses.answer_tokens(labels) if tokens is None else tokens).clamp(min=1)
        return loss, hinge, idk_logits if logits is None else logits

    def _retain_loss(self, model: nn.Module, batch: Mapping, counts: Mapping[str, Tensor]) -> Tensor:
        if self.args.retain_loss == "embed_diff":
            _, _, ref_states, _ = self.reference.states(batch, self._rmu_layer)
            _, _, states, kept = losses.answer_states(model, batch, self._rmu_layer)
            return losses.embed_diff(states, ref_states, kept, counts.get("retain_examples"))
        count = counts.get("retain_tokens")
        if self.args.retain_loss == "klr":
            ref_logits, _ = self.reference(batch)
            logits, labels = losses.answer_logits(model, batch)
            return losses.kl_to_reference(logits, ref_logits, labels, count)
        return losses.nll(*losses.answer_logits(model, batch), count)

    def _forget_batches(self) -> Iterator[dict]:
        """The forget set, once, in its order, on the device; refusals beside it."""
        size = self.args.per_device_train_batch_size
        for start in range(0, len(self.train_dataset), size):
            items = [self.train_dataset[i] for i in range(start, min(start + size, len(self.train_dataset)))]
            batch = self.data_collator(items)
            yield self._prepare_inputs({side: batch[side] for side in batch if side != "retain"})

    def _calibrated_margin(self) -> float:
        args = self.args

        def pairs():
            for batch in self._forget_batches():
                logits, labels = self.reference(batch["forget"])
                with fake_quantized(self.reference.model, args.margin_format):
                    quantized, _ = self.reference(batch["forget"])
                yield logits, quantized, labels

        rms = losses.rms_difference(pairs(), args.hinge_norm, args.hinge_space)
        if not 0 < rms < math.inf:
            expected = "expected a format that changes the original model's logits, for margin_mode 'calibrated'"
            raise ValueError(f"margin_format: {expected}; got {args.margin_format!r}, which changes them by {rms}")
        return args.margin_factor * rms

    def _forget_gradients(self) -> dict[str, Tensor]:
        """By parameter, the gradient of the forget loss over the whole forget set, without dropout."""
        batches = list(self._forget_batches())
        counts = self._counts(batches, self.args.device, of_all_processes=False)  # each process has all of the set
        training = self.model.training
        self.model.eval()
        for batch in batches:
            with self.compute_loss_context_manager():
                loss, _, _ = self._forget_terms(self.model, batch, counts, with_hinge=False)
            loss.backward()
        self.model.train(training)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return gradients

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the unweighted terms to what is logged, each a mean over the steps since the last time."""
        if "loss" in logs and self._parts:
            sums = self.accelerator.reduce(torch.stack(list(self._parts.values())).float(), "mean")
            means = (sums / max(self._parts_steps, 1)).tolist()
            logs.update(zip(self._parts, means, strict=True))
            self._parts, self._parts_steps = {}, 0
        super().log(logs, *args, **kwargs)


def _check_weights(model: nn.Module, args: QuailConfig) -> tuple[str, ...]:
    """The formats of ``fake_quant``; raises ValueError where a format cannot take the model's layers."""
    formats = {
        "fake_quant": args.fake_quant,
        "floor_format": args.floor_format,
        "noise_format": args.noise_format if args.weight_noise != "none" else None,
        "saliency": args.saliency if args.saliency != "none" else None,
    }
    chosen = ()
    for name, format in formats.items():
        if format is None:
            continue
        if hasattr(model, "disable_adapter"):
            expected = "expected None for a PEFT model, whose weights are not those deployed"
            raise ValueError(f"{name}: {expected}; got {format!r}")
        if name == "saliency":
            continue
        layers = deployed_linears(model)
        if name == "fake_quant":
            chosen = _mixed_formats(layers) if format == "mixed" else (format,)
        for recipe in map(get_format, chosen if name == "fake_quant" else (format,)):
            for layer_name, layer in layers.items():
                try:
                    check_weight(layer_name, layer.weight, recipe)
                except ValueError as error:
                    raise ValueError(f"{name}: expected a format for every layer; got {recipe}: {error}") from None
    return chosen


def _mixed_formats(layers: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    """``MIXED``, with groups of 64 or 32 weights where 128 do not divide every layer's rows."""

    def fits(size: int) -> bool:
        return all(layer.in_features % size == 0 for layer in layers.values())

    size = next((size for size in (128, 64) if fits(size)), 32)
    return tuple(f"{name}@{size}" if name == "ct-int4-sym" else name for name in MIXED)


def _train_only(model: nn.Module, pattern: str) -> None:
    matched = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    if not matched:
        first = next(iter(dict(model.named_parameters())))
        raise ValueError(f"trainable_params: expected a match among names as {first}; got {pattern!r}")
    for name, p in model.named_parameters():
        p.requires_grad_(name in matched)


def _with_adapters(model: nn.Module, args: QuailConfig) -> nn.Module:
    if hasattr(model, "disable_adapter"):
        raise ValueError(f"lora_rank: expected None for a PEFT model, which has adapters; got {args.lora_rank}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError(f"lora_rank: expected the package peft, or None; got {args.lora_rank} without it") from None
    alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    return get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules="all-linear"))


def _rmu_layer(model: nn.Module, layer: int | None) -> int:
    layers = losses.innermost(model).config.get_text_config().num_hidden_layers
    if layer is None:
        return min(7 * layers // 32, layers - 1)  # as deep as RMU goes in models of 32 blocks
    if layer >= layers:
        raise ValueError(f"rmu_layer: expected one of the model's blocks, 0 to {layers - 1}; got {layer}")
    return layer


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
