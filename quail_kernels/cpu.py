"""Between PyTorch's tensors on the CPU and the loops that numba compiles for them.

A tensor goes through the loops where a rule is written there, numba is installed, and it is large enough to be worth
the half second in which they are loaded (and, the first time on a machine, the half minute in which each is compiled).
Otherwise, and on any other device, the PyTorch references do the work; the bits are the same, but for the last of a
sum.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .formats import Format

LEAST_ELEMENTS = 1 << 17
_SPAN = 1 << 18  # of weights: a thread's work, short enough for threads to end together
_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@functools.cache
def _loops():
    try:
        from . import loops
    except ImportError:
        return None
    return loops


def loops_for(recipe: Format, w: torch.Tensor):
    """The module of the loops where they can and should take this tensor, else None."""
    if w.device.type != "cpu" or recipe.looks_at_tensor or w.numel() < max(LEAST_ELEMENTS, 1):
        return None
    loops = _loops()
    return loops if loops is not None and recipe.kind in loops.KINDS else None


def loops_for_rows(*tensors: torch.Tensor):
    """The same for tensors [batch, tokens, vocabulary], whose rows the loops take one by one."""
    for x in tensors:
        if x.device.type != "cpu" or x.numel() < max(LEAST_ELEMENTS, 1):
            return None
    loops = _loops()
    return loops if loops is not None and all(x.dtype in loops.MODES for x in tensors) else None


@functools.cache
def recipe_of(recipe: Format, dtype: torch.dtype):
    """The recipe as the loops want it."""
    loops = _loops()

    def floats(numbers) -> np.ndarray:
        return np.array([number for number in numbers if not isinstance(number, str)], np.float32)

    def integers(numbers) -> np.ndarray:
        return np.array(numbers, np.uint32)

    return loops.Recipe(
        kind=loops.KINDS.index(recipe.kind),
        mode=loops.MODES[dtype],
        size=recipe.group_size,
        rule=floats(recipe.kernel_rule(dtype)),
        thresholds=floats(recipe.thresholds),
        levels=floats(recipe.levels),
        inverse_widths=floats(recipe.inverse_widths),
        buckets=integers(recipe.buckets),
        codes=integers(recipe.codes),
        ranks=integers(np.argsort(recipe.codes)),
        pad_code=recipe.pad_code,
        is_uniform=not recipe.widths,
        is_plain=recipe.kind != "q4_0" and recipe.buckets == tuple(range(16)),
    )


def bits_of(w: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's memory, flat, as unsigned integers."""
    signed, unsigned = _BITS[w.element_size()]
    return w.detach().view(-1).view(signed).numpy().view(unsigned)


def rows_of(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[batch, tokens, vocabulary] as its memory, from the first element to the last, and where each row starts.

    Rows that are not contiguous are copied.
    """
    if x.stride(2) != 1:
        x = x.contiguous()
    batch, tokens, vocab = x.shape
    starts = np.arange(batch)[:, None] * x.stride(0) + np.arange(tokens) * x.stride(1)
    return bits_of(x.detach().as_strided((int(starts[-1, -1]) + vocab,), (1,))), starts.reshape(-1)


def nothing_found(groups: int = 0, sizes: int = 0, first_size: int = 0):
    """What ``loops.compare`` adds to, before it has; counts by group of that many, and |dw| in so many bins."""
    return _loops().Found(
        counts=np.zeros(4, np.int64),
        same_value=np.zeros(2, np.int64),
        distances=np.zeros((2, 16), np.int64),
        sizes=np.zeros(sizes, np.int64),
        first_size=first_size,
        sums=np.zeros(5),
        largest=np.zeros(1, np.uint32),
        group_same=np.zeros(groups, np.int64),
    )


def spans_of(n: int, unit: int) -> list[slice]:
    """n elements in pieces of whole units: the same ones whatever the number of threads."""
    stride = max(_SPAN // unit, 1) * unit
    return [slice(start, min(start + stride, n)) for start in range(0, n, stride)]


def in_threads(work: Callable[[slice], object], spans: list[slice]) -> list:
    """What ``work`` gives for each span, in their order; by as many threads as PyTorch has."""
    threads = min(torch.get_num_threads(), len(spans))
    if threads <= 1:
        return [work(span) for span in spans]
    # Threads that outlive the call would not outlive a fork, and a child would wait for them.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, spans))
