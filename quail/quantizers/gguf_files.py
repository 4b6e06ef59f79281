"""Q4_0 and MXFP4 by llama.cpp's Python package gguf: the weights go into a .gguf file and come back from it.

The model runs in transformers with the values that the file holds, so that any metric can be taken. llama.cpp itself
computes otherwise (it quantizes activations to 8 bits in blocks of 32), has no Python build that installs without a
compiler, and would take tokenizer and decoding out of the comparison; its ``llama-quantize`` also quantizes the
embedding and the head, which stay here as everywhere in this folder.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .loading import load, matrix, quantized_layers, require_multiples, set_matrix

TYPES = {"gguf-q4_0": "Q4_0", "gguf-mxfp4": "MXFP4"}
NAMES = tuple(TYPES)
_BLOCK = 32


def deploy(checkpoint: str | os.PathLike, quantizer: str, dtype: torch.dtype, auto, config: PretrainedConfig):
    """The checkpoint with the values of its linear layers as a GGUF file has them, rounded to ``dtype``."""
    try:
        import gguf  # noqa: F401 - asked before anything is loaded
    except ImportError as error:
        raise ValueError(f"{quantizer}: expected the library gguf (pip install gguf); got {error}") from None
    model: PreTrainedModel = load(checkpoint, dtype, auto)
    layers = quantized_layers(model)
    require_multiples(quantizer, layers, _BLOCK, "in_features", "the block")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "linear-layers.gguf"
        write(file, {name: matrix(layer) for name, layer in layers.items()}, quantizer, config.model_type)
        for name, values in read(file):
            set_matrix(layers[name], values)
    return model


def write(file: Path, weights: Mapping[str, torch.Tensor], quantizer: str, architecture: str) -> None:
    """A GGUF file of these matrices, each [out_features, in_features], of ``TYPES[quantizer]``."""
    import gguf

    kind = gguf.GGMLQuantizationType[TYPES[quantizer]]
    writer = gguf.GGUFWriter(file, architecture)
    for name, weight in weights.items():
        writer.add_tensor(name, gguf.quantize(weight.float().cpu().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and the dequantized values of a GGUF file's tensors, fp32."""
    import gguf

    for tensor in gguf.GGUFReader(file).tensors:
        yield tensor.name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
