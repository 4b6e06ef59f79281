"""The correctness suite in processes of its own, several at a time, each outcome kept as it comes.

A test that brings its process down has failed, and the rest goes on in a new process. Tests that the time did not
reach are counted as not run.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .machine import ROOT

TESTS = Path("tests/kernels/test_cuda.py")
_KILLED = "its process was brought down"


class _Part:
    """One part of the tests, and the process that runs it now."""

    def __init__(self, index: int, parts: int, folder: Path, environment: dict):
        self.rows, self.log = folder / f"tests-{index}.jsonl", folder / f"tests-{index}.log"
        self.command = [
            *(sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"),
            *("-p", "bench.suite_plugin", "--rows", str(self.rows), "--part", f"{index}/{parts}", str(TESTS)),
        ]
        self.environment = environment
        self.start()

    def start(self) -> None:
        self.known = len(self.outcomes())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def lines(self) -> list[dict]:
        if not self.rows.exists():
            return []
        lines = self.rows.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outcomes(self) -> dict[str, dict]:
        return {row["test"]: row for row in self.lines() if "outcome" in row}

    def collected(self) -> list[str] | None:
        return next((row["collected"] for row in self.lines() if "collected" in row), None)

    def running(self) -> bool:
        """False when every test has an outcome, or none can be had; starts the next process where one died."""
        code = self.process.poll()
        if code is None:
            return True
        outcomes, collected = self.outcomes(), self.collected()
        if collected is None or all(test in outcomes for test in collected):
            return False
        started = [row["test"] for row in self.lines() if row.get("started") and row["test"] not in outcomes]
        if started:
            self._write(test=started[-1], outcome="failed", seconds=0.0, reason=f"{_KILLED}, exit status {code}")
        elif len(outcomes) == self.known:
            return False
        self.start()
        return True

    def _write(self, **row) -> None:
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"


def run(folder: Path, dry: bool, deadline: float, report: Callable[[dict], None]) -> dict:
    """Runs the tests until ``deadline`` (of time.monotonic), and gives what ``report`` was given last.

    ``outcome`` is passed, failed, incomplete (the time was up) or not run; then the counts, and each failure, skip
    and test not run by name.
    """
    began = time.monotonic()
    # Compiling the kernels is most of the work, and each process compiles on one core.
    parts = 1 if dry else max(min(6, len(os.sched_getaffinity(0)) // 2), 1)
    environment = {key: value for key, value in os.environ.items() if key not in ("QUAIL_DRY_GPU", "TRITON_INTERPRET")}
    if dry:
        environment["QUAIL_DRY_GPU"] = "1"
    running = deque(_Part(index, parts, folder, environment) for index in range(parts))
    every = list(running)
    try:
        while running and time.monotonic() < deadline:
            running = deque(part for part in running if part.running())
            report(_summary(every, began))
            time.sleep(0.5)
    finally:
        for part in running:
            part.process.kill()
            part.process.wait()
    summary = _summary(every, began)
    report(summary)
    return summary


def _summary(parts: list[_Part], began: float) -> dict:
    outcomes = [row for part in parts for row in part.outcomes().values()]
    by = {name: [row for row in outcomes if row["outcome"] == name] for name in ("passed", "failed", "skipped")}
    known = {row["test"] for row in outcomes}
    not_run = [test for part in parts for test in part.collected() or () if test not in known]
    silent = [part for part in parts if part.collected() is None]
    reason = None
    if by["failed"]:
        outcome = "failed"
    elif silent or not (by["passed"] or not_run):
        outcome, reason = "not run", (silent or parts)[0].last_words()
    else:
        outcome = "incomplete" if not_run else "passed"
    return {
        "outcome": outcome,
        "reason": reason,
        "file": str(TESTS),
        "seconds": round(time.monotonic() - began, 1),
        **{name: len(rows) for name, rows in by.items()},
        "not_run": len(not_run),
        "failures": [{"test": row["test"], "reason": row["reason"]} for row in by["failed"]],
        "skips": [{"test": row["test"], "reason": row["reason"]} for row in by["skipped"]],
        "tests_not_run": not_run,
    }
