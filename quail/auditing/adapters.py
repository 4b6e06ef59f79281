r"""A PEFT adapter as AFTER: LoRA and DoRA merged into BEFORE's weights block by block, as they are read.

With A [r, in] and B [out, r] of the adapter, W [out, in] of the base and T its dtype (Hu et al.,
https://arxiv.org/abs/2106.09685; Kalajdzievski, https://arxiv.org/abs/2312.03732 for the scaling with sqrt(r); Liu
et al., https://arxiv.org/abs/2402.09353 for DoRA, with m its magnitudes and norms along the rows):

    dW = (alpha / r) B A          or (alpha / sqrt(r)) B A
    LoRA: W' = T(W + dW)          DoRA: W' = T(m / ||W + dW|| (W + dW))

It is what ``merge_and_unload`` of PEFT makes, without the model: its sum is in fp32, since PEFT loads an adapter in
fp32. What an adapter replaces as a whole (modules_to_save, biases) is taken as it is.
"""

import json
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import Checkpoint, Stored, Transposed, one_line, read_safetensors, some

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PARTS = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)$")
# What changes the merge, or the base weights, in a way that is not the above.
_NOT_MERGED = ("use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "target_parameters")
_NOT_MERGED += ("trainable_token_indices", "lora_bias", "arrow_config", "velora_config", "monteclora_config")
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga")


@dataclass(frozen=True)
class Merged(Stored):
    """A weight of the base with an adapter's update in it; its rows are output features."""

    base: Stored
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        # DoRA's norms run along whole rows.
        base = self.base.read(rows)
        whole = base.float() + self.up[rows] @ self.down * self.scaling
        if self.magnitude is not None:
            whole *= (self.magnitude[rows] / torch.linalg.vector_norm(whole, dim=1))[:, None]
        block = whole.to(base.dtype)[:, columns].contiguous()
        return block.pin_memory() if pinned else block


def open_adapter(side: str, folder: Path, base: Checkpoint, resources: ExitStack) -> Checkpoint:
    """The adapter of a folder merged into ``base``.

    Raises:
        ValueError: on an adapter that is damaged, no LoRA or DoRA, of another model, or of a kind that is not merged
            here.
    """
    config = _config(side, folder)
    tensors = {}
    for name, stored in read_safetensors(side, folder / ADAPTER, resources).items():
        tensors[name.removeprefix(_PREFIX).replace(".base_layer.", ".")] = stored
    parts: dict[str, dict[str, Stored]] = {}
    merged = dict(base.tensors)
    for name, stored in tensors.items():
        if match := _PARTS.search(name):
            parts.setdefault(name[: match.start()], {})[match[1]] = stored
        elif name in base.tensors:
            merged[name] = stored
        else:
            raise ValueError(f"{side}: expected an adapter of BEFORE, LoRA or DoRA; got the tensor {name}")
    if missing := [f"{module}.weight" for module in parts if f"{module}.weight" not in base.tensors]:
        raise ValueError(f"{side}: expected an adapter of BEFORE; got one for {some(missing)}, which BEFORE has not")
    for module, of_module in parts.items():
        name = f"{module}.weight"
        # Where the adapter brings the base weight along, it is that one which is updated.
        merged[name] = _merge(side, name, merged[name], of_module, _alpha(config, module), config)
    files = (*base.files, folder / ADAPTER, folder / ADAPTER_CONFIG)
    return Checkpoint(side, base.build, merged, files, base.set_aside)


def _config(side: str, folder: Path) -> dict:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{side}: expected a readable {ADAPTER_CONFIG}; got {one_line(error)}") from error
    if kind != "LORA":
        raise ValueError(f"{side}: expected a LoRA or DoRA adapter; got peft_type {kind}")
    if asked := [name for name in _NOT_MERGED if config.get(name)]:
        raise ValueError(f"{side}: expected an adapter without {asked[0]}: merge it with PEFT first; got it set")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        # PiSSA, OLoRA, LoftQ and CorDA take their start out of the base weights.
        raise ValueError(
            f"{side}: expected an adapter to the base weights as they are: merge it with PEFT first; "
            f"got init_lora_weights {start!r}"
        )
    return config


def _alpha(config: dict, module: str) -> float:
    """``lora_alpha``, or what ``alpha_pattern`` has for the module: keys are regular expressions for its end."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return config["lora_alpha"]


def _merge(side: str, name: str, base: Stored, parts: dict[str, Stored], alpha: float, config: dict) -> Stored:
    embedding = "lora_embedding_A" in parts
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if not all(end in parts for end in ends):
        raise ValueError(f"{side}: expected {' and '.join(ends)} for {name}; got {', '.join(sorted(parts))}")
    down, up = (parts[end].read(slice(None)).float() for end in ends)
    magnitude = parts.get("lora_magnitude_vector")
    scaling = alpha / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
    if embedding:
        # An embedding is [tokens, features], and its adapter the transpose of a linear layer's.
        if magnitude is not None:
            raise ValueError(f"{side}: expected no DoRA on an embedding: merge it with PEFT first; got {name}")
        down, up = up.t().contiguous(), down.t().contiguous()
    expected = (len(up), down.shape[1])
    # Conv1D stores a linear layer's weight as [in, out]; where both are equal the adapter's config has to tell.
    turned = not embedding and base.shape == expected[::-1] and (base.shape != expected or config["fan_in_fan_out"])
    if turned:
        base = Transposed.of(base)
    if len(base.shape) != 2 or base.shape != expected or base.dtype is None:
        raise ValueError(f"{side}: expected {name} of the adapter's shape, {list(expected)}; got {list(base.shape)}")
    if magnitude is not None:
        magnitude = magnitude.read(slice(None)).float().view(-1)
        if len(magnitude) != len(up):
            raise ValueError(f"{side}: expected {len(up)} magnitudes for {name}; got {len(magnitude)}")
    whole = Merged(name, base.shape, base.dtype, base.dtype_on_disk, base, down, up, scaling, magnitude)
    return Transposed.of(whole) if turned else whole
