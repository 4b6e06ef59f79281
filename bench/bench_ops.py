"""Throughput of the three ops beside what people use instead: ``pytest bench/bench_ops.py``.

Each case first checks its answer against the eager reference, so a wrong result prints no speed. On a machine with
a CUDA device the Triton kernels run, synchronised; elsewhere the PyTorch path of the CPU does.
"""

import pytest
import torch
import torch.nn.functional as F

from quail_kernels import bucket_compare, dequantize, fake_quant, logit_margin_hinge, quantize

bnb = pytest.importorskip("bitsandbytes.functional", reason="the peer of this comparison is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLUMNS = (4096, 4096) if DEVICE == "cuda" else (1536, 1536)
TOKENS, VOCABULARY = (4096, 128256) if DEVICE == "cuda" else (128, 49152)


def run(benchmark, fn, useful_bytes: int):
    def synchronised():
        result = fn()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.extra_info |= {"device": DEVICE, "useful_bytes": useful_bytes}
    return benchmark.pedantic(synchronised, rounds=5, iterations=1, warmup_rounds=1)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    before = (torch.randn(ROWS, COLUMNS, device=DEVICE) * 0.02).bfloat16()
    return before, (before.float() + 1e-4 * torch.randn(ROWS, COLUMNS, device=DEVICE)).bfloat16()


def bitsandbytes_round_trip(w):
    return bnb.dequantize_4bit(*bnb.quantize_4bit(w, blocksize=64, quant_type="nf4"))


def eager_round_trip(w):
    return dequantize(*quantize(w, "bnb-nf4"), "bnb-nf4", shape=w.shape, dtype=w.dtype)


@pytest.mark.benchmark(group="fake_quant bnb-nf4 bf16")
@pytest.mark.parametrize(
    "fn",
    [lambda w: fake_quant(w, "bnb-nf4"), eager_round_trip, bitsandbytes_round_trip],
    ids=["quail", "quail quantize + dequantize", "bitsandbytes"],
)
def test_fake_quant(benchmark, weights, fn):
    w = weights[0]
    result = run(benchmark, lambda: fn(w), 2 * w.nbytes)
    assert torch.equal(result, bitsandbytes_round_trip(w))


def bitsandbytes_same_code(before, after):
    a, b = (bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")[0] for w in (before, after))
    return ((a >> 4) == (b >> 4)).sum() + ((a & 15) == (b & 15)).sum()


@pytest.mark.benchmark(group="bucket_compare bnb-nf4 bf16")
@pytest.mark.parametrize(
    "fn",
    [lambda a, b: bucket_compare(a, b, "bnb-nf4").same_code, bitsandbytes_same_code],
    ids=["quail", "bitsandbytes twice"],
)
def test_bucket_compare(benchmark, weights, fn):
    result = run(benchmark, lambda: fn(*weights), sum(w.nbytes for w in weights))
    assert int(result) == int(bitsandbytes_same_code(*weights))


def eager_hinge(z, ref, margin):
    return F.relu(margin - (z.float() - ref.float()).abs()).mean()


@pytest.mark.benchmark(group="logit_margin_hinge forward + backward bf16")
@pytest.mark.parametrize(
    "fn",
    [lambda z, ref, margin: logit_margin_hinge(z, ref, margin=margin), eager_hinge],
    ids=["quail", "eager"],
)
def test_hinge(benchmark, fn):
    torch.manual_seed(0)
    z, ref = (torch.randn(TOKENS, VOCABULARY, device=DEVICE).bfloat16() for _ in range(2))
    z.requires_grad_()

    def step():
        loss = fn(z, ref, 1.0)
        return loss.detach(), *torch.autograd.grad(loss, z)

    loss, grad = run(benchmark, step, 3 * z.nbytes)
    exact = eager_hinge(z.detach().double(), ref.double(), 1.0)
    assert abs(float(loss) - float(exact)) < 1e-5
    d = (z.detach().float() - ref.float()).abs()
    assert torch.count_nonzero(grad) == torch.count_nonzero((d > 0) & (d < 1.0))
