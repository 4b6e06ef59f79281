"""``python -m bench.memory``: the memory that a hinge from hidden states takes on this machine's CPU, beside eager.

One step, forward and backward, of the hinge alone: eager PyTorch with the logits of both models in memory, and
``linear_logit_margin_hinge``. Each runs in a process of its own, after a small call that loads what libraries load
once. Counted is the most resident memory of the step above what was resident before it, the inputs: hidden states,
labels and output heads of both models. That includes the gradients of hidden states and weight, which both paths
return; the figures stand with them and without. Of tokens n, a vocabulary V and D features these gradients are
(n + V) D numbers, and eager holds k times n V of them: no path that returns them can take a smaller share of eager
than (D / V + D / n) / k. That share stands beside ours as the least. In fp32, at 4,096 tokens, 128,256 and 2,048, it
is 17 % where k is 3 (l2 and label on logits), 10.3 % for 5 and 8.6 % for 6; in bf16, where gradients are half as large
and eager holds 4 such tensors or more all the same, as it computes in fp32, it is 6.4 % at most.

The result is written to bench/results/memory-<cpu>.json after every row. What would not fit ``--limit-gb`` runs on
half the tokens, or a quarter, and its row says so. Linux only, whose kernel counts the peak.

Exit status: 0, 1 where a step failed or the two paths' losses differ, 2 where the command could not run.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from quail_kernels import cpu, linear_logit_margin_hinge
from quail_kernels.margin_hinge import NORMS, SPACES

from . import machine, results
from .cases.margin_hinge import MARGINS, hinge
from .measure import CLEAR_REFS, forget_peak, resident
from .run import now

DTYPES = ("bfloat16", "float32")
PATHS = ("eager", "quail")
# Of eager PyTorch: how many fp32 tensors of all logits' shape it holds at most, for bf16 and for fp32 logits.
_EAGER_TENSORS = {
    ("per_logit", "logits"): (6, 5),
    ("per_logit", "log_probs"): (7, 6),
    ("l2", "logits"): (4, 3),
    ("l2", "log_probs"): (6, 5),
    ("linf", "logits"): (5.6, 6),
    ("linf", "log_probs"): (6.8, 7),
    ("label", "logits"): (4, 3),
    ("label", "log_probs"): (6, 5),
}
_LOSSES_MAY_DIFFER = 2e-3


@dataclass(frozen=True)
class Step:
    path: str
    norm: str
    space: str
    dtype: str
    tokens: int
    vocabulary: int
    hidden: int

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def input_bytes(self) -> int:
        return 2 * (self.tokens + self.vocabulary) * self.hidden * self.itemsize

    def needed_bytes(self) -> int:
        """About, of the eager path: inputs and tensors of logits, which are gone when there are gradients."""
        tensors = _EAGER_TENSORS[self.norm, self.space][self.itemsize == 4]
        return self.input_bytes() + int(4 * tensors * self.tokens * self.vocabulary)


def _eager(hidden, weight, ref_hidden, ref_weight, labels, **options) -> torch.Tensor:
    z = F.linear(hidden, weight)
    with torch.no_grad():
        z_ref = F.linear(ref_hidden, ref_weight)
    return hinge(z, z_ref, labels, **options).mean()


def _quail(hidden, weight, ref_hidden, ref_weight, labels, **options) -> torch.Tensor:
    return linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, labels, **options).loss


def _inputs(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, hidden, generator=generator).mul_(scale).to(dtype)

    x, weight = randn(tokens, 1.0), randn(vocabulary, hidden**-0.5)
    ref_x, ref_weight = x + randn(tokens, 0.1), weight + randn(vocabulary, 0.02 * hidden**-0.5)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), ref_x, ref_weight, labels


def measure(step: Step) -> dict:
    """The step in this process: bytes resident at most beyond the inputs after forward and after backward."""
    run = {"eager": _eager, "quail": _quail}[step.path]
    dtype = getattr(torch, step.dtype)
    options = {"norm": step.norm, "space": step.space, "margin": MARGINS[step.norm]}
    # Large enough for the loops of quail_kernels.cpu, which are loaded once a process: 100 MB with their compiler.
    run(*_inputs(4 * cpu.LEAST_ELEMENTS // 1024, 1024, 64, dtype), **options).backward()
    inputs = _inputs(step.tokens, step.vocabulary, step.hidden, dtype)
    forget_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    loss = run(*inputs, **options)
    forward = resident("VmHWM")
    loss.backward()
    return {
        "forward_bytes": forward - before,
        "step_bytes": resident("VmHWM") - before,
        "gradient_bytes": sum(x.grad.nbytes for x in inputs[:2]),
        "loss": loss.item(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _measure_apart(step: Step) -> dict:
    """``measure`` in a new process; ``{"failed": reason}`` where that ended without an answer."""
    command = [sys.executable, "-m", "bench.memory", "--measure", json.dumps(asdict(step))]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = done.stderr.strip().splitlines()
    return {"failed": f"exit status {done.returncode}: {said[-1][:200] if said else 'no output'}"}


def _rows(options: argparse.Namespace, limit: int) -> Iterator[dict]:
    for dtype in options.dtype:
        for norm in options.norm:
            for space in options.space:
                tokens = options.tokens
                of_size = {"norm": norm, "space": space, "dtype": dtype}
                of_size |= {"vocabulary": options.vocabulary, "hidden": options.hidden}
                while tokens > 1 and Step("eager", tokens=tokens, **of_size).needed_bytes() > limit:
                    tokens //= 2
                steps = {path: Step(path, tokens=tokens, **of_size) for path in PATHS}
                row = of_size | {"tokens": tokens, "input_bytes": steps["eager"].input_bytes()}
                yield judge(row | {path: _measure_apart(step) for path, step in steps.items()})


def _without_gradients(measured: dict) -> int:
    """The forward pass has its peak before there are any; behind it all of them are counted out."""
    return max(measured["forward_bytes"], measured["step_bytes"] - measured["gradient_bytes"])


def judge(row: dict) -> dict:
    """With what follows from the two paths: ``outcome``, and ours as a share of eager, gradients counted and not.

    ``least_share`` is that of the gradients alone.
    """
    eager, quail = (row[path] for path in PATHS)
    for path in PATHS:
        if "failed" in row[path]:
            return row | {"outcome": "failed", "reason": f"{path}: {row[path]['failed']}"}
    if not abs(quail["loss"] - eager["loss"]) <= _LOSSES_MAY_DIFFER * abs(eager["loss"]):
        return row | {"outcome": "failed", "reason": f"losses differ: {eager['loss']:.6g} and {quail['loss']:.6g}"}
    bare = [_without_gradients(row[path]) for path in PATHS]
    shares = {
        "share": quail["step_bytes"] / eager["step_bytes"],
        "least_share": eager["gradient_bytes"] / eager["step_bytes"],
        "share_without_gradients": bare[1] / bare[0],
    }
    return row | {"outcome": "measured", "reason": None} | shares


_HEADER = f"{'':34}with gradients                without\n" + (
    f"{'norm':<10}{'space':<10}{'tokens':>6}{'eager':>9}{'ours':>7}{'share':>7}{'least':>8}"
    f"{'eager':>9}{'ours':>7}{'share':>7}"
)


def table(row: dict) -> str:
    """One line of at most 80 columns: GB and percent."""
    name = f"{row['norm']:<10}{row['space']:<10}{row['tokens']:>6}"
    if row["outcome"] != "measured":
        return f"{name}  {row['outcome']}: {row['reason']}"[:80]
    whole = [row[path]["step_bytes"] / 1e9 for path in PATHS]
    bare = [_without_gradients(row[path]) / 1e9 for path in PATHS]
    return (
        f"{name}{whole[0]:>9.3f}{whole[1]:>7.3f}{100 * row['share']:>6.1f}%{100 * row['least_share']:>7.1f}%"
        f"{bare[0]:>9.3f}{bare[1]:>7.3f}{100 * row['share_without_gradients']:>6.1f}%"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 4096), ("vocabulary", 128256), ("hidden", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default %(default)s")
    for name, choices in (("dtype", DTYPES), ("norm", NORMS), ("space", SPACES)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, help="default: all")
    parser.add_argument("--limit-gb", type=float, metavar="GB", help="default: what the machine has available")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write, instead of bench/results/")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--measure", metavar="STEP", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _die(message: str) -> int:
    print(f"bench.memory: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    options = _arguments(argv)
    if options.measure:
        print(json.dumps(measure(Step(**json.loads(options.measure)))))
        return 0
    if not CLEAR_REFS.exists():
        return _die(f"expected Linux, whose {CLEAR_REFS} resets the peak; found {sys.platform}")
    for name in ("tokens", "vocabulary", "hidden"):
        if getattr(options, name) < 1:
            return _die(f"--{name}: expected a number above 0; got {getattr(options, name)}")
    facts, started = machine.describe(torch.device("cpu")), now()
    path = options.out
    try:
        if path is None:
            path = results.choose_path(f"memory-{machine.slug(facts['cpu'])}", started, options.force)
        elif path.exists() and not options.force:
            raise results.PathTaken(str(path))
    except results.PathTaken as taken:
        return _die(f"--out: expected a path that is free, or --force; got {taken}, which is there")
    limit = _available() if options.limit_gb is None else int(options.limit_gb * 1e9)
    document = {"schema": results.SCHEMA, "outcome": "running", "started": started, "finished": None}
    document |= {"machine": facts, "threads": torch.get_num_threads(), "limit_bytes": limit, "rows": []}
    results.save(document, path)
    print(f"{facts['cpu']}, torch {facts['versions']['torch']}\n{path}\nGB beyond the inputs", flush=True)
    # Ended from outside, the step's process ends too, and the file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    dtype, outcome = None, "interrupted"
    try:
        for row in _rows(options, limit):
            if row["dtype"] != dtype:
                dtype = row["dtype"]
                print(f"\n{dtype}, vocabulary {row['vocabulary']}, hidden {row['hidden']}\n{_HEADER}")
            print(table(row), flush=True)
            document["rows"].append(row)
            results.save(document, path)
        outcome = "finished"
    finally:
        document |= {"outcome": outcome, "finished": now()}
        results.save(document, path)
    return int(any(row["outcome"] == "failed" for row in document["rows"]))


if __name__ == "__main__":
    sys.exit(main())
