"""The hinge: against fp64 Triton may err no more than PyTorch does in the same dtype, and a stated little."""

import importlib
import math

import numpy as np
import pytest
import torch

from quail_kernels.margin_hinge import NORMS, SPACES

hinge = importlib.import_module("quail_kernels.margin_hinge")

IGNORED = -100
MARGINS = {"per_logit": 0.1, "l2": 3.2, "linf": 0.35, "label": 0.1}
CASES = pytest.mark.parametrize(("norm", "space"), [(norm, space) for norm in NORMS for space in SPACES])
BLOCK_V = 1024


def rows(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(shape, generator=generator)).to(dtype)
    ref = (z.float() + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels.view(-1)[1::5] = IGNORED
    return z, ref, labels


def run(impl, z, ref, labels, margin, norm, space, grad_hinge, *block):
    """Hinge, count and gradient of the Triton or of the PyTorch path."""
    options = (margin, norm, space, IGNORED)
    h, active, stats = getattr(hinge, f"_margin_hinge_fwd_{impl}")(z, ref, labels, *options, *block)
    grad = torch.empty(z.shape, dtype=z.dtype)
    getattr(hinge, f"_margin_hinge_bwd_{impl}")(grad, grad_hinge, z, ref, labels, stats, *options, *block)
    return h, active, grad


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_sided(norm, space, dtype):
    z, ref, labels = rows(2, 7, 2500, dtype=dtype)
    z[0, 0] = ref[0, 0]
    flat, margin = labels.view(-1), MARGINS[norm]
    grad_hinge = torch.randn(14, generator=torch.Generator().manual_seed(2))
    got_h, got_active, got_grad = run("triton", z, ref, flat, margin, norm, space, grad_hinge, BLOCK_V)
    torch_h, torch_active, torch_grad = run("torch", z, ref, flat, margin, norm, space, grad_hinge)
    exact = run("torch", z.double(), ref.double(), flat, margin, norm, space, grad_hinge.double())
    exact_h, exact_active, exact_grad = exact

    assert 0 < exact_active.sum() < 14 * (2500 if norm == "per_logit" else 1)
    # log_probs: the two paths sum a normalizer in another order, and a |d| at the margin may cross it.
    assert (got_active - torch_active).abs().sum() <= (0 if space == "logits" else 2)

    ulp = torch.finfo(torch.float32).eps
    error, torch_error = (got_h - exact_h).abs().max(), (torch_h - exact_h).abs().max()
    # The sums over 2,500 logits are taken in another order: a few ulp of what is summed.
    lse = 0 if space == "logits" else math.log(2500) + 8
    assert error <= torch_error + 4 * ulp * (margin + lse)

    # A logit whose d lies within rounding of 0 or of the margin may take the other branch, in either path.
    d = z.double() - ref.double()
    if space == "log_probs":
        d = z.double().log_softmax(-1) - ref.double().log_softmax(-1)
    near = 16 * ulp * (1 + lse)
    smooth = (d.abs() > near) & ((d.abs() - margin).abs() > near) | (d == 0)
    assert smooth.double().mean() > 0.99
    error = (got_grad - exact_grad).abs()[smooth].max()
    torch_error = (torch_grad - exact_grad).abs()[smooth].max()
    assert error <= torch_error + 4 * ulp * exact_grad.abs().max()
    assert not got_grad[labels == IGNORED].any()


@CASES
def test_blocks_strides_and_inplace(norm, space):
    """One block or several, a view or a copy, in place or not: the same gradient, and reruns bit for bit."""
    z, ref, labels = rows(2, 5, 300, dtype=torch.float32)
    options = (MARGINS[norm] / 2 if norm == "l2" else MARGINS[norm], norm, space)
    flat = labels[:, 1:].reshape(-1)
    grad_hinge = torch.randn(8, generator=torch.Generator().manual_seed(2))
    views = z[:, :-1], ref[:, :-1]
    copies = [view.clone() for view in views]
    h, active, grad = run("triton", *views, flat, *options, grad_hinge, 512)
    for args in ((*views, flat, *options, grad_hinge, 512), (*copies, flat, *options, grad_hinge, 512)):
        assert all(map(torch.equal, run("triton", *args), (h, active, grad)))
    column_major = [copy.transpose(1, 2).contiguous().transpose(1, 2) for copy in copies]
    assert all(map(torch.equal, run("triton", *column_major, flat, *options, grad_hinge, 512), (h, active, grad)))
    other = run("triton", *views, flat, *options, grad_hinge, 128)
    torch.testing.assert_close(other[0], h, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other[2], grad, rtol=1e-4, atol=1e-6)

    over = z.clone()
    _, _, stats = hinge._margin_hinge_fwd_triton(over[:, :-1], views[1], flat, *options, IGNORED, 512)
    logits = over[:, :-1]
    hinge._margin_hinge_bwd_triton(logits, grad_hinge, logits, views[1], flat, stats, *options, IGNORED, 512)
    assert torch.equal(over[:, :-1], grad) and torch.equal(over[:, -1], z[:, -1])


@CASES
def test_odd_cases(norm, space):
    z, ref, labels = rows(1, 4, 37, dtype=torch.float32)
    flat = torch.tensor([3, IGNORED, 37, -1])
    h, active, stats = hinge._margin_hinge_fwd_triton(z, ref, flat, 9.0, norm, space, IGNORED)
    assert h[0].isfinite() and h[1] == 0, "an ignored row"
    assert h[2:].isnan().all(), "a label outside the vocabulary is neither read nor hidden"
    for bad in (math.nan, math.inf):
        spoiled, spoiled_ref = z.clone(), ref.clone()
        spoiled[0, 0, 3] = spoiled_ref[0, 0, 3] = bad
        spoiled[0, 1] = bad
        h, _, grad = run("triton", spoiled, spoiled_ref, flat, 9.0, norm, space, torch.ones(4))
        assert h[0].isnan() and grad[0, 0].isnan().any()
        assert h[1] == 0 and not grad[0, 1].any(), "an ignored row is not read"
    if norm != "label":
        h, active, grad = run("triton", z, ref, None, 9.0, norm, space, torch.ones(4))
        expected = run("torch", z, ref, None, 9.0, norm, space, torch.ones(4))
        torch.testing.assert_close(h, expected[0])
        assert torch.equal(active, expected[1])
    empty = z[:, :0]
    assert hinge._margin_hinge_fwd_triton(empty, empty, None, 9.0, "l2", space, IGNORED)[0].shape == (0,)


def test_ties_share_the_gradient_of_linf():
    """Ties in one chunk, in several and across blocks, and one after a smaller maximum of an earlier block."""
    z = torch.zeros(1, 1, 64)
    z[0, 0, [16, 17, 48, 20, 52]] = torch.tensor([0.5, -0.5, 0.5, 0.25, 0.5])
    h, active, grad = run("triton", z, torch.zeros_like(z), None, 1.0, "linf", "logits", torch.ones(1), 32)
    assert h == 0.5 and active == 1
    expected = torch.zeros(64)
    expected[[16, 17, 48, 52]] = torch.tensor([-1.0, 1.0, -1.0, -1.0]) / 4
    assert torch.equal(grad[0, 0], expected)


def test_a_difference_equal_to_the_margin_is_outside():
    z = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]])
    for norm in NORMS:
        options = (1.0, norm, "logits", IGNORED)
        label = torch.tensor([2])
        h, active, stats = hinge._margin_hinge_fwd_triton(z * (0.5 if norm == "l2" else 1), z * 0, label, *options)
        assert h == 0 and active == 0 and stats[0, 3] == 0


