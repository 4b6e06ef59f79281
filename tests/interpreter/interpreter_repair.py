"""Repairs of Triton's interpreter (3.6 to 3.9), without which it cannot be believed.

bf16: it stores bf16 as uint16. Its casts from fp32 truncate, where hardware rounds to nearest even, and its
arithmetic works on the bit patterns. Here casts round, tl.dot multiplies in fp32, and any other arithmetic in
bf16 raises: kernels compute in fp32.

fp32: its tl.fma rounds the product, too, where hardware rounds once. tl.maximum and tl.minimum give NaN where either
operand is, before 3.9, where hardware gives the other one unless told to propagate NaN. A tl.reduce by a function of
the kernel's own calls it once an element; here once a halving of the axis, in which order is as free as on a GPU.

Bounds: it reads and writes any address, which is a segmentation fault at best. Here every access must lie
inside the memory of a tensor that the launch was given.

Hints: it ignores tl.multiple_of, which the compiler believes. Here a hint that is wrong raises.

Traffic: inside ``with traffic() as launches`` every launch notes how often it loaded and stored each element.
"""

import contextlib

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton import knobs

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def _is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _to_fp32(handle):
    if not _is_bf16(handle.dtype):
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << np.uint32(16)
    return _Handle(bits.view(np.float32), tl.float32)


def _round_to_bf16(handle):
    x = np.asarray(handle.data, dtype=np.float32)
    bits = x.view(np.uint32)
    # Adding half of the last kept place, less one unless that place is odd, carries just when rounding is up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return _Handle(np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16), tl.bfloat16)


def _repair_bf16() -> None:
    cast, binary, unary, dot = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op, _Builder.create_dot
    fp_to_fp = _Builder.create_fp_to_fp

    def repaired_cast(self, src, dst_type):
        if _is_bf16(src.dtype) == _is_bf16(dst_type):
            return cast(self, src, dst_type)
        if _is_bf16(src.dtype):
            return cast(self, _to_fp32(src), dst_type)
        return _round_to_bf16(cast(self, src, tl.float32))

    def repaired_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bf16(src.dtype) or _is_bf16(dst_type):
            return repaired_cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def no_bf16(op):
        def checked(self, *args):
            if any(isinstance(arg, _Handle) and _is_bf16(arg.dtype) for arg in args):
                raise TypeError("arithmetic in bf16: cast to fp32 right after the load")
            return op(self, *args)

        return checked

    _Builder.cast_impl = repaired_cast
    _Builder.create_fp_to_fp = repaired_fp_to_fp
    _Builder.binary_op = no_bf16(binary)
    _Builder.unary_op = no_bf16(unary)
    _Builder.create_dot = lambda self, a, b, *rest: dot(self, _to_fp32(a), _to_fp32(b), *rest)


def _fma(x, y, z):
    x, y, z = (np.asarray(handle.data) for handle in (x, y, z))
    if x.dtype != np.float32:
        raise TypeError(f"tl.fma: expected float32; got {x.dtype}")
    z = z.astype(np.float64)
    product = x.astype(np.float64) * y  # of 48 bits, so exact
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    # Of the two neighbours of an inexact sum the odd one: rounded to fp32 it is the exact sum rounded once.
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    total = np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return _Handle(total.astype(np.float32), tl.float32)


def _repair_fp32() -> None:
    _Builder.create_fma = lambda self, x, y, z: _fma(x, y, z)
    _Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    _Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    generic_reduce = interpreter.ReduceOps.generic_reduce

    def by_halves(self, inputs):
        if len(inputs) != 1 or self.axis is None:
            return generic_reduce(self, inputs)
        (value,) = inputs
        data, dtype = value.handle.data, value.dtype
        while data.shape[self.axis] > 1:
            first, second = np.split(data, 2, axis=self.axis)
            data = self.combine_fn.fn(self.to_tensor(first, dtype), self.to_tensor(second, dtype)).handle.data
        return [self.to_tensor(data if self.keep_dims else data.squeeze(self.axis), dtype)]

    interpreter.ReduceOps.generic_reduce = by_halves


def _check_hints() -> None:
    set_attr = _Handle.set_attr

    def checked(self, key, value):
        if key == "tt.divisibility":
            numbers = np.asarray(self.data)
            if any((numbers % numbers.dtype.type(step)).any() for step in value):
                raise ValueError(f"tl.multiple_of: expected multiples of {value}; got {numbers}")
        return set_attr(self, key, value)

    _Handle.set_attr = checked


