"""int4 and int8 weights by torchao, through transformers; activations stay in 16 bits.

int4: asymmetric with a scale and a floating-point zero point a group along in_features, in the layout of PyTorch's
own matrix product (tinygemm): for CPUs that is in torchao's prototype, whose groups are of 32, 64 or 128. Its default
of 128 leaves a layer that 128 does not divide as it is, without a word; here it is refused. int8: symmetric, a scale a
row.
"""

import os

import torch
from transformers import PretrainedConfig, PreTrainedModel, TorchAoConfig

from ..models import default_device
from .loading import load, quantized_layers, require_multiples, skeleton, skip_list

NAMES = ("torchao-int4", "torchao-int8")
GROUPS, DEFAULT_GROUP = (32, 64, 128), 64


def parse(quantizer: str) -> tuple[str, int]:
    """(name, group size) of ``torchao-int4@128``. Raises ValueError."""
    name, at, group = quantizer.partition("@")
    if at and (name != "torchao-int4" or group not in map(str, GROUPS)):
        groups = ", ".join(f"torchao-int4@{size}" for size in GROUPS)
        raise ValueError(f"quantizer: expected {groups}; got {quantizer!r}")
    return name, int(group) if at else DEFAULT_GROUP


def deploy(checkpoint: str | os.PathLike, quantizer: str, dtype: torch.dtype, auto, config: PretrainedConfig):
    """The checkpoint with its linear layers quantized as it is loaded. Raises ValueError."""
    name, group = parse(quantizer)
    plain = skeleton(config, auto)
    layers = quantized_layers(plain)
    if name == "torchao-int4":
        require_multiples(quantizer, layers, group, "in_features", "the group")
    try:
        recipe = _int8() if name == "torchao-int8" else _int4(group)
    except ImportError as error:
        raise ValueError(f"{quantizer}: expected the library torchao (pip install torchao); got {error}") from None
    options = TorchAoConfig(recipe, modules_to_not_convert=skip_list(plain))
    model: PreTrainedModel = load(checkpoint, dtype, auto, quantization_config=options)
    left = [layer for layer in layers if type(model.get_submodule(layer).weight) is torch.nn.Parameter]
    if left:
        raise ValueError(f"{quantizer}: expected all {len(layers)} layers quantized; got {left[0]} as it was")
    return model


def _int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4(group: int):
    if default_device().type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    # The layout whose scales are chosen as on CPUs.
    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
