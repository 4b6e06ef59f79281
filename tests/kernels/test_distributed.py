"""The weight ops on DTensors: two gloo processes against the same call on the whole tensor.

The processes run once, every case in both. A case is judged by what each wrote before it left: gloo sometimes
aborts when it is torn down, with every result correct.
"""

import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from quail_kernels import FORMATS, bucket_compare, dequantize, fake_quant, get_format, quantize

RANKS = 2
FORMAT_NAMES = [*FORMATS, "bnb-nf4@4096", "minmax-int4@32"]

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def shard(w, *placements, mesh_shape=(RANKS,)):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    names = [f"dim_{i}" for i in range(len(mesh_shape))]
    return distribute_tensor(w, init_device_mesh("cpu", mesh_shape, mesh_dim_names=names), placements)


def shapes(format):
    recipe = get_format(format)
    yield from ((8, 384), (5, 384), (2, 3, 768))
    if not recipe.groups_divide_last_dim:
        # Groups straddle rows: in the first not ranks, in the second ranks too, in the third with a short one.
        yield from ((4, 96), (6, 96), (3, 67))


def group_may_be_sharded(format):
    recipe = get_format(format)
    return recipe.group_size is not None and not recipe.needs_tensor


def fake_quant_on_shards(format):
    from torch.distributed.tensor import Replicate, Shard

    for shape in shapes(format):
        w, grad = weights(*shape), weights(*shape, seed=1)
        for place in (Shard(0), Shard(len(shape) - 1), Replicate()):
            sharded = shard(w, place).requires_grad_()
            w_q = fake_quant(sharded, format)
            assert torch.equal(w_q.full_tensor(), fake_quant(w, format)), (shape, place)
            w_q.backward(shard(grad, place))
            assert torch.equal(sharded.grad.full_tensor(), grad), (shape, place)
    stays = group_may_be_sharded(format) and 384 % get_format(format).group_size == 0
    assert fake_quant(shard(weights(5, 384), Shard(0)), format).placements == (Shard(0) if stays else Replicate(),)
    columns = stays and 192 % get_format(format).group_size == 0
    assert fake_quant(shard(weights(5, 384), Shard(1)), format).placements == (Shard(1) if columns else Replicate(),)


def codes_on_shards(format):
    from torch.distributed.tensor import Replicate, Shard

    for shape in shapes(format):
        w = weights(*shape)
        codes, scales = quantize(w, format)
        sharded_codes, sharded_scales = quantize(shard(w, Shard(0)), format)
        assert torch.equal(sharded_codes.full_tensor(), codes), shape
        assert torch.equal(sharded_scales.full_tensor(), scales), shape
        w_q = dequantize(sharded_codes, sharded_scales, format, shape=shape, dtype=w.dtype)
        assert torch.equal(w_q.full_tensor(), fake_quant(w, format)), shape
    stays = group_may_be_sharded(format) and 4 * 384 % get_format(format).group_size == 0
    place = Shard(0) if stays else Replicate()
    assert [part.placements for part in quantize(shard(weights(8, 384), Shard(0)), format)] == [(place,)] * 2


def assert_same_comparison(got, expected):
    got_row, row = got.to_dict(), expected.to_dict()
    for name, value in row.items():
        # Shares of 0 to 1 and sums in another order, in fp64.
        close = pytest.approx(value, rel=1e-12, nan_ok=True) if isinstance(value, float) else value
        assert got_row[name] == close, name
    assert got.total == expected.total and got.groups == expected.groups
    if expected.group_total is not None:
        assert torch.equal(got.group_same_code, expected.group_same_code)
        assert torch.equal(got.group_total, expected.group_total)


