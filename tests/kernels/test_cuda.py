"""The public ops, compiled, on a CUDA device against their PyTorch references on the CPU.

Skipped where there is no CUDA device. ``QUAIL_DRY_GPU=1`` runs the same tests on the CPU, on smaller tensors and
with nothing compiled to machine code: that shows the tests themselves to be in order, and nothing of the kernels.
Only what the kernels need is imported: the file runs where bitsandbytes and the other libraries are not installed.
"""

import contextlib
import os
import warnings

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from quail_kernels import (
    FORMATS,
    bucket_compare,
    dequantize,
    fake_quant,
    linear_logit_margin_hinge,
    logit_margin_hinge,
    quantize,
)
from quail_kernels.formats import WEIGHT_DTYPES
from quail_kernels.margin_hinge import NORMS, SPACES

DRY = os.environ.get("QUAIL_DRY_GPU") == "1"
DEVICE = "cpu" if DRY else "cuda"
BACKEND = "aot_eager" if DRY else "inductor"

pytestmark = pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="no CUDA device")

SPECIAL_SIZES = ["bnb-nf4@32", "bnb-nf4@4096", "bnb-fp4@256", "ct-int4-sym@8", "ct-int4-sym@96", "minmax-int4@128"]
RULES = ["bnb-nf4", "bnb-fp4", "ct-int4-sym@96", "minmax-int4"]

dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
formats = pytest.mark.parametrize("format", [*FORMATS, *SPECIAL_SIZES])
few_formats = pytest.mark.parametrize("format", RULES)
norms = pytest.mark.parametrize("norm", NORMS)
spaces = pytest.mark.parametrize("space", SPACES)

# 768 columns: groups of 96 and of 128 divide them. Some groups are zero, and the sizes of tiles do not divide all.
SHAPE = (3, 8, 768) if DRY else (3, 512, 768)


def weights(dtype=torch.bfloat16, shape=SHAPE, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w.view(-1)[:768] = 0
    return w.to(dtype)


def pair(dtype=torch.bfloat16, shape=SHAPE):
    before = weights(dtype, shape)
    return before, (before.float() + 1e-3 * weights(torch.float32, shape, seed=1).sign()).to(dtype)


def rows(vocabulary, dtype=torch.bfloat16, batch=2, tokens=9):
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(batch, tokens, vocabulary, generator=generator)).to(dtype)
    ref = (z.float() + 0.1 * torch.randn(z.shape, generator=generator)).to(dtype)
    labels = torch.randint(vocabulary, z.shape[:-1], generator=generator)
    labels[0, ::3] = -100
    return z, ref, labels


def margin(norm, vocabulary):
    """Between the values that the rows have, so that both branches are taken."""
    return {"per_logit": 0.1, "l2": 0.19 * vocabulary**0.5, "linf": 0.45, "label": 0.1}[norm]


def hinge_step(z, ref, labels, **options):
    z = z.detach().requires_grad_()
    loss = logit_margin_hinge(z, ref, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, z)


def hidden_states(dtype=torch.bfloat16, vocabulary=257, batch=2, tokens=9, dim=64):
    """(hidden, ref_hidden, labels), and the two heads: logits of both differ by about a tenth of their size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, tokens, dim, generator=generator)
    head = torch.randn(vocabulary, dim, generator=generator) / dim**0.5
    refs = (x + 0.1 * torch.randn(x.shape, generator=generator) * x.std() for x in (hidden, head))
    labels = torch.randint(vocabulary, hidden.shape[:-1], generator=generator)
    labels[0, ::3] = -100
    ref_hidden, ref_head = (x.to(dtype) for x in refs)
    return (hidden.to(dtype), ref_hidden, labels), (head.to(dtype), ref_head)


def linear_hinge_step(hidden, ref_hidden, labels, heads, **options):
    """The hinge and the labels' log-probabilities of the op that takes hidden states, with the gradient of both."""
    leaves = [x.detach().requires_grad_() for x in (hidden, heads[0])]
    result = linear_logit_margin_hinge(*leaves, ref_hidden, heads[1], labels, **options)
    loss = result.loss.sum() + result.label_log_probs.square().sum()
    return result.loss.detach(), result.label_log_probs.detach(), *torch.autograd.grad(loss, leaves)


