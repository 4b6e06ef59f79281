"""The hinge: against fp64 Triton may err no more than PyTorch does in the same dtype, and a stated little."""

import importlib
import math

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
    other = run("triton", *views, flat, *options, grad_hinge, 64)
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
    """Ties in one lane of several blocks and in several lanes, after a smaller maximum of the same lane."""
    z = torch.zeros(1, 1, 64)
    z[0, 0, [0, 16, 17, 32]] = torch.tensor([0.25, 0.5, -0.5, 0.5])
    h, active, grad = run("triton", z, torch.zeros_like(z), None, 1.0, "linf", "logits", torch.ones(1), 16)
    assert h == 0.5 and active == 1
    expected = torch.zeros(64)
    expected[[16, 17, 32]] = torch.tensor([-1.0, 1.0, -1.0]) / 3
    assert torch.equal(grad[0, 0], expected)


def test_a_difference_equal_to_the_margin_is_outside():
    z = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]])
    for norm in NORMS:
        options = (1.0, norm, "logits", IGNORED)
        label = torch.tensor([2])
        h, active, stats = hinge._margin_hinge_fwd_triton(z * (0.5 if norm == "l2" else 1), z * 0, label, *options)
        assert h == 0 and active == 0 and stats[0, 3] == 0
