"""The ops on DTensors: two gloo processes against the same call on the whole tensor.

The processes run once, every case in both. A case is judged by what each wrote before it left: gloo sometimes
aborts when it is torn down, with every result correct.
"""

import datetime
import json
import math
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from quail_kernels import (
    FORMATS,
    bucket_compare,
    dequantize,
    fake_quant,
    get_format,
    linear_logit_margin_hinge,
    logit_margin_hinge,
    quantize,
)
from quail_kernels.margin_hinge import NORMS

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


def logits_of_ranks(norm):
    from torch.distributed.tensor import Replicate, Shard

    for shape in ((6, 33), (7, 33), (4, 3, 33)):
        z, ref = weights(*shape) * 100, weights(*shape, seed=1) * 100
        labels = torch.arange(z[..., 0].numel()).view(shape[:-1])
        labels.view(-1)[1] = -100
        for space in ("logits", "log_probs"):
            options = {"margin": {"l2": 30.0, "linf": 9.0}.get(norm, 2.0), "norm": norm, "space": space}
            whole = z.clone().requires_grad_()
            expected, share = logit_margin_hinge(whole, ref, labels, **options, return_active_share=True)
            (expected_grad,) = torch.autograd.grad(expected, whole)
            assert expected > 0
            for place in (Shard(0), Shard(len(shape) - 1), Replicate()):
                rows = place if place.is_shard(0) else Replicate()
                sharded = shard(z, place).requires_grad_()
                got, got_share = logit_margin_hinge(
                    sharded, shard(ref, place), shard(labels, rows), **options, return_active_share=True
                )
                (grad,) = torch.autograd.grad(got, sharded)
                torch.testing.assert_close(got.full_tensor(), expected)
                torch.testing.assert_close(got_share.full_tensor(), share)
                torch.testing.assert_close(grad.full_tensor(), expected_grad)


def heads(tokens, seed):
    """Hidden states, an output head and its bias."""
    hidden, weight = weights(*tokens, 12, seed=seed) * 50, weights(33, 12, seed=seed + 1) * 20
    return [hidden, weight, weights(33, seed=seed + 2)]


def hidden_states_of_ranks(norm):
    """Tokens sharded, heads whole, sharded over the vocabulary or over features; gradients are those of the whole."""
    from torch.distributed.tensor import Replicate, Shard

    cases = (((6,), True, "logits"), ((7,), False, "log_probs"), ((4, 3), True, "log_probs"), ((3, 3), True, "logits"))
    for tokens, bias, space in cases:
        model, reference = heads(tokens, seed=0), heads(tokens, seed=3)
        labels = torch.arange(math.prod(tokens)).view(tokens)
        labels.view(-1)[1] = -100
        options = {"margin": {"l2": 30.0, "linf": 9.0}.get(norm, 2.0), "norm": norm, "space": space}

        def step(place, of_tokens, of_head, losses, tensors=(*model, *reference, labels), bias=bias, options=options):
            hidden, weight, b, ref_hidden, ref_weight, ref_b, targets = (
                place(x, of_tokens if i in (0, 3, 6) else of_head) for i, x in enumerate(tensors)
            )
            leaves = [x.requires_grad_() for x in (hidden, weight, b)[: 3 if bias else 2]]
            biases = {"bias": b, "ref_bias": ref_b} if bias else {}
            got = linear_logit_margin_hinge(
                hidden, weight, ref_hidden, ref_weight, targets, chunk_tokens=2, softcap=30.0, **biases, **options
            )
            terms = {"hinge": got.loss, "log_probs": got.label_log_probs.sum()}
            return *got, *torch.autograd.grad(sum(terms[name] for name in losses), leaves)

        for losses in (["hinge"], ["log_probs"], ["hinge", "log_probs"]):
            expected = step(lambda x, _: x.clone(), None, None, losses)
            assert expected[0] > 0
            for of_tokens, of_head in (
                (Shard(len(tokens) - 1), Replicate()),
                (Shard(0), Replicate()),
                (Shard(0), Shard(0)),
                (Replicate(), Shard(0)),
                (Replicate(), Replicate()),
            ):
                got = step(shard, of_tokens, of_head, losses)
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-5)
    op = torch.ops.quail.linear_logit_margin_hinge
    placed = [shard(x, Shard(0) if i == 0 else Replicate()) for i, x in enumerate(heads((6,), seed=0))]
    labels = shard(torch.arange(6), Shard(0))
    outputs = op(*placed, *placed, labels, 1.0, norm, "logits", -100, 1.0, None, 2)
    assert {out.placements for out in outputs} == {(Shard(0),)}
    grads = torch.ops.quail.linear_logit_margin_hinge_backward(
        -100, outputs[0], None, *placed, *placed, labels, *outputs[4:], 1.0, norm, "logits", 1.0, None, 2, [True] * 3
    )
    assert grads[0].placements == (Shard(0),)
    assert all(grad.placements[0].is_partial("sum") for grad in grads[1:])


def a_plain_tensor_among_dtensors(_):
    from torch.distributed.tensor import Replicate

    hidden, weight, _ = heads((6,), seed=0)
    sharded = shard(hidden, Replicate())
    with pytest.raises(ValueError, match="^weight: expected a DTensor, as hidden is; got a plain tensor$"):
        linear_logit_margin_hinge(sharded, weight, sharded, weight, torch.arange(6), margin=1.0)
    with pytest.raises(ValueError, match="^ref_hidden: expected a plain tensor, as hidden is; got a DTensor$"):
        linear_logit_margin_hinge(hidden, weight, sharded, weight, torch.arange(6), margin=1.0)


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
        (logits_of_ranks, NORMS),
        (hidden_states_of_ranks, NORMS),
        (a_plain_tensor_among_dtensors, ["hidden"]),
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
