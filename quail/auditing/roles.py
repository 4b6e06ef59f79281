"""What a deployment through transformers and bitsandbytes does with each tensor of a model.

The model of the configuration is built without memory, on the meta device, and transformers' own selection is asked
about it. Where no model can be built the names decide. No code that comes with a checkpoint is run.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

_FULL_PRECISION_NAMES = re.compile(
    r"embed|embd|wte|wpe|lm_head|output_layer|^output\.|norm|(^|\.)ln_|score|classifier|router|\.gate\.weight$", re.I
)


@dataclass(frozen=True)
class Role:
    """``kept_as`` says what a tensor is that stays in full precision; None: it is quantized."""

    kept_as: str | None
    transposed: bool = False


class Roles:
    """By the first of the models that could be built."""

    def __init__(self, *models: torch.nn.Module | None):
        model = next((model for model in models if model is not None), None)
        self._known = _known_roles(model) if model is not None else {}
        self._prefix = model.base_model_prefix if model is not None else ""
        self._model = type(model).__name__ if model is not None else None
        self._by_name = 0

    @property
    def source(self) -> str:
        if self._model is None:
            return "names, for want of a configuration that transformers can build a model from"
        names = f", and names for {self._by_name} tensors that it does not have" if self._by_name else ""
        return f"transformers' {self._model}{names}"

    def of(self, name: str, shape: tuple[int, ...]) -> Role:
        # A bare backbone is stored without the prefix that it has inside a model with a head.
        for spelled in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
            if spelled in self._known:
                return self._known[spelled]
        self._by_name += 1
        if len(shape) != 2 or not name.endswith(".weight"):
            return Role("no matrix of a linear layer")
        kept = _FULL_PRECISION_NAMES.search(name)
        return Role(f"its name says {kept[0].strip('.')}" if kept else None)


def model_of_folder(folder: Path) -> torch.nn.Module:
    """The model of a folder's config.json, without its memory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = getattr(transformers, config.architectures[0])
    if not issubclass(architecture, transformers.PreTrainedModel):
        raise ValueError(f"architectures: expected a model of transformers; got {architecture.__name__}")
    with torch.device("meta"):
        return architecture(config)


def _known_roles(model) -> dict[str, Role]:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    head = model.get_output_embeddings()
    roles = {}
    for module_name, module in model.named_modules():
        linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
        quantized = linear and should_convert_module(module_name, skipped)
        # Tied parameters have a role under each of their names.
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            if quantized and name == "weight":
                role = Role(None, transposed=isinstance(module, Conv1D))
            elif name == "bias":
                role = Role("bias")
            elif module is head:
                role = Role("output head")
            elif isinstance(module, torch.nn.Embedding):
                role = Role("embedding")
            elif "norm" in type(module).__name__.lower():
                role = Role("norm")
            else:
                role = Role("linear layer that transformers skips" if linear else "no linear layer")
            roles[f"{module_name}.{name}".removeprefix(".")] = role
    return roles
