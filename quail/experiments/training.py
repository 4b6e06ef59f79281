"""The two stages that train: learning everything, and unlearning a part of it until a rule on its validation half."""

import math
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from .. import losses
from ..data import UnlearningDataset, collate
from ..machine import bf16_is_fast
from ..models import default_device
from ..trainer import QuailConfig, QuailTrainer
from ..weights import fake_quantized, stored_in
from .recipe import Learn, Method, Stop
from .tasks import Task


def learn(model: nn.Module, tokenizer, task: Task, settings: Learn, seed: int) -> dict:
    """Fine-tunes ``model`` in place on the task's ``learn_rows``; returns the last epoch's mean NLL and the steps."""
    set_seed(seed)
    task.trained(model)
    model.to(default_device()).train()
    rows, batch = task.learn_rows, settings.batch_size
    steps = settings.epochs * math.ceil(len(rows) / batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / max(settings.warmup_steps, 1)) * (1 - i / steps)
    )
    shuffle = torch.Generator().manual_seed(seed)
    epoch_losses: list[float] = []
    with tqdm(total=steps, desc="Learning", unit="step", leave=False, disable=None) as bar:
        for _ in range(settings.epochs):
            order, epoch_losses = torch.randperm(len(rows), generator=shuffle).tolist(), []
            for start in range(0, len(rows), batch):
                with autocast():
                    chosen = [rows[i] for i in order[start : start + batch]]
                    chosen = on_device(collate(chosen, tokenizer.pad_token_id))
                    loss = losses.nll(*losses.answer_logits(model, chosen))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                epoch_losses.append(loss.item())
                bar.update()
                bar.set_postfix(nll=f"{epoch_losses[-1]:.3f}")
    model.requires_grad_(True)
    return {"steps": steps, "nll": sum(epoch_losses) / len(epoch_losses)}


def unlearn(
    model: nn.Module, tokenizer, task: Task, method: Method, stop: Stop, seed: int, scratch: str
) -> tuple[nn.Module, dict]:
    """Makes ``model`` forget by ``method``: the model as ``quail unlearn`` would save it, and how it went."""
    set_seed(seed)
    config = QuailConfig(
        output_dir=scratch,
        bf16=bf16_is_fast(),
        use_cpu=default_device().type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        seed=seed,
        **{"disable_tqdm": True} | method.fields,
    )
    if config.lora_rank is None:
        task.trained(model)
    retain = None if config.retain_loss == "none" else task.retain_rows
    idk = task.refusals(config) if config.forget_loss in ("idk", "dpo") else None
    watch = _StopOnValidation(task, stop, method.stop_at if method.stop_at is not None else stop.at, config.max_steps)
    trainer = QuailTrainer(
        model=model,
        args=config,
        train_dataset=UnlearningDataset(task.forget_rows, retain, seed, idk),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    if config.fake_quant:
        # What is deployed has to have forgotten: of several grids, on each.
        watch.formats = (None, *trainer.fake_quant_formats) if config.fake_quant == "mixed" else (config.fake_quant,)
    trainer.train()
    model = trainer.unlearned()
    model.requires_grad_(True)
    return model, {
        "steps": trainer.state.global_step,
        "reached": watch.reached,
        "validation": watch.trace[-1][1] if watch.trace else None,
        "trace": watch.trace,
        "hinge_margin": trainer.hinge_margin if config.gamma else None,
    }


def autocast():
    return torch.autocast(default_device().type, dtype=torch.bfloat16, enabled=bf16_is_fast())


def on_device(batch: dict) -> dict:
    device = default_device()
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


class _StopOnValidation(TrainerCallback):
    """Ends training by the recipe's rule, looked at on the weights that the deployment is to have."""

    def __init__(self, task: Task, stop: Stop, at: float, max_steps: int):
        self.task, self.stop, self.at = task, stop, at
        self.formats: tuple[str | None, ...] = (None,)
        self.trace: list[tuple[int, float]] = []
        self.reached = False
        self.bar = tqdm(total=max_steps, desc="Unlearning", unit="step", leave=False, disable=None)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update()
        if state.global_step % self.stop.every and state.global_step < state.max_steps:
            return
        was_training = model.training
        model.eval()
        values = []
        for format in self.formats:
            stored = stored_in(model, torch.bfloat16) if self.stop.weights == "saved" else nullcontext()
            with autocast(), stored, fake_quantized(model, format):
                values.append(self.task.validate(model)[self.stop.metric])
        value = max(values)
        model.train(was_training)
        self.trace.append((state.global_step, value))
        self.bar.set_postfix({self.stop.metric: f"{value:.2f}"})
        self.reached = value <= self.at
        control.should_training_stop = control.should_training_stop or self.reached

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
