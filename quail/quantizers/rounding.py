"""Round-to-nearest with any recipe of ``quail_kernels``: the weights become the recipe's values, in their own dtype."""

import os

import torch
from transformers import PreTrainedModel

from quail_kernels import fake_quant, get_format
from quail_kernels.formats import check_shape

from .loading import load, matrix, quantized_layers, set_matrix, shape_of

PREFIX = "rtn:"


def parse(quantizer: str) -> str:
    """The recipe's name in ``rtn:ct-int4-sym@64``. Raises ValueError."""
    format = quantizer.removeprefix(PREFIX)
    try:
        get_format(format)
    except ValueError as error:
        reason = str(error).partition(": ")[2]
        raise ValueError(f"quantizer: after {PREFIX} {reason}") from None
    return format


def deploy(checkpoint: str | os.PathLike, quantizer: str, dtype: torch.dtype, auto, config):
    """The checkpoint with its linear layers' weights rounded, in ``dtype``. Raises ValueError."""
    format = parse(quantizer)
    model: PreTrainedModel = load(checkpoint, dtype, auto)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        check_shape(f"{quantizer}: {name}", torch.Size(shape_of(layer)), get_format(format))
    for layer in layers.values():
        set_matrix(layer, fake_quant(matrix(layer), format))
    return model
