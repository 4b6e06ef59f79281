"""The loops that numba compiles, beside the PyTorch references: every bit the same, and sums but for their last."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import weight_cases
from awkward_weights import awkward, gaussian
from hypothesis import HealthCheck, given, settings
from weight_cases import LAYOUTS, laid_out, same_bits

from quail_kernels import (
    FORMATS,
    bucket_compare,
    cpu,
    dequantize,
    fake_quant,
    get_format,
    linear_logit_margin_hinge,
    logit_margin_hinge,
    quantize,
)
from quail_kernels.formats import WEIGHT_DTYPES
from quail_kernels.margin_hinge import NORMS, SPACES
from quail_kernels.update_comparison import compare_updates

loops = pytest.importorskip("quail_kernels.loops", reason="numba is not installed: the references do the work")

_SIZES = ("bnb-nf4@4096", "bnb-nf4@32", "bnb-fp4@128", "ct-int4-sym@96", "ct-int4-sym@8", "awq-int4-sym@1152")
_ALL = (*FORMATS, *_SIZES, "ct-int4-asym@96", "minmax-int4@32", "minmax-int4@96")
COMPILED = [name for name in _ALL if not get_format(name).looks_at_tensor]
DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
OF_COUNTS = ("code_distance", "same_value", "on_grid", "zero_groups", "below_half_step", "group_same_code")


@pytest.fixture
def anything(monkeypatch):
    """A function of whether the loops are used, for tensors of any size; in spans that are short."""
    monkeypatch.setattr(cpu, "_SPAN", 4096)

    def use(compiled):
        monkeypatch.setattr(cpu, "LEAST_ELEMENTS", 0 if compiled else 1 << 60)

    return use


def assert_same_comparison(got, expected):
    for name in OF_COUNTS:
        a, b = getattr(got, name), getattr(expected, name)
        assert a is b is None or torch.equal(a, b), name
    torch.testing.assert_close(got.max_abs_change, expected.max_abs_change, rtol=0, atol=0, equal_nan=True)
    for name in ("sum_abs_change", "sum_flip_law"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=0, equal_nan=True)


def assert_same_results(use, format, before, after):
    def results():
        codes, scales = quantize(before, format)
        yield from (codes, scales, fake_quant(before, format))
        yield dequantize(codes, scales, format, shape=before.shape, dtype=before.dtype)
        for options in ({}, {"scales": "before"}, {"per_group": True}):
            yield bucket_compare(before, after, format, **options)
        if before.is_contiguous():
            yield compare_updates(before, after.contiguous(), [format])[format]

    use(True)
    assert cpu.loops_for(get_format(format), before) is loops or not before.numel()
    compiled = list(results())
    use(False)
    assert cpu.loops_for(get_format(format), before) is None
    for got, expected in zip(compiled, results(), strict=True):
        if isinstance(got, torch.Tensor):
            assert same_bits(got, expected)
        elif hasattr(got, "own"):
            assert_same_comparison(got.own, expected.own)
            assert_same_comparison(got.before_grid, expected.before_grid)
            assert torch.equal(got.step_histogram, expected.step_histogram)
            assert_same_sums(got, expected, before, after)
        else:
            assert_same_comparison(got, expected)


def assert_same_sums(got, expected, before, after):
    # The reference sums a chunk in fp32, in which squares of subnormal changes are 0 and those of huge ones infinite.
    sizes = (after.double() - before.double()).abs().view(-1)
    largest = max(sizes.tolist(), default=0)
    if not sizes.isfinite().all() or largest > 1e15 or 0 < largest < 1e-15:
        return
    squares = (expected.sum_square_change * expected.sum_square_delivered).sqrt().nan_to_num(0).item()
    for name in ("sum_square_change", "sum_square_delivered", "sum_change_delivered"):
        atol = 1e-6 * squares if name == "sum_change_delivered" else 0
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=atol, equal_nan=True)


def changed(before, by, seed=5):
    noise = weight_cases.normal(*before.shape, seed=seed) * 50
    return (before.float() + by * before.float().abs() * noise).to(before.dtype)


@DTYPES
@pytest.mark.parametrize("format", COMPILED)
def test_awkward_weights(anything, format, dtype):
    before = torch.cat([awkward(dtype), gaussian(40, dtype)])
    if before.shape[1] % get_format(format).group_size and get_format(format).groups_divide_last_dim:
        before = before.view(-1)[: before.numel() // 4096 * 4096].view(-1, get_format(format).group_size)
    for by in (1e-3, 1.0):
        assert_same_results(anything, format, before, changed(before, by))
    after = before.clone()
    after.view(-1)[5::96] = 0.01  # some groups keep their grid
    before.view(-1)[:8192] = after.view(-1)[:8192] = 0
    assert_same_results(anything, format, before, after)


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", COMPILED)
def test_nan_and_infinity(anything, format, bad, dtype):
    before = gaussian(32, dtype).view(-1)[: 8 * 4096 if "4096" in format else None]
    before = before.view(-1, 1152) if get_format(format).groups_divide_last_dim else before
    after = changed(before, 0.1)
    spoiled = after.clone()
    spoiled.view(-1)[[3, 700, 701]] = bad
    for tensors in ((before, spoiled), (spoiled, after), (spoiled, spoiled)):
        assert_same_results(anything, format, *tensors)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight_cases.weights(formats=COMPILED))
def test_whatever_the_weights_are(anything, case):
    format, before = case
    assert_same_results(anything, format, before, changed(before, 0.1))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e25])
@pytest.mark.parametrize("format", COMPILED)
def test_sums_are_those_of_fp64(anything, format, scale):
    anything(True)
    if scale > 1 and ("gguf-q4" in format or "gptq" in format):
        scale = 1e4  # their scales are stored in fp16
    width = 4096 if "4096" in format else 1152
    before = (gaussian(32).view(-1)[: 8 * width] * scale).view(8, width)
    after = before + before.flip(0) * 0.01
    got = compare_updates(before, after, [format])[format]
    dw = (after - before).double()
    dq = (fake_quant(after, format) - fake_quant(before, format)).double()
    assert got.sum_square_change.item() == pytest.approx((dw * dw).sum().item(), rel=1e-12)
    assert got.sum_square_delivered.item() == pytest.approx((dq * dq).sum().item(), rel=1e-12)
    within = 1e-12 * (dw * dq).abs().sum().item()
    assert got.sum_change_delivered.item() == pytest.approx((dw * dq).sum().item(), rel=0, abs=within)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 4095, 4097, 8191, 100_001])
@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4@128", "bnb-nf4@4096"])
def test_short_groups_and_odd_numbers(anything, format, n):
    before = gaussian(100, torch.bfloat16).view(-1)[:n]
    assert_same_results(anything, format, before, changed(before, 0.1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(anything, layout):
    before = laid_out(gaussian(64, torch.bfloat16), layout)
    after = laid_out(changed(gaussian(64, torch.bfloat16), 0.1), layout)
    for format in ("bnb-nf4", "ct-int4-sym"):
        assert_same_results(anything, format, before, after)


def test_scales_and_codes_of_any_kind_are_taken(anything):
    anything(True)
    w = gaussian(64, torch.bfloat16)
    codes, scales = quantize(w, "ct-int4-sym")
    strided = codes.new_zeros(2 * len(codes))[::2].copy_(codes)
    for args in ((strided, scales), (codes, scales.float())):
        got = dequantize(*args, "ct-int4-sym", shape=w.shape, dtype=w.dtype)
        assert same_bits(got, fake_quant(w, "ct-int4-sym"))


def test_the_number_of_threads_changes_nothing(anything):
    anything(True)
    before = gaussian(100, torch.bfloat16)
    after = changed(before, 0.1)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            comparison = bucket_compare(before, after, "bnb-nf4", per_group=True)
            update = compare_updates(before, after, ["bnb-nf4"])["bnb-nf4"]
            found.append((fake_quant(before, "bnb-nf4"), comparison, update))
    finally:
        torch.set_num_threads(threads)
    (w_q, comparison, update), (w_q_3, comparison_3, update_3) = found
    assert same_bits(w_q, w_q_3) and update.to_dict() == update_3.to_dict()
    assert comparison.to_dict() == comparison_3.to_dict()
    assert torch.equal(comparison.group_same_code, comparison_3.group_same_code)


def hinge_of(z, ref, labels, **options):
    z = z.detach().requires_grad_()
    h, share = logit_margin_hinge(z, ref, labels, reduction="none", return_active_share=True, **options)
    (grad,) = torch.autograd.grad((h * torch.arange(1, h.numel() + 1).view(h.shape)).sum(), z)
    return h.detach(), share, grad


def _of_rounded_normalizers(z, ref):
    """How far apart two gradients of ``hinge_of`` may be for l2 on log-probabilities, by row: two normalizers, each
    rounded once, are in every difference of log-probabilities, and as often as there are logits in the sum of these,
    which the softmax of the logits multiplies.
    """
    log_probs, ref_log_probs = z.double().log_softmax(-1), ref.double().log_softmax(-1)
    normalizer = torch.maximum(z.double().logsumexp(-1).abs(), ref.double().logsumexp(-1).abs())
    distance = (log_probs - ref_log_probs).norm(dim=-1)
    weight = torch.arange(1, distance.numel() + 1).view(distance.shape)
    both = 2 * torch.finfo(torch.float32).eps * normalizer
    apart = both * (1 + z.shape[-1] * log_probs.exp().amax(-1)) * weight / distance
    return torch.where(distance > 1e-6, apart, 0)


@DTYPES
@pytest.mark.parametrize("vocab", [1, 1000, 5000])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_hinge_is_that_of_the_reference(anything, norm, space, vocab, dtype):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, vocab, generator=generator).to(dtype)
    ref = (z.float() + torch.randn(2, 4, vocab, generator=generator)).to(dtype)
    z[0, 1, : vocab // 2] = ref[0, 1, : vocab // 2]
    ref[1, 1] = z[1, 1]
    if vocab > 1:
        z[1, 0, 0] = ref[1, 0, 1] = 30  # ties for linf, but for what rounding to the dtype makes of the others
    labels = torch.randint(vocab, (2, 4), generator=generator)
    labels[0, 2] = labels[1, 3] = -100
    options = {"norm": norm, "space": space, "margin": {"l2": 2 * vocab**0.5, "linf": 40.0}.get(norm, 0.5)}
    for layout in ("contiguous", "split", "every second"):
        tensors = laid_out(z, layout), laid_out(ref, layout), labels
        anything(True)
        h, share, grad = hinge_of(*tensors, **options)
        anything(False)
        expected, expected_share, expected_grad = hinge_of(*tensors, **options)
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
        assert share == expected_share
        eps = torch.finfo(dtype).eps
        may_differ = 4 * eps * (expected_grad.float().abs() + float(expected_grad.abs().max()))
        if (norm, space) == ("l2", "log_probs"):
            may_differ += _of_rounded_normalizers(z, ref)[..., None]
        assert ((grad.float() - expected_grad.float()).abs() <= may_differ).all()
        assert not grad[0, 2].any() and not grad[1, 3].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_hinge_hides_no_nan_and_no_infinity(anything, norm, space, bad):
    z = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    ref = z.flip(0).clone()
    z[0, 5] = ref[1, 2500] = z[2, 7] = ref[2, 7] = bad
    labels = torch.tensor([5, 2500, 7, 9])
    options = {"norm": norm, "space": space, "margin": 1.0}
    anything(True)
    h, share, grad = hinge_of(z, ref, labels, **options)
    anything(False)
    expected, expected_share, expected_grad = hinge_of(z, ref, labels, **options)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert share == expected_share


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_linear_hinge_in_blocks_of_the_vocabulary(anything, norm, space):
    """A label lies in one of the blocks, and outside the others."""
    generator = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(40, 16, generator=generator) for _ in range(2))
    weight, ref_weight = (torch.randn(300, 16, generator=generator) / 4 for _ in range(2))
    labels = torch.randint(300, (40,), generator=generator)
    labels[3] = -100
    options = {"norm": norm, "space": space, "margin": {"l2": 30.0, "linf": 6.0}.get(norm, 1.0), "chunk_tokens": 16}
    found = []
    for compiled in (True, False):
        anything(compiled)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, log_probs, *_ = linear_logit_margin_hinge(*leaves, ref_hidden, ref_weight, labels, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss + log_probs.sum() / 100, leaves)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert found[0][0] > 0


def test_exponentials():
    x = torch.cat([torch.linspace(-87, 88.7, 20_000), torch.tensor([0.0, -0.0, 1e-10, 0.34657, -0.34658])])
    got = torch.tensor([float(loops._exp(number)) for number in x.numpy()], dtype=torch.float64)
    exact = x.double().exp()
    ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    assert ((got - exact).abs() <= 2 * ulp).all()
    subnormal = torch.linspace(-103.9, -87, 1000)
    found = torch.tensor([float(loops._exp(number)) for number in subnormal.numpy()], dtype=torch.float64)
    assert ((found - subnormal.double().exp()).abs() <= 2 * 2.0**-149 + 2.0**-22 * found).all()
    ends = [float(loops._exp(np.float32(number))) for number in (np.inf, -np.inf, 100.0, -200.0)]
    assert ends == [np.inf, 0, np.inf, 0] and np.isnan(loops._exp(np.float32(np.nan)))


def test_small_tensors_and_other_recipes_take_the_reference():
    large = torch.empty(cpu.LEAST_ELEMENTS)
    assert cpu.loops_for(get_format("bnb-nf4"), large) is loops
    assert cpu.loops_for(get_format("bnb-nf4"), large[1:]) is None
    assert cpu.loops_for(get_format("minmax-int4"), large) is None
    assert cpu.loops_for(get_format("nvfp4"), large) is None
    assert cpu.loops_for(get_format("bnb-nf4"), large.to("meta")) is None


def test_without_numba_the_references_do_the_work():
    code = """
import sys
sys.modules["numba"] = None
import torch
from quail_kernels import bucket_compare, cpu, fake_quant, get_format
w = torch.randn(cpu.LEAST_ELEMENTS)
assert cpu.loops_for(get_format("bnb-nf4"), w) is None
print(int(bucket_compare(w, fake_quant(w, "bnb-nf4"), "bnb-nf4").same_code))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == cpu.LEAST_ELEMENTS
