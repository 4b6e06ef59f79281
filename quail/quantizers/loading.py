"""Checkpoints as they are stored, and which of a model's layers a deployment quantizes."""

import os
from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models import default_device, from_pretrained
from ..weights import head_modules


def load(checkpoint: str | os.PathLike, dtype: torch.dtype, auto, **options) -> PreTrainedModel:
    """The checkpoint in evaluation mode, on the GPU where there is one; ``options`` go to ``from_pretrained``.

    Raises ValueError where there is no such model, a library that it needs is not installed, or a weight of it is not
    in the checkpoint: transformers would draw that at random.
    """
    options |= {"device_map": {"": str(default_device())}, "output_loading_info": True}
    try:
        model, info = from_pretrained(auto, checkpoint, dtype=dtype, **options)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: expected the library of its quantizer; got {reason:.300}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        got = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more missing" if len(missing) > 3 else " missing")
        raise ValueError(f"{checkpoint}: expected every weight of {type(model).__name__}; got {got}")
    return model.eval()


def load_config(checkpoint: str | os.PathLike) -> PretrainedConfig:
    return from_pretrained(AutoConfig, checkpoint)


def skeleton(config: PretrainedConfig, auto) -> PreTrainedModel:
    """The model of a configuration, without its memory. Raises ValueError where ``auto`` knows no such model."""
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except ValueError:  # with the hundreds of configurations that it knows
        raise ValueError(f"auto: expected a class that knows {config.model_type}; got {auto.__name__}") from None


def quantized_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers whose weights a deployment quantizes, ``nn.Linear`` and ``Conv1D``, by name.

    They are those that transformers hands to bitsandbytes and torchao, without ``head_modules``. Raises ValueError
    where there are none.
    """
    from ..auditing.roles import Roles

    roles, heads = Roles(model), head_modules(model)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or any(f"{name}.".startswith(f"{head}.") for head in heads):
            continue
        if roles.of(f"{name}.weight", tuple(module.weight.shape)).kept_as is None:
            layers[name] = module
    if not layers:
        raise ValueError(f"model: expected linear layers besides the head; got a {type(model).__name__} without")
    return layers


def skip_list(model: PreTrainedModel) -> list[str] | None:
    """transformers' ``modules_to_not_convert``: None, its own choice; that and ``head_modules`` where there are any."""
    from transformers.quantizers.base import get_keys_to_not_convert

    heads = head_modules(model)
    return [*get_keys_to_not_convert(model), *heads] if heads else None


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    height, width = layer.weight.shape
    return (width, height) if isinstance(layer, Conv1D) else (height, width)


def require_multiples(
    quantizer: str, layers: Mapping[str, nn.Module], multiple_of: int, side: str, reason: str
) -> None:
    """Raises ValueError where a layer's ``side``, in_features or out_features, is no multiple of that number."""
    for name, layer in layers.items():
        size = shape_of(layer)[side == "in_features"]
        if size % multiple_of:
            raise ValueError(
                f"{quantizer}: expected {side} a multiple of {multiple_of}, {reason}; got {size} in {name}"
            )


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight as [out_features, in_features], contiguous."""
    weight = layer.weight.detach()
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def set_matrix(layer: nn.Module, values: torch.Tensor) -> None:
    """Writes [out_features, in_features] values into the weight, in its dtype."""
    layer.weight.copy_(values.T if isinstance(layer, Conv1D) else values)