@CASES
@pytest.mark.parametrize("vocab", [1, 8, 17, 1157])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_rows_that_start_anywhere(norm, space, vocab, dtypes):
    """Rows at every distance from a 16-byte boundary, alike in both tensors or not: the same as by itself."""
    z, ref, _ = rows(1, 9, vocab, dtype=torch.float32)
    z, ref = z.to(dtypes[0]), ref.to(dtypes[1])
    labels = torch.arange(9) * 5 % vocab
    options = (labels, MARGINS[norm], norm, space)
    expected = run("torch", z, ref, *options, torch.ones(9))
    for before, ref_before in ((0, 0), (3, 2)):
        shifted = torch.cat([torch.full((before,), math.nan, dtype=z.dtype), z.flatten()])[before:].view(z.shape)
        ref_shifted = torch.cat([torch.full((ref_before,), math.nan, dtype=ref.dtype), ref.flatten()])
        got = run("triton", shifted, ref_shifted[ref_before:].view(ref.shape), *options, torch.ones(9), 512)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5 * (space == "log_probs"))
        # One rounding of the dtype, and in log_probs a |d| within rounding of the margin, of 0 or of the maximum.
        far = ~torch.isclose(got[2].float(), expected[2].float(), rtol=2 * torch.finfo(z.dtype).eps, atol=1e-5)
        assert far.sum() <= (0 if space == "logits" else 2)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_one_pass_errs_no_more_than_two(norm):
    """Differences far from zero before the shift, and outliers at the head of every lane, against fp64."""
    generator = torch.Generator().manual_seed(0)
    ref = 3 * torch.randn(1, 6, 4001, generator=generator)
    z = ref + 0.01 * torch.randn(ref.shape, generator=generator) + torch.tensor([0, 1, 30, -300, 0, 0]).view(1, 6, 1)
    z[0, 4, :600:7] += 20
    z[0, 5, 2000] -= 25
    options = (None, 1e4, norm, "log_probs")
    got = run("triton", z, ref, *options, torch.ones(6), BLOCK_V)
    two_passes = run("torch", z, ref, *options, torch.ones(6))
    exact = run("torch", z.double(), ref.double(), *options, torch.ones(6, dtype=torch.float64))
    length, length_torch, length_exact = (1e4 - h.double() for h in (got[0], two_passes[0], exact[0]))
    ulp = torch.finfo(torch.float32).eps
    # 1e4 - length is rounded to fp32; the shift errs by ulps of the log-sum-exps, in every one of the differences.
    slack = 1e4 * ulp + 4 * ulp * (z.abs().amax() + 8) * (4001**0.5 if norm == "l2" else 1)
    assert ((length - length_exact).abs() <= (length_torch - length_exact).abs() + slack).all()
    torch.testing.assert_close(got[2].double(), exact[2], rtol=2e-2, atol=2e-2 * exact[2].abs().max().item())