def comparison_of_shards(format):
    from torch.distributed.tensor import Replicate, Shard

    for shape in shapes(format):
        before = weights(*shape)
        after = before + 0.1 * weights(*shape, seed=1)
        before.view(-1)[: before.numel() // 3] = 0
        after.view(-1)[: before.numel() // 4] = 0
        for scales in ("own", "before"):
            for per_group in (False, True):
                expected = bucket_compare(before, after, format, scales=scales, per_group=per_group)
                for places in ((Shard(0), Shard(0)), (Shard(len(shape) - 1), Shard(0)), (Replicate(), Shard(0))):
                    pair = map(shard, (before, after), places)
                    got = bucket_compare(*pair, format, scales=scales, per_group=per_group)
                    assert_same_comparison(got, expected)
    op = torch.ops.quail.bucket_compare.default
    sharded = shard(weights(8, 384), Shard(0))
    counts, sums, top, _ = op(sharded, sharded, None, format, False, False)
    stays = group_may_be_sharded(format) and 384 % get_format(format).group_size == 0
    assert counts.placements[0].is_partial() == sums.placements[0].is_partial() == stays
    assert top.placements[0].is_partial("max") == stays


def nan_of_one_rank(format):
    from torch.distributed.tensor import Shard

    before = weights(8, 384)
    for row in (0, 7):
        after = before.clone()
        after[row, 5] = torch.nan
        got = bucket_compare(shard(before, Shard(0)), shard(after, Shard(0)), format).to_dict()
        assert got["max_abs_change"] != got["max_abs_change"] and got["mean_abs_change"] != got["mean_abs_change"]


def mesh_of_two_dimensions(format):
    from torch.distributed.tensor import Replicate, Shard

    w = weights(8, 384)
    for places in ((Shard(0), Replicate()), (Shard(0), Shard(0)), (Shard(0), Shard(1))):
        sharded = shard(w, *places, mesh_shape=(RANKS, 1))
        assert torch.equal(fake_quant(sharded, format).full_tensor(), fake_quant(w, format))
        assert_same_comparison(bucket_compare(sharded, sharded, format), bucket_compare(w, w, format))


def formats_in_turn(_):
    """A rule that was chosen for one format may not serve the next."""
    from torch.distributed.tensor import Shard

    w = weights(8, 384)
    for format in FORMAT_NAMES * 2:
        assert torch.equal(fake_quant(shard(w, Shard(0)), format).full_tensor(), fake_quant(w, format)), format
    for size in (32, 128, 384):
        sharded = shard(w, Shard(1))
        assert torch.equal(fake_quant(sharded, "ct-int4-sym", size).full_tensor(), fake_quant(w, "ct-int4-sym", size))


def compiled(_):
    from torch.distributed.tensor import Shard

    def step(before, after):
        return fake_quant(before, "bnb-nf4") * 2, bucket_compare(before, after, "bnb-nf4").code_distance

    before, after = weights(8, 384), weights(8, 384, seed=1)
    sharded = shard(before, Shard(0)), shard(after, Shard(0))
    w_q, distance = torch.compile(step, fullgraph=True, backend="aot_eager")(*sharded)
    expected, expected_distance = step(before, after)
    assert torch.equal(w_q.full_tensor(), expected) and torch.equal(distance, expected_distance)


def fully_sharded_training(_):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    class Deployed(torch.nn.Module):
        def forward(self, w):
            return fake_quant(w, "bnb-nf4")

    def model():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Tanh(), torch.nn.Linear(64, 6))
        for layer in layers[::2]:
            torch.nn.utils.parametrize.register_parametrization(layer, "weight", Deployed())
        return layers

    def losses(layers):
        optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
        for step in range(3):
            loss = layers(weights(16, 96, seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    sharded = model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in sharded[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert list(losses(sharded)) == pytest.approx(list(losses(model())), rel=1e-6)
    kept = sharded[0].parametrizations.weight.original
    assert kept.to_local().shape == (32, 96)
    assert torch.equal(fake_quant(kept, "bnb-nf4").full_tensor(), fake_quant(kept.full_tensor(), "bnb-nf4"))


CASES = {
    f"{case.__name__}-{format}": (case, format)
    for case, formats in (
        (fake_quant_on_shards, FORMAT_NAMES),
        (codes_on_shards, FORMAT_NAMES),
        (comparison_of_shards, FORMAT_NAMES),
        (nan_of_one_rank, FORMATS),
        (mesh_of_two_dimensions, ["bnb-nf4"]),
        (formats_in_turn, ["all"]),
        (compiled, ["bnb-nf4"]),
        (fully_sharded_training, ["bnb-nf4"]),
    )
    for format in formats
}


def run_cases(rank, folder):
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=30))
    torch.set_num_threads(1)
    results = {}
    for name, (case, format) in CASES.items():
        try:
            case(format)
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = []
    for rank in range(RANKS):
        log = (folder / f"{rank}.log").open("w")
        command = [sys.executable, __file__, str(rank), str(folder)]
        ranks.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in ranks:
            process.wait(timeout=300)
    finally:
        for process in ranks:
            process.kill()
    written = [folder / f"{rank}.json" for rank in range(RANKS)]
    logs = [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(RANKS)]
    return [
        (json.loads(file.read_text()) if file.exists() else {}, log) for file, log in zip(written, logs, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_the_whole_tensor(case, results):
    for rank, (result, log) in enumerate(results):
        got = result.get(case, f"not reached\n{log}")
        assert got == "passed", f"rank {rank}:\n{got}"


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "passed", done.stderr


def test_importing_the_package_does_not_import_dtensor():
    run("""
import sys
import torch
before = "torch.distributed.tensor" in sys.modules
import quail_kernels
assert before == ("torch.distributed.tensor" in sys.modules)
print("passed", end="")
""")


def test_compiled_code_has_the_rules_where_dtensor_was_imported_first():
    run("""
import os, sys
import torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from quail_kernels import fake_quant
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
w = torch.randn(8, 384)
sharded = distribute_tensor(w, init_device_mesh("cpu", (1,)), [Shard(0)])
w_q = torch.compile(lambda w: fake_quant(w, "bnb-nf4"), fullgraph=True, backend="aot_eager")(sharded)
assert torch.equal(w_q.full_tensor(), fake_quant(w, "bnb-nf4"))
print("passed", end="", flush=True)
os._exit(0)
""")


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), sys.argv[2])
