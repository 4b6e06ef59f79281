"""The kernels after the products, alone and in the whole op; the hinge's own kernels are tested beside it."""

import importlib
import math

import pytest
import torch

from quail_kernels.margin_hinge import NORMS, SPACES

linear = importlib.import_module("quail_kernels.linear_margin_hinge")

IGNORED = -100
ULP = torch.finfo(torch.float32).eps
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(("logit_scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 4.0), (0.5, 4.0)])


def padded(values):
    """The same values as the first columns of a buffer whose rest is NaN."""
    buffer = linear._buffer(*values.shape, values).fill_(math.nan)
    buffer[:, : values.shape[1]] = values
    return buffer[:, : values.shape[1]]


@DTYPES
@SHAPES
@pytest.mark.parametrize("vocab", [1, 37, 1024, 2500])
def test_logits_and_normalizers(dtype, logit_scale, softcap, vocab):
    torch.manual_seed(0)
    u = (torch.randn(6, vocab) * torch.tensor([0.01, 1, 3, 10, 1, 1])[:, None]).to(dtype)
    labels = torch.tensor([0, 0, 0, 0, IGNORED, 0])
    arguments = (labels, logit_scale, softcap, IGNORED)
    z, lse = padded(u), torch.full((6,), math.nan)
    linear._epilogue_fwd_triton(lse, z, *arguments, 1024)
    z_torch, lse_torch = u.clone(), torch.empty(6)
    linear._epilogue_fwd_torch(lse_torch, z_torch, *arguments)
    exact, lse_exact = u.double(), torch.empty(6, dtype=torch.float64)
    linear._epilogue_fwd_torch(lse_exact, exact, *arguments)

    kept = labels != IGNORED
    if dtype == torch.float32:
        error, bound = (z - exact).abs()[kept], (z_torch - exact).abs()[kept].max() + 8 * ULP * exact.abs()[kept]
        assert (error <= bound).all(), "a few fp32 roundings, relative to the logit itself even where it is small"
    else:
        half_step = torch.finfo(dtype).eps / 2 * (1 + 2**-8)
        assert ((z - exact).abs()[kept] <= half_step * exact.abs()[kept] + 1e-7).all(), "rounded once"
    # The normalizer is that of the logits as they are stored.
    of_stored = z.double().logsumexp(1)
    assert ((lse - of_stored).abs()[kept] <= 8 * ULP * (1 + of_stored.abs())[kept]).all()
    assert lse[4] == 0
    if logit_scale == 1 and softcap is None:
        assert torch.equal(z, u)

    again = padded(u)
    linear._epilogue_fwd_triton(None, again, *arguments, 1024)
    assert torch.equal(again, z)


@DTYPES
@SHAPES
@pytest.mark.parametrize("vocab", [37, 1024, 2500])
@pytest.mark.parametrize("parts", ["hinge", "log_prob", "both"])
def test_gradient_of_the_products(dtype, logit_scale, softcap, vocab, parts):
    torch.manual_seed(0)
    z = torch.randn(5, vocab).mul(2).clamp(-3.9, 3.9).to(dtype)
    of_hinge = torch.randn(5, vocab).to(dtype) if parts != "log_prob" else None
    grad_log_prob = torch.randn(5) if parts != "hinge" else None
    lse = z.double().logsumexp(1)
    labels = torch.tensor([0, vocab - 1, vocab, -1, vocab // 2])

    def run(impl, make, dtype, *block):
        out = make(z.to(dtype))
        arguments = (None if of_hinge is None else make(of_hinge.to(dtype)), lse.to(linear._arithmetic_dtype(out)))
        upstream = None if grad_log_prob is None else grad_log_prob.to(linear._arithmetic_dtype(out))
        getattr(linear, f"_epilogue_bwd_{impl}")(out, *arguments, upstream, labels, logit_scale, softcap, *block)
        return out

    got = run("triton", padded, dtype, 1024)
    expected = run("torch", torch.clone, dtype)
    exact = run("torch", torch.clone, torch.float64)
    assert exact[[0, 1, 2, 4]].any(dim=1).all() and not exact[3].any()
    assert not got[3].any(), "an ignored row"
    error, torch_error = (got - exact).abs().max(), (expected - exact).abs().max()
    # Both round fp32 results once to the dtype; before that a few operations on numbers as large as these.
    assert error <= torch_error + 8 * ULP * (1 + exact.abs().max())


def heads(dtype, tokens=7, features=16, vocab=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, features, generator=generator).to(dtype)
    weight = torch.randn(vocab, features, generator=generator).mul(0.5).to(dtype)
    ref_hidden = (hidden.float() + 0.05 * torch.randn(tokens, features, generator=generator)).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[1] = IGNORED
    return (hidden, weight, bias, ref_hidden, weight, bias, labels)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.float32, 6.0), (torch.bfloat16, None)])
def test_the_whole_op(norm, space, dtype, softcap):
    """Chunks of tokens and blocks of the vocabulary, as the Triton and the PyTorch kernels fill them."""
    *models, labels = heads(dtype)
    models[0] = models[0].clone()
    models[0][1] = math.nan  # an ignored row does not count
    margin = {"per_logit": 0.3, "l2": 9.0, "linf": 0.6, "label": 0.3}[norm]
    options = (margin, norm, space, IGNORED, 1.0, softcap, 3)
    torch.manual_seed(0)
    grads = torch.randn(7), torch.randn(7)
    outputs, gradients = [], []
    for kernels in (linear._TRITON, linear._TORCH):
        hinge, active, log_prob, ref_log_prob, lse, stats = linear._forward(kernels, *models, labels, *options)
        outputs.append((hinge, active, log_prob, ref_log_prob))
        arguments = (*models, labels, lse, stats, *options, [True, True, True])
        gradients.append(linear._backward_of_blocks(kernels, *grads, *arguments))
    assert 0 < (outputs[0][0] > 0).sum()
    for got, expected in zip(*outputs, strict=True):
        assert got.isfinite().all() and not got[1]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    slope_may_err = 0.0
    if norm == "l2" and space == "log_probs":
        # Its slope is weight times the sum of d over the vocabulary: a normalizer of either model that rounds to its
        # neighbour moves every d of the token. What has the slope goes by the probabilities, times states or weights.
        neighbours = 2 * torch.finfo(torch.float32).eps * lse.max().item()
        operands = max(x.float().nan_to_num(0).abs().max().item() for x in models[:2])
        slope_may_err = (
            neighbours * 300 * stats[:, 2].max().item() * max(g.abs().max().item() for g in grads) * operands
        )
    for got, expected in zip(*gradients, strict=True):
        assert got.isfinite().all() and got.any()
        # The products are the same bits; gradients of logits may round to neighbouring numbers of the dtype. Capped
        # logits, up to 6 large, are 8 ulp apart at most, as tested above, and l2 hands that on with their difference;
        # so are normalizers, of up to log(300) + 6 with the 1 of that bound.
        ulp = torch.finfo(dtype).eps
        handed_on = 6 * 8 + (0 if space == "logits" else 13 * 8)
        atol = (4 if softcap is None else handed_on) * ulp * expected.abs().max().item() + slope_may_err
        torch.testing.assert_close(got, expected, rtol=16 * ulp, atol=atol)
    hinge, active, log_prob, ref_log_prob, lse, stats = linear._forward(linear._TRITON, *models, labels, *options)
    arguments = (*models, labels, lse, stats, *options, [True, True, True])
    again = linear._backward_of_blocks(linear._TRITON, *grads, *arguments)
    assert all(map(torch.equal, again, gradients[0])), "two runs, the same bits"


@pytest.mark.parametrize("space", SPACES)
def test_odd_rows(space):
    *models, labels = heads(torch.float32)
    models[0] = models[0].clone()
    models[0][3, 0] = math.nan
    labels[4], labels[5] = 300, -1
    options = (9.0, "per_logit", space, IGNORED, 1.0, None, 3)
    hinge, active, log_prob, ref_log_prob, lse, stats = linear._forward(linear._TRITON, *models, labels, *options)
    assert hinge[3:6].isnan().all() and log_prob[3:6].isnan().all() and ref_log_prob[4:6].isnan().all()
    assert hinge[[0, 1, 2, 6]].isfinite().all() and log_prob[[0, 1, 2, 6]].isfinite().all()
    none = [x[:0] if i in (0, 3) else x for i, x in enumerate(models)]
    outputs = linear._forward(linear._TRITON, *none, labels[:0], *options)
    assert [x.shape[0] for x in outputs] == [0] * 6
    arguments = (*none, labels[:0], *outputs[4:], *options, [True, True, True])
    grads = linear._backward_of_blocks(linear._TRITON, outputs[0], outputs[2], *arguments)
    assert grads[0].shape == (0, 16) and not grads[1].any() and not grads[2].any()
