"""The file that a run writes, what is derived from its times, and the table that a terminal shows."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .case import Case, short
from .machine import ROOT

SCHEMA = 1
FOLDER = ROOT / "bench" / "results"
NOT_REACHED = "not reached yet"
_HEADER = (
    f"  {'peer':<15}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'GB/s':>8}{'%copy':>7}{'+MB':>8}{'xbest':>7}{'error':>9}"
)


class PathTaken(Exception):
    """The file is there already and was not to be replaced."""


def choose_path(card: str, started: str, force: bool) -> Path:
    """``<card>.json``, or with the start in the name where that is there already and ``force`` is not given."""
    path = FOLDER / f"{card}.json"
    if force or not path.exists():
        return path
    dated = FOLDER / f"{card}.{started.replace(':', '').replace('-', '')}.json"
    if dated.exists():
        raise PathTaken(str(dated))
    return dated


def new_document(cases: Iterable[Case], **facts) -> dict:
    """Every case is in it from the start, so that what was not reached is seen."""
    return {
        "schema": SCHEMA,
        "outcome": "running",
        **facts,
        "finished": None,
        "wall_s": None,
        "roof": None,
        "tests": None,
        "cases": [
            {
                "name": case.name,
                "op": case.op,
                "variant": case.variant,
                "model": case.model,
                "shape": list(case.shape),
                "dtype": short(case.dtype),
                "headline": case.headline,
                "useful_bytes": case.useful_bytes,
                "peers": list(case.peers),
                "outcome": "skipped",
                "reason": NOT_REACHED,
                "rows": [],
            }
            for case in cases
        ],
    }


def save(document: dict, path: Path) -> None:
    """Whole or not at all: a run that is ended while it writes leaves the state before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)  # it is gone already where the run was ended right after the replacement
        raise


def derive(entry: dict, copy_gb_s: float | None) -> None:
    """Adds to each measured row of a case what follows from its median.

    ``gb_s`` of useful bytes, ``percent_of_copy`` bandwidth (a read alone may exceed 100), and ``times_best``: its
    median over that of the fastest other peer, under 1 for the fastest of all; None where no other was measured.
    """
    measured = [row for row in entry["rows"] if row["outcome"] == "measured"]
    for row in measured:
        others = [other["p50_ms"] for other in measured if other is not row]
        row["gb_s"] = entry["useful_bytes"] / row["p50_ms"] / 1e6
        row["percent_of_copy"] = None if copy_gb_s is None else 100 * row["gb_s"] / copy_gb_s
        row["times_best"] = row["p50_ms"] / min(others) if others else None


def table(entry: dict) -> str:
    """One case in at most 100 columns."""
    size = f"{entry['useful_bytes'] / 1e6:.0f} MB" if entry["useful_bytes"] >= 1e6 else f"{entry['useful_bytes']} B"
    lines = [f"{entry['name']} {entry['shape']} {size}"]
    if not entry["rows"]:
        return f"{lines[0]}\n  {entry['outcome']}: {entry['reason']}"[:300]
    lines.append(_HEADER)
    lines += [_line(row) for row in entry["rows"]]
    if entry["outcome"] != "measured":
        lines.append(f"  {entry['outcome']}: {entry['reason']}"[:100])
    return "\n".join(lines)


def _line(row: dict) -> str:
    if row["outcome"] != "measured":
        return f"  {row['peer']:<15}  {row['outcome']}: {row['reason']}"[:100]
    times = "".join(f"{row[name]:>9.4f}" for name in ("p20_ms", "p50_ms", "p80_ms"))
    percent, extra, best = row["percent_of_copy"], row["peak_extra_bytes"], row["times_best"]
    return (
        f"  {row['peer']:<15}{times}{row['gb_s']:>8.1f}"
        + (f"{percent:>7.1f}" if percent is not None else f"{'-':>7}")
        + (f"{extra / 1e6:>8.1f}" if extra is not None else f"{'-':>8}")
        + (f"{best:>7.2f}" if best is not None else f"{'-':>7}")
        + f"{row['max_error']:>9.1e}"
    )
