"""Triton where it is installed, and where it is not, just enough of it for the kernels to be defined.

A machine without Triton runs the PyTorch references only; its kernels are plain functions, never called.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["abs_bits", "round_half_to_even", "tl", "triton"]


@triton.jit
def abs_bits(x):
    """|x| as an integer of the same order, where NaN is above infinity: a maximum over it loses no NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_half_to_even(x):
    """fp32 to a whole number, exact for |x| < 2^22: Triton has no portable rint.

    Adding 1.5 * 2^23 leaves no bits below 1, rounded half to even.
    """
    return (x + 12582912.0) - 12582912.0
