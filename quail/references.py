"""Where the original model's logits come from while its copy unlearns."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .losses import answer_logits, answer_states


class Reference(Protocol):
    """Anything that gives what the original model does for a batch, without a graph.

    ``model`` is the module that a call runs; called, it gives aligned logits and labels as ``losses.answer_logits``,
    and ``states`` what ``losses.answer_states`` does.
    """

    model: nn.Module

    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]: ...

    def states(self, batch: Mapping, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class FrozenReference:
    """A second model, by default a copy of the one to be trained, in evaluation mode and never updated."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def copy_of(cls, model: nn.Module) -> "FrozenReference":
        return cls(copy.deepcopy(model))

    @torch.no_grad()
    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        return answer_logits(self._beside(batch), batch)

    @torch.no_grad()
    def states(self, batch: Mapping, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return answer_states(self._beside(batch), batch, layer)

    def _beside(self, batch: Mapping) -> nn.Module:
        device = batch["labels"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.model


class AdapterOffReference:
    """The same PEFT model with its adapters off: no second model in memory."""

    def __init__(self, model: nn.Module):
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"model: expected a PEFT model, whose adapters can be off; got {type(model).__name__}")
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        with self._off():
            return answer_logits(self.model, batch)

    @torch.no_grad()
    def states(self, batch: Mapping, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self._off():
            return answer_states(self.model, batch, layer)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield
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
