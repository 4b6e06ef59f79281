"""Triton where it is installed, and where it is not, just enough of it for the kernels to be defined.

A machine without Triton runs the PyTorch references only; its kernels are plain functions, never called.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda fn: fn, constexpr_function=lambda fn: fn)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["abs_bits", "larger", "largest", "shifted", "smallest", "tl", "triton", "unshifted"]

_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def abs_bits(x):
    """|x| as an integer of the same order, where NaN is above infinity: a maximum over it loses no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x):
    """The largest element of each group of [parts, groups, part_size], [1, groups, 1]; NaN where one is."""
    return tl.reduce(tl.reduce(x, 0, larger, keep_dims=True), 2, larger, keep_dims=True)


@triton.jit
def smallest(x):
    return tl.reduce(tl.reduce(x, 0, _smaller, keep_dims=True), 2, _smaller, keep_dims=True)


@triton.jit
def shifted(x):
    """x + 1.5 * 2^23: rounded half to even to a whole number, exact for |x| < 2^22, of the same order beyond.

    Triton has no portable rint. Whole numbers of that size differ by what their bits differ by, as integers do.
    """
    return x + _SHIFT


@triton.jit
def unshifted(x):
    return x - _SHIFT
