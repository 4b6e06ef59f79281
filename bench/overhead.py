"""``python -m bench.overhead``: what a call costs on tiny tensors, where nothing but the way to the kernel is timed.

Each op in three layers, one call of each in turn, so that what else the machine does meets all of them alike:
``bare``, the plain function that the op calls (the PyTorch path on the CPU, the Triton launcher on CUDA);
``op``, the registered operator around it, which torch.compile, autograd and DTensor see; and ``public``, the
package's function, which checks its arguments and builds its result. Microseconds of the host; on CUDA the device
is waited for before each call and not within it. The bare function of an op with gradients builds no graph.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from quail_kernels import bucket_compare, fake_quant, get_format, logit_margin_hinge

from . import machine, results

LAYERS = ("bare", "op", "public")
_WARM_UP = 50
_QUANTILES = (0.2, 0.5, 0.8)


def calls(device: torch.device) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """The layers of each op by name."""
    impl = "triton" if device.type == "cuda" else "torch"

    def bare(module: str, name: str) -> Callable:
        return getattr(importlib.import_module(f"quail_kernels.{module}"), f"_{name}_{impl}")

    ops, recipe = torch.ops.quail, get_format("bnb-nf4")
    w = torch.randn(4, 64, device=device)
    after = w + 0.01
    z, ref = torch.randn(2, 4, 16, device=device).unbind()
    options = (None, 1.0, "per_logit", "logits", -100)
    for grad in (False, True):
        leaf, logits = (x.clone().requires_grad_(grad) for x in (w, z))
        graph = ", with a graph" if grad else ""
        yield (
            f"fake_quant{graph}",
            {
                "bare": partial(bare("fake_quant", "fake_quant"), w, recipe),
                "op": partial(ops.fake_quant, leaf, None, recipe.name),
                "public": partial(fake_quant, leaf, recipe.name),
            },
        )
        yield (
            f"logit_margin_hinge{graph}",
            {
                "bare": partial(bare("margin_hinge", "margin_hinge_fwd"), z, ref, *options),
                "op": partial(ops.logit_margin_hinge, logits, ref, *options, False),
                "public": partial(logit_margin_hinge, logits, ref, margin=1.0),
            },
        )
    yield (
        "bucket_compare",
        {
            "bare": partial(bare("bucket_compare", "bucket_compare"), w, after, recipe, False, False),
            "op": partial(ops.bucket_compare, w, after, None, recipe.name, False, False),
            "public": partial(bucket_compare, w, after, recipe.name),
        },
    )


def quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in _QUANTILES]


def measure(layers: dict[str, Callable[[], object]], runs: int, synchronize: Callable[[], None]) -> dict:
    """p20, p50 and p80 microseconds of each layer, and the median of what op and public add to bare in one round."""
    times = {layer: [] for layer in layers}
    for turn in range(runs + _WARM_UP):
        for layer, call in layers.items():
            synchronize()
            began = time.perf_counter_ns()
            call()
            took = time.perf_counter_ns() - began
            if turn >= _WARM_UP:
                times[layer].append(took / 1e3)
    row = {layer: dict(zip(("p20_us", "p50_us", "p80_us"), quantiles(of), strict=True)) for layer, of in times.items()}
    for layer in LAYERS[1:]:
        added = [a - b for a, b in zip(times[layer], times["bare"], strict=True)]
        row[layer]["added_us"] = quantiles(added)[1]
    return row


def table(name: str, row: dict) -> str:
    """One op in at most 80 columns."""
    lines = [f"{name:<34}{'p20':>9}{'p50':>9}{'p80':>9}{'added':>9}  us"]
    for layer in LAYERS:
        added = row[layer].get("added_us")
        figures = "".join(f"{row[layer][key]:>9.1f}" for key in ("p20_us", "p50_us", "p80_us"))
        lines.append(f"  {layer:<32}{figures}{'' if added is None else f'{added:>9.1f}'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000, metavar="N", help="rounds of each op; default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures, as JSON")
    options = parser.parse_args(argv)
    found = torch.cuda.is_available()
    said = None
    if options.runs < 1:
        said = f"--runs: expected a number above 0; got {options.runs}"
    elif options.device == "cuda" and not found:
        said = "--device: expected cpu, as there is no CUDA device; got cuda"
    if said:
        print(f"bench.overhead: {said}", file=sys.stderr)
        return 2
    device = torch.device(options.device or ("cuda" if found else "cpu"))
    facts = machine.describe(device)
    document = {"schema": results.SCHEMA, "machine": facts, "runs": options.runs, "rows": {}}
    print(f"{facts['card'] or facts['cpu']}, torch {facts['versions']['torch']}, {options.runs} rounds", flush=True)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for name, layers in calls(device):
        document["rows"][name] = measure(layers, options.runs, synchronize)
        print(table(name, document["rows"][name]), flush=True)
    if options.out is not None:
        results.save(document, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
