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

__all__ = ["tl", "triton"]
