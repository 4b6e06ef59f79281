"""``python -m bench.audit``: how fast ``quail audit`` goes over a pair of checkpoints, beside what bounds it.

It writes a pair of Llama's shape in bf16, AFTER being BEFORE and an update of a hundredth of its weights' spread,
and then measures on this machine, one after the other and each in a process of its own:

    read    the bytes of both sides, as the audit reads them, by as many workers: what the disk and page cache allow
    count   ``compare_updates`` of blocks that are in memory, by as many workers: what the arithmetic allows
    audit   the audit itself

The audit cannot be faster than the slower of the first two, nor has it reason to be slower than both together, which is
what ``times_bound`` compares it with.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import machine, models, results

_SHARD_BYTES = 2 << 30
_POOL = 1 << 24
_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SIZES = {"llama-2-7b": (models.LLAMA_2_7B, 32), "llama-3.2-1b": (models.LLAMA_32_1B, 16)}
_SIZES["smollm2-135m"] = (models.SMOLLM2_135M, 30)


def shapes(model: models.Model, layers: int) -> dict[str, tuple[int, int]]:
    """By name; keys and values as wide as queries."""
    named = {"model.embed_tokens.weight": (model.vocabulary, model.hidden)}
    for layer in range(layers):
        for module in _LAYER:
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            shape = {
                "mlp": (model.intermediate, model.hidden),
                "self_attn": (model.hidden, model.hidden),
            }[part]
            named[f"model.layers.{layer}.{part}.{module}.weight"] = shape[::-1] if module == "down_proj" else shape
    return named | {"lm_head.weight": (model.vocabulary, model.hidden)}


def write_pair(folder: Path, named: dict[str, tuple[int, int]], seed: int = 0) -> tuple[Path, Path]:
    """(BEFORE, AFTER), in shards, of weights that are drawn once and dealt out from a new place for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).mul_(0.02)
    moved = (pool + torch.randn(_POOL, generator=generator).mul_(2e-4)).bfloat16()
    sides = {"before": pool.bfloat16(), "after": moved}
    for side, weights in sides.items():
        target = folder / side
        target.mkdir(parents=True)
        shard, size, weight_map, number = {}, 0, {}, 0
        for i, (name, shape) in enumerate(named.items()):
            count = shape[0] * shape[1]
            start = i * 7919 * 4096 % _POOL
            rolled = torch.cat([weights[start:], weights[:start]]).repeat(-(-count // _POOL))[:count]
            shard[name], size = rolled.view(shape), size + 2 * count
            if size >= _SHARD_BYTES or i == len(named) - 1:
                file = f"model-{number:05d}.safetensors"
                save_file(shard, target / file)
                weight_map |= dict.fromkeys(shard, file)
                shard, size, number = {}, 0, number + 1
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / "before", folder / "after"


_READ = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
def read(path):
    buffer = bytearray(2 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
start = time.perf_counter()
files = [path for side in sys.argv[2:] for path in sorted(Path(side).glob("*.safetensors"))]
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    list(pool.map(read, files))
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
_COUNT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
from quail_kernels.update_comparison import compare_updates
workers, formats = int(sys.argv[1]), sys.argv[2].split(",")
generator = torch.Generator().manual_seed(0)
x = torch.randn(1 << 20, generator=generator).mul_(0.02)
y = (x + torch.randn(1 << 20, generator=generator).mul_(2e-4)).bfloat16()
x = x.bfloat16()
def count(_):
    torch.set_num_threads(1)
    return compare_updates(x, y, formats)
with ThreadPoolExecutor(workers) as pool:
    list(pool.map(count, range(2 * workers)))
    start, rounds = time.perf_counter(), 16 * workers
    list(pool.map(count, range(rounds)))
print(json.dumps({"ns_a_weight": (time.perf_counter() - start) / rounds / x.numel() * 1e9}))
"""
_AUDIT = """
import json, sys, time
from pathlib import Path
from quail import audit
start = time.perf_counter()
report = audit(*sys.argv[3:], sys.argv[2].split(","), workers=int(sys.argv[1]), device="cpu")
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
weights = {name: row.figures.weights for name, row in report.formats.items()}
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "weights": weights}))
"""


def _run(code: str, *arguments: object) -> dict:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    if done.returncode:
        raise RuntimeError(f"expected figures from a process; got {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(before: Path, after: Path, formats: str, workers: int) -> dict:
    """Seconds, bytes and ratios of one pair."""
    size = sum(path.stat().st_size for side in (before, after) for path in side.glob("*.safetensors"))
    read = _run(_READ, workers, before, after)["seconds"]
    count = _run(_COUNT, workers, formats)["ns_a_weight"]
    audited = _run(_AUDIT, workers, formats, before, after)
    compared = max(audited["weights"].values())
    bound = read + compared * count / 1e9
    return {
        "formats": formats.split(","),
        "workers": workers,
        "bytes": size,
        "weights_compared": compared,
        "read_s": read,
        "count_s": compared * count / 1e9,
        "count_ns_a_weight": count,
        "audit_s": audited["seconds"],
        "audit_gb_s": size / audited["seconds"] / 1e9,
        "times_bound": audited["seconds"] / bound,
        "peak_resident_bytes": audited["peak_bytes"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=_SIZES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--formats", default="bnb-nf4,ct-int4-sym", help="comma-separated (%(default)s)")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where the pair is written; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="a new JSON file (bench/results/audit-MODEL-CPU.json)")
    options = parser.parse_args(argv)
    facts = machine.describe(torch.device("cpu"))
    name = f"audit-{options.model}-{machine.slug(facts['cpu'])}.json"
    out = options.out or results.FOLDER / name
    if out.exists():
        print(f"python -m bench.audit: --out: expected a new file; got {out}, which is there", file=sys.stderr)
        return 2
    model, layers = _SIZES[options.model]
    named = shapes(model, options.layers or layers)
    with tempfile.TemporaryDirectory(prefix="quail-audit-", dir=options.folder) as folder:
        began = time.perf_counter()
        pair = write_pair(Path(folder), named)
        print(f"wrote two checkpoints of {options.model}'s shape in {time.perf_counter() - began:.0f} s", flush=True)
        row = measure(*pair, options.formats, options.workers)
    document = {"schema": 1, "model": options.model, "layers": options.layers or layers, "machine": facts, **row}
    results.save(document, out)
    print(
        f"{row['bytes'] / 1e9:.2f} GB, {row['weights_compared'] / 1e6:.0f} M weights, {options.formats}, "
        f"{options.workers} workers\n"
        f"read {row['read_s']:.1f} s, count {row['count_s']:.1f} s ({row['count_ns_a_weight']:.1f} ns a weight), "
        f"audit {row['audit_s']:.1f} s: {row['times_bound']:.2f} of both together, {row['audit_gb_s']:.2f} GB/s, "
        f"{row['peak_resident_bytes'] / 1e6:.0f} MB resident at most\n{out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
