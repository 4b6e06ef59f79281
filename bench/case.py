"""What a case is, and how one peer of it is measured.

A peer is built on the inputs and gives a function of no arguments. Its first answer is checked, so that a wrong
one has no speed; only then is it timed.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from .measure import Meter

Peer = Callable[[tuple, str], Callable[[], Any]]


class Absent(Exception):
    """The library that a peer needs is not installed."""


@dataclass(frozen=True)
class Check:
    """``max_error`` and ``differ_per_million`` of an answer, in the unit that the case's op states."""

    max_error: float
    differ_per_million: float
    passed: bool


@dataclass(frozen=True)
class Case:
    """One op on one shape, and everything that can compute it.

    ``inputs(device)`` gives the tensors. ``peers`` are built by name with (inputs, backend of torch.compile).
    ``expected(inputs)`` gives the answer that ``check(inputs, expected, answer, peer)`` judges by.
    ``useful_bytes``: each input read once and each output written once, whatever a peer moves in truth.
    ``working_bytes``: what has to be free for the inputs, the check and the hungriest peer.
    """

    op: str
    variant: str
    model: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    useful_bytes: int
    working_bytes: int
    inputs: Callable[[torch.device], tuple]
    peers: dict[str, Peer]
    expected: Callable[[tuple], Any]
    check: Callable[[tuple, Any, Any, str], Check]
    headline: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant} {self.model} {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(fn: Callable) -> Peer:
    return lambda inputs, backend: partial(fn, *inputs)


def compiled(fn: Callable) -> Peer:
    return lambda inputs, backend: partial(torch.compile(fn, backend=backend, dynamic=False), *inputs)


def needs(module: str, fn: Callable) -> Peer:
    """``fn(module, *inputs)`` where the module is installed."""

    def build(inputs: tuple, backend: str) -> Callable[[], Any]:
        return partial(fn, import_peer(module), *inputs)

    return build


def import_peer(module: str) -> Any:
    # torchao tells of its GPU libraries and of its enums where they are not to its liking.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{module.partition('.')[0]} cannot be imported: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def measure_peer(case: Case, peer: str, inputs: tuple, expected: Any, meter: Meter, seconds: float) -> dict:
    """The row of one peer: ``outcome`` is measured, absent, check failed, out of memory or failed."""
    row = {"peer": peer, "outcome": "measured", "reason": None}
    try:
        began = perf_counter()
        call = case.peers[peer](inputs, meter.compile_backend)
        answer = call()
        meter.synchronize()
        row["first_call_s"] = perf_counter() - began
        check = case.check(inputs, expected, answer, peer)
        del answer
        row |= {"max_error": check.max_error, "differ_per_million": check.differ_per_million}
        if not check.passed:
            said = f"largest error {check.max_error:.3g}, {check.differ_per_million:.0f} of a million differ"
            return row | {"outcome": "check failed", "reason": said}
        return row | meter.time(call, seconds) | {"peak_extra_bytes": meter.peak_extra_bytes(call)}
    except Absent as error:
        return row | {"outcome": "absent", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        return row | {"outcome": "out of memory", "reason": one_line(error)}
    except Exception as error:  # a peer's own failure is a row, and the next peer is measured
        return row | {"outcome": "failed", "reason": one_line(error)}


def measure_case(
    case: Case, meter: Meter, seconds: float, out_of_time: Callable[[], bool], done: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Events of one case: ("peer", name) before each peer and ("row", row) after it.

    Ends early, with the remaining peers unsaid, where ``out_of_time()``. ``done`` names peers to leave out.
    """
    # The inputs belong to the first peer that is run: if they bring the process down, it is named.
    inputs = expected = None
    for peer in case.peers:
        if peer in done:
            continue
        if out_of_time():
            return
        yield "peer", peer
        if inputs is None:
            try:
                inputs = case.inputs(meter.device)
                expected = case.expected(inputs)
            except Absent as error:
                yield "row", {"peer": peer, "outcome": "absent", "reason": str(error)}
                continue
        yield "row", measure_peer(case, peer, inputs, expected, meter, seconds)
    torch.compiler.reset()
