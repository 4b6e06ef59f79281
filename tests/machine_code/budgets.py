"""Measures every case for every target and compares it with what budgets.json allows.

    python tests/machine_code/budgets.py                      what is over its budget
    python tests/machine_code/budgets.py --write [REGEX]      every figure as the new budget: review the diff
    python tests/machine_code/budgets.py --table [REGEX]      the cases of these names for sm_90

``registers`` and ``bits`` (the narrowest access in bulk) stand for each of TARGETS in turn. ``instructions`` are those
that a thread issues for one element on sm_90, and ``bound`` says what that means on an H100 SXM. Its data sheet gives
132 multiprocessors and 3.35 TB/s. Each issues 4 warp instructions a cycle. At 1.755 GHz (51.2 TFLOPS / (114
multiprocessors x 128 lanes x 2) of the card for PCIe; 1.98 GHz, from this one's 66.9 TFLOPS, would allow 13 % more)
that makes

    132 * 4 * 32 * 1.755e9 / 3.35e12 = 8.85 instructions of a thread for a byte moved.

``faults`` are the rules that a case breaks and is known to break; any other one fails the test.
``faults_of_other_tritons``, by version, is written by hand.

``issue`` is the time for the instructions by the time for the bytes: above 1 the kernel is bound by instructions.
``pipes`` is the same for the pipe that is busiest (``Work`` in compile_kernel.py): compares and selects, for one, are
done at half the rate. Both leave out latencies, so they are a floor and no forecast.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from cases import CASES, Case
from compile_kernel import TARGETS, Code, compile_launch, count_work, note_launch

BUDGETS = Path(__file__).with_name("budgets.json")
INSTRUCTIONS_PER_BYTE = 132 * 4 * 32 * 1.755e9 / 3.35e12


def pinned() -> bool:
    """Whether this is the triton that the budgets were written with: another version's figures are its own."""
    return triton.__version__ == _read()["triton"]


def new_faults(figures: dict) -> list[str]:
    """The rules that the machine code breaks, without those that budgets.json admits to."""
    known = [*_read()["faults"], *_read()["faults_of_other_tritons"].get(triton.__version__, [])]
    return [fault for fault in figures["faults"] if fault not in known]


def stale() -> list[str]:
    """What budgets.json has of cases that are no more."""
    return [name for name in _read()["cases"] if name not in CASES]


@functools.cache
def _read() -> dict:
    return json.loads(BUDGETS.read_text())


def _access_bits(by_bits: dict[int, int]) -> int:
    """The narrowest access that moves a quarter of the bytes or more; below that it is an edge or a single element."""
    return min(bits for bits, moved in by_bits.items() if 4 * moved >= sum(by_bits.values()))


def measure(name: str, targets: tuple[str, ...], count: bool) -> dict:
    """The figures of a case, and in ``faults`` every rule that its machine code breaks, a line each.

    ``count`` asks for the instructions on sm_90, too: disassembling takes longer than compiling.
    """
    case = CASES[name]
    launch = note_launch(case.module, case.kernel, case.call)
    figures = {"registers": [], "bits": [], "faults": []}
    for target in targets:
        code = compile_launch(launch, target)
        bulk = [code.loads.get(pointer, {0: 0}) for pointer in case.loads]
        bulk += [code.stores.get(pointer, {0: 0}) for pointer in case.stores]
        widths = {}
        for pointer, accesses in zip([*case.loads, *case.stores], bulk, strict=True):
            widths[pointer] = min(_access_bits(accesses), widths.get(pointer, 128))
        figures["registers"].append(code.registers)
        figures["bits"].append(min(widths.values(), default=128))
        figures["faults"] += [f"{name} on {target}: {fault}" for fault in _faults(case, launch, code, widths)]
        if target == "sm_90" and count:
            figures |= _work(case, launch, code)
    return figures


def _faults(case: Case, launch, code: Code, widths: dict[str, int]) -> list[str]:
    faults = []
    if code.spilled:
        faults.append(f"{code.spilled} bytes of registers spilled, expected 0")
    if code.resident < case.warps:
        faults.append(f"{code.resident} resident warps, expected {case.warps} ({code.registers} registers)")
    if code.atomics:
        faults.append("atomic operations, expected sums in a fixed order")
    share = case.lanes(launch.arguments) // code.threads
    for pointer, bits in widths.items():
        size = (case.loads | case.stores)[pointer]
        expected = min(128, int(8 * size * share))
        if bits < expected and pointer not in case.narrow:
            faults.append(f"{pointer} accessed by {bits} bits, expected {expected}")
    if case.decides_codes:
        if code.inexact:
            faults.append(f"inexact {', '.join(code.inexact)}, expected the exact operation")
        # What lies in parts beyond a group's end is no weight; the compiler may leave it out, or, where it takes
        # two at a time, some of it.
        fewest, most = (
            case.fused * lanes // code.threads for lanes in (_lanes_in_use(launch), case.lanes(launch.arguments))
        )
        if code.fused[0] > most or code.fused[1] < fewest:
            counted = " to ".join(map(str, sorted(set(code.fused))))
            faults.append(f"{counted} fused multiply-adds, expected {fewest} to {most}")
        if code.flushed:
            faults.append("subnormal numbers flushed to zero: a scale may be one")
    if case.half_even and code.cubin and "0f4B400000" not in code.text:
        faults.append("1.5 * 2^23 is not added: the rounding was folded away")
    return faults