def on_device(*tensors, device=DEVICE):
    moved = tuple(x.to(device) for x in tensors)
    return moved if len(moved) > 1 else moved[0]


def same(got, expected):
    """Bit for bit, NaN equal to itself, wherever the tensors are."""
    if isinstance(expected, torch.Tensor):
        got, expected = got.detach().cpu(), expected.detach().cpu()
        return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(bits(got), bits(expected))
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(same(g, e) for g, e in zip(got, expected, strict=True))
    return got == expected


def bits(x):
    # Signed zeros differ in their bits, and are kept apart.
    return x.contiguous().view(torch.uint8) if x.ndim else x[None].view(torch.uint8)


def counts(before, after, format, **options):
    return bucket_compare(before, after, format, **options).to_dict()


def assert_counted_alike(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Counts are equal; fp64 sums of fp32 numbers are taken in another order.
        assert got[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


@contextlib.contextmanager
def no_synchronisation():
    """Raises where PyTorch waits for the device: .item(), a copy from or to pageable memory, nonzero."""
    if DRY:
        yield
        return
    with warnings.catch_warnings():
        # That the mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs_memory(gigabytes):
    if DRY:
        return
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free / 1e9:.1f} GB are free")


def every_op(format="bnb-nf4"):
    """(name, function of tensors on the device that gives tensors, the CPU tensors): each op once, with backward."""

    def train(w):
        w = w.detach().requires_grad_()
        w_q = fake_quant(w, format)
        return w_q.detach(), *torch.autograd.grad(w_q.float().square().sum(), w)

    def round_trip(w):
        codes, scales = quantize(w, format)
        return codes, scales, dequantize(codes, scales, format, shape=w.shape, dtype=w.dtype)

    def compare(before, after):
        compared = bucket_compare(before, after, format, per_group=True)
        return compared.code_distance, compared.same_value, compared.zero_groups, compared.group_same_code

    def hinge(norm, space):
        options = {"margin": margin(norm, 257), "norm": norm, "space": space}
        return lambda z, ref, labels: hinge_step(z, ref, labels, **options)

    def in_place(z, ref, labels):
        return hinge_step(z.clone(), ref, labels, margin=0.1, inplace_backward=True)

    def from_hidden(norm, space, **options):
        heads, options = {"cpu": hidden_states()[1]}, {"margin": 0.1, "norm": norm, "space": space} | options

        def step(hidden, ref_hidden, labels):
            device = str(hidden.device)
            if device not in heads:
                heads[device] = on_device(*heads["cpu"], device=hidden.device)
            return linear_hinge_step(hidden, ref_hidden, labels, heads[device], **options)

        return step

    ops = [("fake_quant", train, (weights(),)), ("quantize", round_trip, (weights(),))]
    ops.append(("bucket_compare", compare, pair()))
    ops += [(f"hinge-{norm}-{space}", hinge(norm, space), rows(257)) for norm in NORMS for space in SPACES]
    ops.append(("hinge-in-place", in_place, rows(257)))
    states = hidden_states()[0]
    ops += [(f"linear-hinge-{norm}", from_hidden(norm, "log_probs"), states) for norm in NORMS]
    ops.append(("linear-hinge-softcap", from_hidden("per_logit", "logits", softcap=5.0, logit_scale=0.5), states))
    return [pytest.param(function, tensors, id=name) for name, function, tensors in ops]


each_op = pytest.mark.parametrize(("function", "tensors"), every_op())


@formats
@dtypes
def test_quantizing_is_the_references_bit_for_bit(format, dtype):
    w = weights(dtype)
    codes, scales = quantize(on_device(w), format)
    expected_codes, expected_scales = quantize(w, format)
    assert same(codes, expected_codes)
    assert same(scales, expected_scales)
    expected = fake_quant(w, format)
    assert same(dequantize(codes, scales, format, shape=w.shape, dtype=dtype), expected)
    assert same(fake_quant(on_device(w), format), expected)


@formats
@dtypes
@pytest.mark.parametrize("scales", ["own", "before"])
def test_buckets_are_counted_as_the_reference_counts(format, dtype, scales):
    before, after = pair(dtype)
    got = counts(*on_device(before, after), format, scales=scales)
    assert_counted_alike(got, counts(before, after, format, scales=scales))
    assert 0 < got["same_code"] < got["total"]


@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-nf4@4096", "ct-int4-sym@96", "minmax-int4@128"])
def test_buckets_are_counted_for_each_group(format):
    before, after = pair()
    got = bucket_compare(*on_device(before, after), format, per_group=True)
    expected = bucket_compare(before, after, format, per_group=True)
    assert same(got.group_same_code, expected.group_same_code)
    assert same(got.group_total, expected.group_total)


@pytest.mark.parametrize("length", [1, 63, 64 * 9 + 7, 4096 * 2 + 130])
@pytest.mark.parametrize("format", ["bnb-nf4", "bnb-fp4@128", "minmax-int4"])
def test_short_last_blocks(length, format):
    before, after = (w.flatten()[700 : 700 + length] for w in pair())
    assert same(fake_quant(on_device(before), format), fake_quant(before, format))
    assert same(quantize(on_device(before), format), quantize(before, format))
    assert_counted_alike(counts(*on_device(before, after), format), counts(before, after, format))


@dtypes
@norms
@spaces
@pytest.mark.parametrize("vocabulary", [320, 257] if DRY else [32000, 50257])
def test_hinge_errs_no_more_than_pytorch_does(dtype, norm, space, vocabulary):
    z, ref, labels = rows(vocabulary, dtype)
    options = {"margin": margin(norm, vocabulary), "norm": norm, "space": space}
    if norm == "linf":
        # Most rows' largest |d| lie below it, by enough for the loss not to be all rounding.
        options["margin"] = 1.1 * (z.float() - ref.float()).abs().amax(dim=-1).median().item()

    def run(z, ref, labels):
        return tuple(x.double().cpu() for x in hinge_step(z, ref, labels, **options))

    loss, grad = run(*on_device(z, ref, labels))
    torch_loss, torch_grad = run(z, ref, labels)
    exact_loss, exact_grad = run(z.double(), ref.double(), labels)
    assert exact_loss > 0
    tolerance = 1e-5 * (1 if space == "logits" else 10)
    assert (loss - exact_loss).abs() <= (torch_loss - exact_loss).abs() + tolerance * exact_loss
    # A |d| within rounding of the margin or of 0 may take the other branch; few of millions do.
    far = (grad - exact_grad).abs() > (torch_grad - exact_grad).abs() + 1e-3 * exact_grad.abs().max()
    assert far.double().mean() < 1e-4
    assert not grad[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@norms
@spaces
@pytest.mark.parametrize("vocabulary", [257] if DRY else [4096, 50257])
def test_hinge_from_hidden_states_errs_no_more_than_pytorch_does(dtype, norm, space, vocabulary):
    states, heads = hidden_states(dtype, vocabulary, tokens=40)
    # Rows that count as no token may hold anything.
    ignored = states[2] == -100
    states[0][ignored], states[1][ignored] = float("nan"), float("inf")
    # One hinge a token, below the margin in all: no branch hangs on the last bit. linf has its own in the gradient.
    options = {"norm": norm, "space": space, "reduction": "none", "chunk_tokens": 32, "margin": 1e3}

    def run(states, heads):
        loss, log_probs, *grads = linear_hinge_step(*states, heads, **options)
        return [x.double().cpu() for x in (loss, log_probs, *(() if norm == "linf" else grads))]

    got = run(on_device(*states), on_device(*heads))
    of_torch = run(states, heads)
    exact = run([x.double() if x.is_floating_point() else x for x in states], [x.double() for x in heads])
    for mine, torchs, true in zip(got, of_torch, exact, strict=True):
        # Sums are taken in another order: twice PyTorch's error, and fp32 rounding where that has none.
        bound = 2 * (torchs - true).abs().max() + 1e-5 * true.abs().max()
        assert (mine - true).abs().max() <= bound
    assert not got[0][ignored].any() and not got[1][ignored].any()
    assert norm == "linf" or not got[2][ignored].any()


def test_labels_outside_the_vocabulary():
    """To refuse them would synchronise: on the device they make NaN."""
    states, heads = hidden_states()
    states[2][1, 1] = 257
    if DRY:
        with pytest.raises(ValueError, match="labels: expected 0 to 256"):
            linear_hinge_step(*states, heads, margin=1.0)
        return
    moved, heads = on_device(*states), on_device(*heads)
    hidden, ref_hidden, labels = moved
    got = linear_logit_margin_hinge(hidden, heads[0], ref_hidden, heads[1], labels, margin=1.0, reduction="none")
    for of_tokens in (got.loss, got.label_log_probs, got.ref_label_log_probs):
        assert of_tokens[1, 1].isnan() and of_tokens[1, 2:].isfinite().all()


def test_a_synchronisation_would_be_seen():
    one = torch.ones(1, device=DEVICE)
    seen = contextlib.nullcontext() if DRY else pytest.raises(RuntimeError, match="synchroniz")
    with seen, no_synchronisation():
        assert one.item() == 1


@each_op
def test_nothing_synchronises(function, tensors):
    moved = on_device(*tensors)
    moved = moved if isinstance(moved, tuple) else (moved,)
    expected = function(*moved)
    with no_synchronisation():
        got = function(*moved)
    assert same(got, expected)


@each_op
def test_two_runs_are_bit_equal(function, tensors):
    moved = on_device(*tensors)
    moved = moved if isinstance(moved, tuple) else (moved,)
    first = function(*moved)
    for _ in range(3):
        assert same(function(*moved), first)


@few_formats
def test_sums_are_bit_equal_in_two_runs(format):
    moved = on_device(*pair())
    first = counts(*moved, format)
    assert all(counts(*moved, format) == first for _ in range(3))


def test_compiled_is_eager_without_a_graph_break():
    w, after = on_device(*pair())
    z, ref, labels = on_device(*rows(257))

    def all_ops(w, after, z):
        codes, scales = quantize(w, "bnb-nf4", 128)
        back = dequantize(codes, scales, "bnb-nf4@128", shape=w.shape, dtype=w.dtype)
        w_q = fake_quant(w, "ct-int4-sym@96")
        kept = bucket_compare(w, after, "bnb-nf4").same_code
        loss = logit_margin_hinge(z, ref, labels, margin=0.1, space="log_probs")
        return w_q, codes, scales, back, kept, loss

    def run(function):
        leaves = [x.detach().clone().requires_grad_() for x in (w, z)]
        w_q, codes, scales, back, kept, loss = function(leaves[0], after, leaves[1])
        grads = torch.autograd.grad(w_q.float().sum() + loss, leaves)
        return (w_q, codes, scales, back, kept, *grads), loss

    try:
        got, loss = run(torch.compile(all_ops, fullgraph=True, backend=BACKEND))
    finally:
        torch.compiler.reset()
    expected, eager_loss = run(all_ops)
    # The mean over tokens is inductor's own reduction, and so is the gradient's factor.
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(got[-1], expected[-1])
    assert same(got[:-1], expected[:-1])


class _Calls(TorchDispatchMode):
    """The calls of this package's ops, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "quail":
            self.found.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@each_op
def test_every_op_that_is_called_passes_opcheck(function, tensors):
    moved = on_device(*(x[:1] if x.ndim > 1 else x for x in tensors))
    with _Calls() as calls:
        function(*(moved if isinstance(moved, tuple) else (moved,)))
    assert calls.found
    for op, args, kwargs in calls.found:
        opcheck(op, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args), kwargs)
        if op.overloadpacket._qualified_op_name in ("quail::fake_quant", "quail::logit_margin_hinge"):
            opcheck(op, (args[0].detach().requires_grad_(), *args[1:]), kwargs)


@few_formats
def test_not_contiguous(format):
    before, after = pair(shape=(768, 96))
    views = on_device(before, after)
    views = tuple(w.t() for w in views)
    expected = tuple(w.t().contiguous() for w in (before, after))
    assert not views[0].is_contiguous()
    assert same(fake_quant(views[0], format), fake_quant(expected[0], format))
    assert same(quantize(views[0], format), quantize(expected[0], format))
    assert_counted_alike(counts(*views, format), counts(*expected, format))


@norms
@spaces
def test_logits_of_any_strides(norm, space):
    z, ref, labels = rows(258, torch.float32, tokens=10)
    options = {"margin": margin(norm, 257), "norm": norm, "space": space}
    device_z, device_ref, device_labels = on_device(z, ref, labels)
    # Without the last token and the first logit, unaligned; the reference's logits lie with tokens innermost.
    z, ref, labels = z[:, :-1, 1:], ref[:, :-1, 1:], labels[:, :-1] % 257
    device_z, device_labels = device_z[:, :-1, 1:], device_labels[:, :-1] % 257
    device_ref = device_ref[:, :-1, 1:].transpose(1, 2).contiguous().transpose(1, 2)
    assert not device_z.is_contiguous() and not device_ref.is_contiguous()
    got = hinge_step(device_z, device_ref, device_labels, **options)
    expected = hinge_step(z, ref, labels, **options)
    torch.testing.assert_close(got[0].cpu(), expected[0])
    torch.testing.assert_close(got[1].cpu(), expected[1])


@pytest.mark.parametrize("format", [*RULES, "minmax-int4@128"])
@pytest.mark.parametrize("shape", [(0,), (0, 768), (3, 0, 768)])
def test_empty(format, shape):
    w = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1 and format == "ct-int4-sym@96":
        shape = (0, 96)
    w = w.reshape(shape)
    moved = on_device(w)
    assert same(fake_quant(moved, format), fake_quant(w, format))
    codes, scales = quantize(moved, format)
    assert same((codes, scales), quantize(w, format))
    assert dequantize(codes, scales, format, shape=shape, dtype=w.dtype).shape == shape
    assert bucket_compare(moved, moved, format).total == 0
    assert int(bucket_compare(moved, moved, format).same_code) == 0


@pytest.mark.parametrize("norm", ["per_logit", "l2", "linf", "label"])
def test_no_tokens(norm):
    z, labels = torch.empty(2, 0, 320), torch.empty(2, 0, dtype=torch.int64)
    loss, grad = hinge_step(*on_device(z, z, labels), margin=1.0, norm=norm)
    assert loss == 0 and grad.shape == z.shape


@few_formats
@dtypes
def test_unaligned_views(format, dtype):
    flat = [w.flatten() for w in pair(dtype, (97, 768))]
    views = [w[1:][: 96 * 768].view(96, 768) for w in flat]
    on = [w[1:][: 96 * 768].view(96, 768) for w in on_device(*flat)]
    assert on[0].is_contiguous() and on[0].data_ptr() % 16
    assert same(fake_quant(on[0], format), fake_quant(views[0], format))
    codes, scales = quantize(views[0], format)
    assert same(quantize(on[0], format), (codes, scales))
    shifted = on_device(torch.cat([codes[:1], codes]))[1:]
    values = dequantize(shifted, on_device(scales), format, shape=views[0].shape, dtype=dtype)
    assert same(values, fake_quant(views[0], format))
    assert_counted_alike(counts(*on, format), counts(*views, format))


# On a GPU 2^31 elements and one piece more: each op on a piece that is repeated.
PIECE = 96 * 2**7 if DRY else 96 * 2**14
PIECES = 3 if DRY else 2**31 // PIECE + 2


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym@96", "minmax-int4"])
def test_more_than_2_to_the_31_weights(format):
    needs_memory(24)
    piece = weights(shape=(PIECE // 768, 768))
    w = on_device(piece).repeat(PIECES, 1)
    assert DRY or w.numel() > 2**31
    expected = on_device(fake_quant(piece, format))
    codes, scales = quantize(w, format)
    for values in (fake_quant(w, format), dequantize(codes, scales, format, shape=w.shape, dtype=w.dtype)):
        assert all(torch.equal(part, expected) for part in values.split(len(piece)))
        del values
    piece_codes = on_device(quantize(piece, format)[0])
    assert all(torch.equal(part, piece_codes) for part in codes.split(len(piece_codes)))


@pytest.mark.parametrize("format", ["bnb-nf4", "ct-int4-sym@96", "minmax-int4"])
def test_more_than_2_to_the_31_weights_are_counted(format):
    needs_memory(24)
    pieces = pair(shape=(PIECE // 768, 768))
    before, after = (x.repeat(PIECES, 1) for x in on_device(*pieces))
    got, once = bucket_compare(before, after, format), bucket_compare(*pieces, format)
    assert got.total == PIECES * PIECE
    assert same(got.code_distance, once.code_distance * PIECES)
    assert same(got.same_value, once.same_value * PIECES)
    assert got.sum_abs_change.item() == pytest.approx(once.sum_abs_change.item() * PIECES, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_more_than_2_to_the_31_logits(space):
    needs_memory(24)
    vocabulary = 257 if DRY else 50257
    z, ref, labels = rows(vocabulary, batch=1, tokens=64)
    copies = 3 if DRY else 2**31 // z.numel() + 2
    options = {"margin": 0.1, "space": space, "reduction": "sum"}
    once, grad_once = hinge_step(*on_device(z, ref, labels), **options)
    moved = [x.repeat(copies, *(1,) * (x.ndim - 1)) for x in on_device(z, ref, labels)]
    assert DRY or moved[0].numel() > 2**31
    loss, grad = hinge_step(*moved, **options)
    torch.testing.assert_close(loss / copies, once, rtol=1e-4, atol=0)
    assert all(torch.equal(part, grad_once) for part in grad.split(1))


@each_op
def test_launched_on_the_stream_that_is_current(function, tensors):
    if DRY:
        stream, side = None, contextlib.nullcontext()
    else:
        stream = torch.cuda.Stream()
        side = torch.cuda.stream(stream)
        busy = torch.zeros(4096, 4096, device=DEVICE)
    moved = on_device(*tensors)
    moved = moved if isinstance(moved, tuple) else (moved,)
    expected = function(*moved)
    late = [torch.zeros_like(x) for x in moved]
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with side:
        if stream is not None:
            # The inputs come late: a launch on another stream would read the zeros.
            for _ in range(20):
                busy @ busy
        for x, y in zip(late, moved, strict=True):
            x.copy_(y)
        got = function(*late)
    if stream is not None:
        stream.synchronize()
    assert same(got, expected)


@each_op
def test_on_a_device_that_is_not_current(function, tensors):
    if not DRY and torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second CUDA device, found {torch.cuda.device_count()}")
    device = "cpu" if DRY else "cuda:1"
    moved, there = on_device(*tensors), on_device(*tensors, device=device)
    if not isinstance(moved, tuple):
        moved, there = (moved,), (there,)
    got = function(*there)
    assert all(x.device == torch.device(device) for x in got)
    assert same(got, function(*moved))


@formats
def test_nan_and_infinity_are_never_hidden(format):
    w = weights(torch.float32, (8, 768))
    w[1, 5], w[3, 700] = float("nan"), float("inf")
    got = fake_quant(on_device(w), format).cpu()
    expected = fake_quant(w, format)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
    assert not got[1, 5].isfinite() and not got[3, 700].isfinite()
