"""The public ops on a CUDA device against their PyTorch references on the CPU. Skipped where there is none."""

import pytest
import torch

from quail_kernels import bucket_compare, dequantize, fake_quant, logit_margin_hinge, quantize
from quail_kernels.formats import WEIGHT_DTYPES
from quail_kernels.margin_hinge import NORMS, SPACES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
FORMATS = pytest.mark.parametrize(
    "format", ["bnb-nf4", "bnb-nf4@4096", "bnb-fp4", "ct-int4-sym", "ct-int4-sym@96", "minmax-int4", "minmax-int4@128"]
)


def weights(dtype, seed=0):
    w = torch.randn(3, 512, 768, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[0, 0] = 0
    return w.to(dtype)


@FORMATS
@DTYPES
def test_quantizing_is_the_references_bit_for_bit(format, dtype):
    w = weights(dtype)
    codes, scales = quantize(w.cuda(), format)
    expected_codes, expected_scales = quantize(w, format)
    assert torch.equal(codes.cpu(), expected_codes) and torch.equal(scales.cpu(), expected_scales)
    values = dequantize(codes, scales, format, shape=w.shape, dtype=dtype)
    assert torch.equal(values.cpu(), fake_quant(w, format))
    assert torch.equal(fake_quant(w.cuda(), format).cpu(), fake_quant(w, format))


@pytest.mark.parametrize("length", [1, 63, 64 * 9 + 7, 4096 * 2 + 130])
def test_short_last_blocks(length):
    w = weights(torch.bfloat16).flatten()[1000 : 1000 + length]
    for format in ("bnb-nf4", "bnb-fp4@128", "minmax-int4"):
        assert torch.equal(fake_quant(w.cuda(), format).cpu(), fake_quant(w, format))


@FORMATS
@DTYPES
@pytest.mark.parametrize("scales", ["own", "before"])
def test_buckets_are_counted_as_the_reference_counts(format, dtype, scales):
    before = weights(dtype)
    after = (before.float() + 1e-3 * weights(torch.float32, seed=1).sign()).to(dtype)
    got = bucket_compare(before.cuda(), after.cuda(), format, scales=scales).to_dict()
    again = bucket_compare(before.cuda(), after.cuda(), format, scales=scales).to_dict()
    expected = bucket_compare(before, after, format, scales=scales).to_dict()
    assert got == again
    for name, value in expected.items():
        assert got[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


@DTYPES
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_hinge_errs_no_more_than_pytorch_does(dtype, norm, space, vocabulary):
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(2, 9, vocabulary, generator=generator)).to(dtype)
    ref = (z.float() + 0.1 * torch.randn(z.shape, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, z.shape[:-1], generator=generator)
    labels[0, ::3] = -100
    margin = {"per_logit": 0.1, "l2": 60.0, "linf": 0.45, "label": 0.1}[norm]

    def run(z, ref, labels):
        z = z.detach().requires_grad_()
        loss = logit_margin_hinge(z, ref, labels, margin=margin, norm=norm, space=space)
        (grad,) = torch.autograd.grad(loss, z)
        return loss.detach().double().cpu(), grad.double().cpu()

    loss, grad = run(z.cuda(), ref.cuda(), labels.cuda())
    torch_loss, torch_grad = run(z, ref, labels)
    exact_loss, exact_grad = run(z.double(), ref.double(), labels)
    assert exact_loss > 0
    tolerance = 1e-5 * (1 if space == "logits" else 10)
    assert (loss - exact_loss).abs() <= (torch_loss - exact_loss).abs() + tolerance * exact_loss
    # A |d| within rounding of the margin or of 0 may take the other branch; few of millions do.
    far = (grad - exact_grad).abs() > (torch_grad - exact_grad).abs() + 1e-3 * exact_grad.abs().max()
    assert far.double().mean() < 1e-4
    assert not grad[labels == -100].any()
