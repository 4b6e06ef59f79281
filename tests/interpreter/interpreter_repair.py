"""Repairs of Triton's interpreter (3.6 to 3.9), without which it cannot be believed.

bf16: it stores bf16 as uint16. Its casts from fp32 truncate, where hardware rounds to nearest even, and its
arithmetic works on the bit patterns. Here casts round, tl.dot multiplies in fp32, and any other arithmetic in
bf16 raises: kernels compute in fp32.

Bounds: it reads and writes any address, which is a segmentation fault at best. Here every access must lie
inside the memory of a tensor that the launch was given.
"""

import numpy as np
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


class _BoundsChecked:
    """The interpreter's memory, limited to the tensors of the running launch."""

    def __init__(self, memory):
        self._memory = memory
        self.ranges = []

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

    def load(self, pointers, mask, other, dtype):
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
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
        tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
        storages = [tensor.untyped_storage() for tensor in tensors if hasattr(tensor, "untyped_storage")]
        memory.ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return args, kwargs

    interpreter.GridExecutor._init_args_hst = recording
    interpreter._interpreter = memory


def install() -> None:
    # Otherwise every exception comes out as the text of an InterpreterError.
    knobs.compilation.front_end_debugging = True
    _repair_bf16()
    _check_bounds()
