"""Measures cases in a process of its own, so that a launch that brings the device down costs one row.

``run`` in the parent starts the process, hands on its events, and starts another behind the peer that died, hung or
left the device unusable. A process says its roof first, then the events of its cases.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import measure_case, one_line
from .cases import all_cases
from .measure import Meter

# What one peer may take at most: torch.compile of a large case on a slow host is the longest.
_PEER_LIMIT_S = 90.0
_START_LIMIT_S = 120.0


def _work(connection, device: str, size: float, plan: dict[str, tuple[str, ...]], need_roof: bool, deadline: float):
    seconds = 0.2 if size else 0.01
    meter = Meter(torch.device(device), dry=not size)
    connection.send(("roof", meter.roof(seconds) if need_roof else None))
    by_name = {case.name: case for case in all_cases(size)}
    for name, done in plan.items():
        if time.monotonic() >= deadline:
            break
        connection.send(("case", name))
        case, free = by_name[name], meter.free_bytes()
        if free is not None and case.working_bytes > free:
            needs = f"needs about {case.working_bytes / 1e9:.1f} GB on the device, {free / 1e9:.1f} GB are free"
            connection.send(("end", ("skipped", needs)))
            continue
        end = ("measured", None)
        try:
            for event in measure_case(case, meter, seconds, lambda: time.monotonic() >= deadline, done):
                connection.send(event)
                if event[0] == "row" and event[1]["outcome"] == "failed":
                    _end_if_unusable(meter)
        except Exception as error:
            end = ("failed", one_line(error))
        connection.send(("end", end))
        _end_if_unusable(meter)
        meter.release()
    connection.send(("done", None))


def _end_if_unusable(meter: Meter) -> None:
    """After a fault of a kernel no call of this process succeeds any more, and none of them is to blame."""
    try:
        meter.synchronize()
    except Exception:
        os._exit(3)


def run(
    device: str, size: float, names: list[str], deadline: float, say: Callable[[str, str | None, Any], None]
) -> None:
    """Measures the cases of these names, on that share of their rows, until ``deadline`` (of time.monotonic).

    ``say(kind, case, value)`` hears "roof" (a dict), "row" (a dict) and "end" ((outcome, reason)) of each case that
    was reached; the others are left unsaid.
    """
    plan: dict[str, tuple[str, ...]] = {name: () for name in names}
    have_roof = False
    while plan and time.monotonic() < deadline:
        progress = False
        case = peer = None
        for kind, value in _events(device, size, plan, not have_roof, deadline):
            if kind == "roof":
                if value is not None:
                    say(kind, None, value)
                have_roof = True
            elif kind == "case":
                case, peer = value, None
            elif kind == "peer":
                peer = value
            elif kind == "row":
                plan[case] += (value["peer"],)
                say(kind, case, value)
                peer, progress = None, True
            elif kind == "end":
                say(kind, case, value)
                plan.pop(case)
                case, progress = None, True
            elif kind == "done":
                return
            elif kind == "late":
                if peer is not None:
                    say("row", case, {"peer": peer, "outcome": "skipped", "reason": value})
                return
            elif peer is not None:
                plan[case] += (peer,)
                say("row", case, {"peer": peer, "outcome": "failed", "reason": value})
            elif case is None and not progress:
                for name in plan:
                    say("end", name, ("failed", f"no process could measure it: {value}"))
                return
            elif not progress:
                say("end", case, ("failed", value))
                plan.pop(case)


def _events(device: str, size: float, plan: dict, need_roof: bool, deadline: float) -> Iterator[tuple[str, Any]]:
    """The events of one process: its own, and "lost" with the reason where it died or hung, "late" at the deadline."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, device, size, dict(plan), need_roof, deadline), daemon=True)
    process.start()
    theirs.close()
    limit = _START_LIMIT_S
    try:
        while True:
            left = min(limit, deadline + 5 - time.monotonic())
            if not ours.poll(max(left, 0)):
                if time.monotonic() >= deadline:
                    yield "late", "the time was up while it ran"
                else:
                    yield "lost", f"took more than {limit:.0f} s"
                return
            event = ours.recv()
            limit = _PEER_LIMIT_S
            yield event
            if event[0] == "done":
                return
    except (EOFError, ConnectionError):
        process.join(5)
        yield "lost", f"its process ended with exit status {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()
