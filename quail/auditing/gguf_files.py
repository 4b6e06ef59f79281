"""GGUF files as a side: read by the gguf library, and named and laid out as transformers has them.

llama.cpp names tensors its own way, and stores the rows of some in another order. transformers knows both, for the
architectures that it loads; where it does not know one, its tensors keep their own names, and can be compared with
those of another GGUF file.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .checkpoints import Checkpoint, Stored, Transposed, one_line

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a tensor may take while transformers rearranges it as a whole.
_REARRANGED_BYTES = 1 << 28


@dataclass(frozen=True)
class GgufTensor(Stored):
    """``dtype`` of a quantized tensor is float32, as it is dequantized."""

    file: int
    path: str
    offset: int
    bytes: int
    order: np.ndarray | None
    quantization: object

    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        height, width = self.matrix_shape
        top, bottom, _ = rows.indices(height)
        wanted = np.arange(top, bottom) if self.order is None else self.order[top:bottom]
        first, last = (int(wanted.min()), int(wanted.max()) + 1) if len(wanted) else (0, 0)
        row_bytes = self.bytes // height
        data = np.empty((last - first, row_bytes), dtype=np.uint8)
        done, view = 0, memoryview(data).cast("B") if data.size else memoryview(b"")
        while done < len(view):
            count = os.preadv(self.file, [view[done:]], self.offset + first * row_bytes + done)
            if not count:
                raise ValueError(f"{self.path}: expected {self.name} whole; got a file that became shorter")
            done += count
        block = self._dequantized(data).view(-1, width)
        if self.order is not None:
            block = block[torch.from_numpy(wanted - first)]
        block = block[:, columns].contiguous()
        return block.pin_memory() if pinned else block

    def _dequantized(self, data: np.ndarray) -> torch.Tensor:
        if self.dtype_on_disk in _DTYPES:
            return torch.from_numpy(data).view(self.dtype)
        from gguf import dequantize

        return torch.from_numpy(dequantize(data, self.quantization))


@dataclass(frozen=True)
class Rearranged(Stored):
    """A tensor that transformers changes by more than the order of its rows: read as a whole."""

    stored: Stored
    process: object

    def read(self, rows: slice, columns: slice = slice(None), pinned: bool = False) -> torch.Tensor:
        whole = self.stored.read(slice(None)).float().numpy().reshape(self.stored.shape)
        block = torch.from_numpy(np.ascontiguousarray(self.process(whole))).view(self.matrix_shape)
        block = block[rows, columns].to(self.dtype).contiguous()
        return block.pin_memory() if pinned else block


def open_gguf(side: str, path: Path, resources: ExitStack) -> Checkpoint:
    """The tensors of a GGUF file, headers read; ``resources`` closes it.

    Raises:
        ValueError: on a file that is damaged, or where the gguf library is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{side}: expected the library gguf for {path.name} (pip install gguf); got none") from None
    try:
        reader = gguf.GGUFReader(path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # a damaged file makes the library fail in whichever way it is damaged
        raise ValueError(f"{side}: expected a readable {path.name}; got {one_line(error)}") from error
    file = resources.enter_context(path.open("rb", buffering=0)).fileno()
    model, names, process = _as_transformers_has_it(path, reader)
    tensors, set_aside = {}, {}
    for gguf_name, tensor in stored.items():
        name = names.get(gguf_name, gguf_name)
        on_disk = tensor.tensor_type.name
        # GGUF counts dimensions from the innermost.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if on_disk not in _DTYPES and not _can_dequantize(gguf, tensor.tensor_type):
            set_aside[name] = f"the gguf library does not dequantize {on_disk}"
            continue
        whole = GgufTensor(
            name=name,
            shape=shape,
            dtype=_DTYPES.get(on_disk, torch.float32),
            dtype_on_disk=on_disk,
            file=file,
            path=path.name,
            offset=int(tensor.data_offset),
            bytes=int(tensor.n_bytes),
            order=None,
            quantization=tensor.tensor_type,
        )
        rearranged = _rearranged(whole, gguf_name, process)
        if rearranged is None:
            set_aside[name] = "transformers rearranges it as a whole, and it is too large for that"
        else:
            tensors[name] = rearranged
    return Checkpoint(side, lambda: model, tensors, (path,), set_aside)


def _can_dequantize(gguf, quantization) -> bool:
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    try:
        return gguf.dequantize(np.zeros((1, size), dtype=np.uint8), quantization).size == block
    except NotImplementedError:
        return False


def _as_transformers_has_it(path: Path, reader):
    """(model on the meta device, GGUF's name: transformers' name, how a tensor is rearranged); (None, {}, None) for a
    model that it does not know."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as utils

    try:
        parsed = utils.load_gguf_checkpoint(path, return_tensors=False)
        config = transformers.AutoConfig.for_model(**parsed["config"])
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        architecture = reader.fields["general.architecture"]
        kind = utils.TENSOR_PROCESSORS.get(bytes(architecture.parts[architecture.data[0]]).decode())
        processor = (kind or utils.TensorProcessor)(config=parsed["config"])
        names = utils.get_gguf_hf_weights_map(model, processor)
    except Exception:  # a file may say anything of its model: what cannot be built keeps its own names
        return None, {}, None

    def process(weights: np.ndarray, name: str) -> np.ndarray:
        return processor.process(weights, name, tensor_key_mapping=names, parsed_parameters=parsed).weights

    return model, names, process


def _rearranged(whole: GgufTensor, gguf_name: str, process) -> Stored | None:
    """``whole`` as ``process`` would have it; None where that takes too much memory."""
    if process is None:
        return whole
    height, width = whole.matrix_shape
    if len(whole.shape) == 2 and width > 1:
        # What only moves rows shows by the numbers of rows: two columns, so that a transpose is not taken for that.
        numbers = np.repeat(np.arange(height, dtype=np.float64)[:, None], 2, axis=1)
        try:
            moved = process(numbers, gguf_name)
        except Exception:  # it may look at the true width
            moved = None
        if moved is not None and np.array_equal(moved, numbers.T):
            return Transposed.of(whole)
        if moved is not None and moved.shape == numbers.shape and np.array_equal(np.sort(moved, axis=0), numbers):
            if np.array_equal(moved, numbers):
                return whole
            return GgufTensor(**(vars(whole) | {"order": moved[:, 0].astype(np.int64)}))
    if whole.weights * 4 > _REARRANGED_BYTES:
        return None
    shape = np.shape(process(np.zeros(whole.shape, dtype=np.float32), gguf_name))
    label = whole.dtype_on_disk
    return Rearranged(whole.name, tuple(shape), whole.dtype, label, whole, lambda weights: process(weights, gguf_name))