class Launch:
    """How often one launch read and wrote each element of its tensors; lanes that a mask switches off do not count.

    Arguments that share memory share their counts: those of a kernel that works in place are of both.
    """

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]):
        self.kernel = kernel
        self.tensors = tensors
        storages = {t.untyped_storage().data_ptr(): t for t in tensors.values()}
        counts = {start: np.zeros((2, t.untyped_storage().nbytes()), np.int32) for start, t in storages.items()}
        self._spans = [(start, t.untyped_storage().nbytes(), counts[start]) for start, t in storages.items()]
        self._counts = counts

    def count(self, what: int, pointers: np.ndarray, size: int) -> None:
        for start, nbytes, counts in self._spans:
            inside = pointers[(pointers >= start) & (pointers < start + nbytes)].astype(np.int64) - start
            for byte in range(size):
                np.add.at(counts[what], inside + byte, 1)

    def _of(self, name: str, what: int) -> torch.Tensor:
        tensor = self.tensors[name]
        counts = torch.from_numpy(self._counts[tensor.untyped_storage().data_ptr()][what])
        per_element = counts.view(-1, tensor.element_size())
        assert (per_element == per_element[:, :1]).all(), "an access that straddles elements"
        return per_element[:, 0].contiguous().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def reads(self, name: str) -> torch.Tensor:
        """In the shape of the argument ``name``, how often each element was loaded."""
        return self._of(name, 0)

    def writes(self, name: str) -> torch.Tensor:
        return self._of(name, 1)

    def bytes_read(self, *names: str) -> int:
        """Over the whole memory of these arguments, the elements outside a view included."""
        return self._bytes(0, names)

    def bytes_written(self, *names: str) -> int:
        return self._bytes(1, names)

    def _bytes(self, what: int, names: tuple[str, ...]) -> int:
        starts = {self.tensors[name].untyped_storage().data_ptr() for name in names}
        return sum(int(self._counts[start][what].sum(dtype=np.int64)) for start in starts)


class _BoundsChecked:
    """The interpreter's memory, limited to the tensors of the running launch."""

    def __init__(self, memory):
        self._memory = memory
        self.ranges = []
        self.launches = None

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def _check(self, what, pointers, mask, size):
        pointers, mask = np.broadcast_arrays(pointers, mask)
        pointers = pointers[mask.astype(bool)]
        inside = np.zeros(pointers.shape, dtype=bool)
        for low, high in self.ranges:
            inside |= (pointers >= low) & (pointers + size <= high)
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            raise IndexError(f"{what} out of bounds in {(~inside).sum()} lanes of program {program}")
        if self.launches:
            if what != "store":
                self.launches[-1].count(0, pointers, size)
            if what != "load":
                self.launches[-1].count(1, pointers, size)

    def load(self, pointers, mask, other, dtype):
        mask = mask.astype(bool)  # 3.9 makes int32 of a mask and a scalar condition, and then refuses it
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        mask = mask.astype(bool)
        self._check("store", pointers, mask, value.dtype.itemsize)
        return self._memory.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        self._check("atomic", pointers, mask, value.dtype.itemsize)
        return self._memory.atomic_rmw(op, pointers, value, mask, sem)


def _check_bounds() -> None:
    memory = _BoundsChecked(interpreter._interpreter)
    init_args = interpreter.GridExecutor._init_args_hst

    def recording(self, args, kwargs):
        args, kwargs = init_args(self, args, kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: getattr(arg, "base", arg) for name, arg in named.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "untyped_storage")}
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        memory.ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        if memory.launches is not None:
            memory.launches.append(Launch(self.fn.__name__, tensors))
        return args, kwargs

    interpreter.GridExecutor._init_args_hst = recording
    interpreter._interpreter = memory


@contextlib.contextmanager
def traffic():
    """Yields a list, to which every kernel launched inside adds its Launch."""
    memory = interpreter._interpreter
    memory.launches = []
    try:
        yield memory.launches
    finally:
        memory.launches = None


def install() -> None:
    # Otherwise every exception comes out as the text of an InterpreterError.
    knobs.compilation.front_end_debugging = True
    _repair_bf16()
    _repair_fp32()
    _check_bounds()
    _check_hints()
