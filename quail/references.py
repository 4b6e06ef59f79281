"""Where the original model's logits come from while its copy unlearns."""

import copy
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .losses import answer_logits


class Reference(Protocol):
    """Anything that gives the original model's aligned logits and labels for a batch, without a graph."""

    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]: ...


class FrozenReference:
    """A second model, by default a copy of the one to be trained, in evaluation mode and never updated."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def copy_of(cls, model: nn.Module) -> "FrozenReference":
        return cls(copy.deepcopy(model))

    @torch.no_grad()
    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        device = batch["labels"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return answer_logits(self.model, batch)


class AdapterOffReference:
    """The same PEFT model with its adapters off: no second model in memory."""

    def __init__(self, model: nn.Module):
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"model: expected a PEFT model, whose adapters can be off; got {type(model).__name__}")
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                return answer_logits(self.model, batch)
        finally:
            self.model.train(training)


def make_reference(model: nn.Module, ref_model: nn.Module | None = None) -> Reference:
    """``ref_model`` frozen; without one, the adapters of a PEFT ``model`` off, else a frozen copy of ``model``.

    Raises ValueError where ``ref_model`` shares parameters with ``model``: its logits would move along.
    """
    if ref_model is not None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if ref_model is model or any(id(p) in trained for p in ref_model.parameters()):
            raise ValueError("ref_model: expected a model of its own; got one that shares parameters with model")
        return FrozenReference(ref_model)
    return AdapterOffReference(model) if hasattr(model, "disable_adapter") else FrozenReference.copy_of(model)
