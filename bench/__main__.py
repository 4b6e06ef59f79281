"""``python -m bench``: every op beside its peers on this machine, and what its results files say.

``--report`` measures the cases of bench/cases, on the GPU where there is one and on the CPU otherwise, at ``--size``
times the rows of the real models. After every row it writes bench/results/<machine>.json, so that a run that is ended
keeps what it measured; at the end a chart beside it, PNG and SVG, where matplotlib is installed. ``--compare A.json
B.json`` shows what moved by more than ``--threshold``, ``--chart A.json`` draws a file again, and ``--readme A.json``
writes the README's section on performance from it.

Exit status: 0 where nothing failed, 1 where a check or a peer did, 2 where the command could not run.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch

from . import compare, machine, readme, results, worker
from .cases import all_cases
from .run import Run, now

_SIZES = {"cuda": 1.0, "cpu": 0.25}
_BUDGET_S = 3600.0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--report", action="store_true", help="measure this machine")
    what.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results files")
    what.add_argument("--chart", type=Path, metavar="A", help="draw a results file, beside it")
    what.add_argument("--readme", type=Path, metavar="A", help="write the README's section from a results file")
    parser.add_argument("--size", type=float, help="share of the models' rows; 1 on a GPU, 0.25 on a CPU")
    parser.add_argument("--ops", help="comma-separated; all")
    parser.add_argument("--models", help="comma-separated, as the report names them; all")
    parser.add_argument("--headlines", action="store_true", help="only the cases that the README shows")
    parser.add_argument("--budget-s", type=float, default=_BUDGET_S, metavar="S", help="seconds; default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write, instead of bench/results/")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--threshold", type=float, default=0.05, help="of --compare; default %(default)s")
    return parser.parse_args(argv)


def _report(options: argparse.Namespace) -> int:
    began = time.monotonic()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    size = _SIZES[device.type] if options.size is None else options.size
    if not 0 <= size <= 1 or not options.budget_s > 0:
        raise ValueError(f"--size, --budget-s: expected 0 to 1, and seconds above 0; got {size}, {options.budget_s}")
    cases = [case for case in all_cases(size) if case.headline or not options.headlines]
    for option, chosen in (("op", options.ops), ("model", options.models)):
        if not chosen:
            continue
        asked, known = set(chosen.split(",")), {getattr(case, option) for case in cases}
        if unknown := asked - known:
            expected, got = (", ".join(sorted(names)) for names in (known, unknown))
            raise ValueError(f"--{option}s: expected some of {expected}; got {got}")
        cases = [case for case in cases if getattr(case, option) in asked]
    facts, started = machine.describe(device), now()
    name = machine.slug(facts["card"] or f"{facts['cpu']} {facts['cpu_cores']} cores")
    path = options.out or results.choose_path(name, started, options.force)
    if options.out is not None and path.exists() and not options.force:
        raise results.PathTaken(str(path))
    facts_of_run = {"dry": False, "size": size, "started": started, "budget_s": options.budget_s, "machine": facts}
    run = Run(results.new_document(cases, **facts_of_run), path, began)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcome = "interrupted"
    try:
        worker.run(str(device), size, [case.name for case in cases], began + options.budget_s, run.hear)
        outcome = "finished"
    finally:
        run.finish(outcome)
    print(f"{len(cases)} cases, {run.document['wall_s']} s: {path}")
    try:
        _chart(path)
    except (ImportError, ValueError) as error:
        print(f"no chart: {error}")
    return int(run.failed())


def _chart(path: Path) -> None:
    from .chart import draw

    print(", ".join(map(str, draw(_read(path), path.with_suffix("")))))


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != results.SCHEMA or document["roof"] is None or document["cases"] is None:
            raise ValueError("another schema, or a run that measured nothing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a results file of this bench; got {error}") from None
    return document


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        if options.report:
            return _report(options)
        if options.compare:
            print(compare.compare(*map(_read, options.compare), threshold=options.threshold))
        elif options.chart:
            _chart(options.chart)
        else:
            readme.write(_read(options.readme), options.readme)
    except results.PathTaken as taken:
        print(f"bench: --out: expected a path that is free, or --force; got {taken}, which is there", file=sys.stderr)
        return 2
    except (ValueError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