def _lanes_in_use(launch) -> int:
    arguments = launch.arguments
    part = arguments["BLOCK_SIZE"] // arguments["BLOCK_PARTS"]
    return arguments["BLOCK_GROUPS"] * part * -(-arguments["GROUP_SIZE"] // part)


def _work(case: Case, launch, code: Code) -> dict:
    elements = case.elements(launch.arguments)
    work = count_work(code.cubin, sum(case.loads.values()) * elements, code.threads)
    a_thread = code.threads / elements
    moved = case.passes * sum(case.loads.values()) + sum(case.stores.values())
    figures = {"instructions": round(work.issued * a_thread, 1)}
    if moved:
        allowed = moved * INSTRUCTIONS_PER_BYTE
        figures["issue"] = round(work.issued * a_thread / allowed, 2)
        figures["pipes"] = round(work.slots * a_thread / allowed, 2)
        figures["bound"] = "memory" if figures["issue"] <= 1 else "instructions"
    return figures


def measure_all(names: list[str], targets: tuple[str, ...], count: bool = True) -> dict[str, dict]:
    """``measure`` of many cases, over as many processes as there are processors."""
    # A fork would inherit OpenMP's threads, which are not there in the child, and wait for them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return dict(zip(names, pool.map(functools.partial(measure, targets=targets, count=count), names), strict=True))


def over_budget(name: str, figures: dict, targets: tuple[str, ...]) -> list[str]:
    """Every figure of the case that is worse than its budget, a line each."""
    budget = _read()["cases"].get(name)
    if budget is None:
        return [f"{name}: expected a budget in {BUDGETS.name}; run python tests/machine_code/budgets.py --write"]
    allowed = {key: dict(zip(TARGETS, budget[key], strict=True)) for key in ("registers", "bits")}
    over = []
    for target, registers, bits in zip(targets, figures["registers"], figures["bits"], strict=True):
        if registers > allowed["registers"][target]:
            over.append(f"{name} on {target}: {registers} registers, budget {allowed['registers'][target]}")
        if bits < allowed["bits"][target]:
            over.append(f"{name} on {target}: accesses of {bits} bits, budget {allowed['bits'][target]}")
    if figures.get("instructions", 0) > budget["instructions"]:
        figure = figures["instructions"]
        over.append(f"{name} on sm_90: {figure} instructions an element, budget {budget['instructions']}")
    return over


def _write(measured: dict[str, dict]) -> None:
    """What was not measured keeps its budget."""
    known = _read()
    kept = {name: known["cases"][name] for name in CASES if name in known["cases"]}
    faults_of = {name: [fault for fault in known["faults"] if fault.startswith(f"{name} on ")] for name in kept}
    kept = {name: figures | {"faults": faults_of[name]} for name, figures in kept.items()} | measured
    measured = {name: kept[name] for name in CASES if name in kept}
    rows = [
        f"  {json.dumps(name)}: {json.dumps({key: figures[key] for key in figures if key != 'faults'})}"
        for name, figures in measured.items()
    ]
    faults = [f"  {json.dumps(fault)}" for figures in measured.values() for fault in figures["faults"]]
    parts = (
        f' "triton": {json.dumps(triton.__version__)}',
        f' "targets": {json.dumps(list(TARGETS))}',
        ' "faults": [' + ",\n".join(["", *faults]).removeprefix(",") + "\n ]",
        f' "faults_of_other_tritons": {json.dumps(_read()["faults_of_other_tritons"])}',
        ' "cases": {\n' + ",\n".join(rows) + "\n }",
    )
    BUDGETS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _named(pattern: str) -> list[str]:
    return [name for name in CASES if re.search(pattern, name)]


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    of_these = {"nargs": "?", "const": "", "metavar": "REGEX"}
    parser.add_argument("--write", **of_these, help="every figure as the new budget")
    parser.add_argument("--table", **of_these, help="the figures for sm_90")
    options = parser.parse_args()
    if options.table is not None:
        for name, figures in measure_all(_named(options.table), ("sm_90",)).items():
            row = (figures["registers"][0], figures["bits"][0], figures["instructions"])
            time = (figures.get("issue", ""), figures.get("pipes", ""), figures.get("bound", ""))
            print(f"{name:48}", *(f"{cell:>6}" for cell in row + time), "; ".join(figures["faults"]))
        return 0
    measured = measure_all(_named(options.write or ""), tuple(TARGETS))
    if options.write is not None:
        _write(measured)
        return 0
    lines = [line for figures in measured.values() for line in new_faults(figures)]
    lines += [line for name, figures in measured.items() for line in over_budget(name, figures, tuple(TARGETS))]
    print("\n".join(lines) or f"{len(measured)} cases: nothing to report")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(_main())
