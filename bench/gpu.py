"""``python -m bench.gpu``: the correctness suite and the bench on this machine's GPU, in less than nine minutes.

First tests/kernels/test_cuda.py, then the cases of bench/cases, as far as ``--budget-s`` reaches; what it does not
reach is listed as skipped. The result is written to bench/results/<card>.json after every row, so that a run that
is ended keeps what it measured. Nothing is downloaded; a peer that is not installed is listed as absent.

``--dry`` needs no GPU: the same steps on a few rows, on the CPU and its clock, into a temporary file. It shows that
the command works, and nothing about speed.

Exit status: 0 where nothing failed, 1 where a test, a check or a peer did, 2 where the command could not run.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import machine, results, suite, worker
from .cases import all_cases
from .run import Run, now

_BUDGET_S = 500.0
_TESTS_SHARE = 0.6  # of the time, at most: what the tests leave is the bench's


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, a few rows, to see that the command works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write, instead of bench/results/")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--budget-s", type=float, default=_BUDGET_S, metavar="S", help="seconds; default %(default)s")
    return parser.parse_args(argv)


def _die(message: str) -> int:
    print(f"bench.gpu: {message}", file=sys.stderr)
    return 2


def _output_path(options: argparse.Namespace, card: str, started: str) -> Path:
    if options.out is not None:
        if options.out.exists() and not options.force:
            raise results.PathTaken(str(options.out))
        return options.out
    if options.dry:
        return Path(tempfile.mkdtemp(prefix="quail-bench-")) / "dry.json"
    return results.choose_path(machine.slug(card), started, options.force)


def _tell_tests(summary: dict) -> None:
    counts = ", ".join(
        f"{summary[name]} {name.replace('_', ' ')}" for name in ("passed", "failed", "skipped", "not_run")
    )
    print(f"{summary['file']}: {summary['outcome']}: {counts}, {summary['seconds']} s")
    if summary["reason"]:
        print(f"  {summary['reason']}")
    for row in (*summary["failures"], *summary["skips"]):
        print(f"  {row['test'].partition('::')[2]}: {row['reason']}"[:200])
    print(flush=True)


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    began = time.monotonic()
    if not options.budget_s > 0:
        return _die(f"--budget-s: expected seconds above 0; got {options.budget_s}")
    if not options.dry and not torch.cuda.is_available():
        return _die("expected a CUDA device, or --dry to see the command work on the CPU; found neither")
    if options.dry and options.out is not None and options.out.resolve().parent == results.FOLDER:
        return _die("--out: expected a path outside bench/results, which is for runs on a GPU; got a dry run's")
    device = torch.device("cpu" if options.dry else "cuda:0")
    facts = machine.describe(device)
    started = now()
    try:
        path = _output_path(options, facts["card"], started)
    except results.PathTaken as taken:
        return _die(f"--out: expected a path that is free, or --force; got {taken}, which is there")
    size = 0 if options.dry else 1
    cases = all_cases(size)
    document = results.new_document(
        cases, dry=options.dry, size=size, started=started, budget_s=options.budget_s, machine=facts
    )
    try:
        run = Run(document, path, began)
    except OSError as error:
        return _die(f"--out: expected a path that can be written; got {error}")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    print(
        f"{facts['card'] or 'DRY RUN on the CPU: no figure below says anything about a GPU'}\n{versions}\n{path}\n",
        flush=True,
    )
    # Ended from outside, the processes below end too, and the file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcome = "interrupted"
    try:
        with tempfile.TemporaryDirectory(prefix="quail-tests-") as folder:
            summary = suite.run(Path(folder), options.dry, began + options.budget_s * _TESTS_SHARE, run.tests)
        _tell_tests(summary)
        worker.run(str(device), size, [case.name for case in cases], began + options.budget_s, run.hear)
        outcome = "finished"
    finally:
        run.finish(outcome)
    reached = sum(entry["outcome"] != "skipped" for entry in document["cases"])
    failed = run.failed()
    said = "with failures" if failed else "nothing failed"
    print(f"{reached} of {len(cases)} cases, {document['wall_s']} s, {said}: {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