@CASES
def test_an_infinity_in_one_tensor(norm, space):
    for spoil_z, bad, at in ((True, -math.inf, 3), (False, -math.inf, 20), (True, math.inf, 20), (False, math.inf, 3)):
        z, ref, labels = rows(1, 1, 37, dtype=torch.float32)
        (z if spoil_z else ref)[0, 0, at] = bad
        labels = torch.tensor([at])
        got = run("triton", z, ref, labels, 9.0, norm, space, torch.ones(1))
        expected = run("torch", z, ref, labels, 9.0, norm, space, torch.ones(1))
        torch.testing.assert_close(got[0], expected[0], equal_nan=True)
        assert torch.equal(got[1], expected[1]) and got[2].isnan().any() == expected[2].isnan().any()


@pytest.mark.parametrize("vocab", [64, 67])
def test_offsets_beyond_two_to_the_31(vocab):
    """Rows 2^31 and more elements apart, in memory of which only the pages that the rows touch come to exist."""
    apart = 2**31 + 16 * 5
    z, ref, labels = rows(1, 3, vocab, dtype=torch.bfloat16)
    far = torch.from_numpy(np.zeros(2 * apart + vocab, np.int16)).view(torch.bfloat16)
    views = [torch.as_strided(far, (1, 3, vocab), (0, apart, 1)), torch.as_strided(far, (3, 1, vocab), (apart, 0, 1))]
    labels = torch.tensor([1, 2, 3])
    options = (labels, 0.3, "linf", "log_probs")
    near = torch.as_strided(z.clone(), (1, 3, vocab), (0, vocab, 1))
    expected = run("triton", near, ref, *options, torch.ones(3))
    for view in views:
        far_z = view.copy_(z.view(view.shape))
        got = run("triton", far_z, ref.view(view.shape), *options, torch.ones(3))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[2].view(1, 3, vocab), expected[2])
        stats = hinge._margin_hinge_fwd_triton(far_z, ref.view(view.shape), *options, IGNORED)[2]
        hinge._margin_hinge_bwd_triton(
            far_z, torch.ones(3), far_z, ref.view(view.shape), labels, stats, *options[1:], IGNORED
        )
        assert torch.equal(far_z.reshape(1, 3, vocab), expected[2])
