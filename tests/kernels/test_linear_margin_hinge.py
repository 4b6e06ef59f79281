import importlib
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quail_kernels import LinearMarginHinge, linear_logit_margin_hinge, logit_margin_hinge
from quail_kernels.margin_hinge import NORMS, SPACES

linear = importlib.import_module("quail_kernels.linear_margin_hinge")

IGNORED = -100
MARGINS = {"per_logit": 0.1, "l2": 3.0, "linf": 0.4, "label": 0.15}  # between all and none of the tokens below
CASES = pytest.mark.parametrize(("norm", "space"), [(norm, space) for norm in NORMS for space in SPACES])
PLAIN = dict(logit_scale=1.0, softcap=None)
SHAPED = dict(logit_scale=0.5, softcap=4.0)


def models(*shape, features=24, vocab=307, dtype=torch.float32, bias=False, seed=0):
    """hidden, weight, ref_hidden, ref_weight, labels, and biases by name."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden, weight = randn(*shape, features), 0.4 * randn(vocab, features)
    ref_hidden, ref_weight = hidden + 0.05 * randn(*shape, features), weight + 0.02 * randn(vocab, features)
    bias_values = randn(vocab)
    ref_bias = bias_values + 0.05 * randn(vocab)
    biases = dict(bias=bias_values.to(dtype), ref_bias=ref_bias.to(dtype)) if bias else {}
    labels = torch.randint(vocab, shape, generator=generator)
    labels.view(-1)[1::5] = IGNORED
    return *(x.to(dtype) for x in (hidden, weight, ref_hidden, ref_weight)), labels, biases


def head(hidden, weight, bias, logit_scale, softcap):
    """Logits as transformers' models have them, but scale and softcap in fp32 and rounded once."""
    u = F.linear(hidden, weight, bias)
    z = u.to(torch.promote_types(u.dtype, torch.float32)) * logit_scale
    return (z if softcap is None else torch.tanh(z / softcap) * softcap).to(u.dtype)


def label_log_probs(logits, labels):
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none").view(labels.shape)


def eager(hidden, weight, ref_hidden, ref_weight, labels, *, bias=None, ref_bias=None, logit_scale, softcap, **options):
    z = head(hidden, weight, bias, logit_scale, softcap)
    z_ref = head(ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
    loss, share = logit_margin_hinge(z, z_ref, labels, return_active_share=True, **options)
    return LinearMarginHinge(loss, label_log_probs(z, labels), label_log_probs(z_ref, labels).detach(), share)


def differentiate(function, arguments, biases, upstream, **options):
    """Outputs, and gradients of hidden, weight and, where there is one, bias."""
    hidden, weight, *others = arguments
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    biases = dict(biases)
    if biases:
        biases["bias"] = biases["bias"].detach().clone().requires_grad_()
        leaves.append(biases["bias"])
    got = function(*leaves[:2], *others, **biases, **options)
    of_hinge, of_log_prob = (None if u is None else u.to(got.loss) for u in upstream)
    total = 0
    if of_hinge is not None:
        total = total + (got.loss * of_hinge).sum()
    if of_log_prob is not None:
        total = total + (got.label_log_probs * of_log_prob).sum()
    return got, torch.autograd.grad(total, leaves)


def upstream(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def in_fp64(arguments, biases):
    arguments = [x.double() if x.is_floating_point() else x for x in arguments]
    return arguments, {name: x.double() for name, x in biases.items()}


@CASES
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "scale-softcap-bias"])
def test_in_fp64_it_is_the_eager_path(norm, space, shape):
    *arguments, biases = models(3, 7, dtype=torch.float64, bias=shape is SHAPED)
    options = dict(margin=MARGINS[norm], norm=norm, space=space, reduction="none", **shape)
    got, grads = differentiate(
        linear_logit_margin_hinge, arguments, biases, upstream((3, 7)), chunk_tokens=5, **options
    )
    expected, expected_grads = differentiate(eager, arguments, biases, upstream((3, 7)), **options)
    assert 0 < (expected.loss > 0).sum()
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert not grads[0][arguments[-1] == IGNORED].any()


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "scale-softcap-bias"])
@pytest.mark.parametrize("parts", ["hinge", "both"])
def test_two_sided(norm, space, dtype, shape, parts):
    """Against fp64 on the same inputs, the op errs no more than the eager path, and a stated little."""
    *arguments, biases = models(64, vocab=1008, dtype=dtype, bias=shape is SHAPED)
    options = dict(margin=MARGINS[norm] * (2 if norm == "l2" else 1), norm=norm, space=space, reduction="none", **shape)
    given = upstream((64,)) if parts == "both" else (upstream((64,))[0], None)
    exact, exact_grads = differentiate(eager, *in_fp64(arguments, biases), given, **options)
    got, grads = differentiate(linear_logit_margin_hinge, arguments, biases, given, chunk_tokens=20, **options)
    other, eager_grads = differentiate(eager, arguments, biases, given, **options)
    ulp, eps = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    # Products of other shapes are summed in another order: a few ulp, in bf16 now and then half a step, of logits.
    largest = head(*arguments[:2], biases.get("bias"), **shape).abs().max()
    order = (4 * ulp if dtype == torch.float32 else eps / 2) * largest
    for name, a, b, c in zip(got._fields, got, other, exact, strict=True):
        if name != "active_share":
            assert (a - c).abs().max() <= (b - c).abs().max() + order + 4 * ulp * c.abs().max(), name
    # Gradients round once on the way from the hinge, once as those of logits, and once a block of the vocabulary.
    for name, a, b, c in zip(("hidden", "weight", "bias"), grads, eager_grads, exact_grads, strict=False):
        assert a.dtype == dtype and c.any()
        error, eager_error = (a - c).norm(), (b - c).norm()
        assert error <= eager_error + (eps if dtype == torch.bfloat16 else 8 * eps) * c.norm(), name


@CASES
def test_gradcheck_away_from_kinks(norm, space):
    torch.manual_seed(0)
    vocab, features = 40, 3
    hidden = torch.randn(5, features, dtype=torch.float64, requires_grad=True)
    weight = (0.3 * torch.randn(vocab, features, dtype=torch.float64)).requires_grad_()
    bias = torch.randn(vocab, dtype=torch.float64).requires_grad_()
    # d is this offset: distances from 0, from the margin and from each other are far above gradcheck's step.
    offset = torch.linspace(0.05, 0.9, vocab, dtype=torch.float64) * (1 - 2 * (torch.arange(vocab) % 2))
    ref = (hidden.detach().clone(), weight.detach().clone())
    labels = torch.tensor([1, 2, IGNORED, 17, 39])
    margin = {"per_logit": 0.451, "l2": 9.0, "linf": 5.0, "label": 5.0}[norm]

    options = dict(margin=margin, norm=norm, space=space, ref_bias=bias.detach() - offset, chunk_tokens=2)
    for shape in (PLAIN, dict(logit_scale=1.5, softcap=7.0)):

        def function(hidden, weight, bias, options=options | shape):
            return linear_logit_margin_hinge(hidden, weight, *ref, labels, bias=bias, **options)[:2]

        assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def npo(log_probs, ref_log_probs, beta=0.1):
    return -(2 / beta) * F.logsigmoid(-beta * (log_probs - ref_log_probs).sum(-1)).mean()


FORGET_LOSSES = {
    "gradient ascent": lambda got: got.label_log_probs.mean(),
    "npo": lambda got: npo(got.label_log_probs, got.ref_label_log_probs),
    "simnpo": lambda got: -F.logsigmoid(-2.5 * got.label_log_probs.mean(-1)).mean(),
}


@pytest.mark.parametrize("name", FORGET_LOSSES)
@pytest.mark.parametrize("with_hinge", [True, False])
def test_forget_losses_share_the_pass(name, with_hinge):
    hidden, weight, ref_hidden, ref_weight, labels, _ = models(3, 8, dtype=torch.float64)
    grads = []
    for function in (linear_logit_margin_hinge, eager):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        got = function(
            *leaves, ref_hidden, ref_weight, labels, margin=0.1, norm="per_logit", space="log_probs", **PLAIN
        )
        loss = FORGET_LOSSES[name](got) + (0.7 * got.loss if with_hinge else 0)
        grads.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 11])
def test_chunk_boundaries(norm, tokens):
    *arguments, biases = models(tokens, dtype=torch.float64, bias=True)
    options = dict(margin=MARGINS[norm], norm=norm, space="log_probs", reduction="none", **SHAPED)
    runs = [
        differentiate(linear_logit_margin_hinge, arguments, biases, upstream((tokens,)), chunk_tokens=chunk, **options)
        for chunk in (1024, 1, 4, 5)
    ]
    for got, grads in runs[1:]:
        for a, b in zip((*got, *grads), (*runs[0][0], *runs[0][1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("norm", ["per_logit", "linf"])
def test_sums_over_many_terms_keep_their_precision(norm):
    """bf16 gradients of 128 blocks are those of one, but for the rounding of the terms themselves."""
    hidden, weight, *others, _ = models(256, vocab=2048, features=16, dtype=torch.bfloat16)
    arguments = (hidden.abs(), weight.abs(), *others)  # terms of one sign, whose sum outgrows each of them
    options = dict(margin=9.0, norm=norm, space="logits", reduction="none")
    given = (torch.ones(256), -torch.ones(256))
    runs = [
        differentiate(linear_logit_margin_hinge, arguments, {}, given, chunk_tokens=chunk, **options)[1]
        for chunk in (2**30, 2)
    ]
    assert len(linear._blocks(256, 2048, 2, 2)) == 128
    for many, one in zip(*runs, strict=True):
        assert (many - one).double().norm() <= 2**-8 * one.double().norm()


def test_blocks_of_the_vocabulary_cover_it_once():
    for n, vocab, chunk in [(0, 50257, 1024), (1, 1, 1024), (4096, 128256, 1024), (4097, 50257, 1024), (5000, 2999, 1)]:
        blocks = linear._blocks(n, vocab, chunk, 2)
        assert [v for block in blocks for v in range(vocab)[block]] == list(range(vocab))
        assert all(block.start % 16 == 0 for block in blocks)
        assert n * blocks[0].stop <= max(n * 1024, chunk * vocab)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "scale-softcap-bias"])
@pytest.mark.parametrize(("tokens", "vocab", "chunk"), [(70, 3001, 20), (40, 5000, 7), (33, 3001, 64)])
def test_the_farthest_logits_are_found_again(space, dtype, shape, tokens, vocab, chunk):
    """The backward pass's logits are the forward pass's to the last bit: every token has a gradient of its own."""
    *arguments, biases = models(tokens, vocab=vocab, features=96, dtype=dtype, bias=shape is SHAPED)
    arguments[-1] = arguments[-1].clamp(min=0)
    options = dict(margin=1e3, norm="linf", space=space, reduction="none", chunk_tokens=chunk, **shape)
    assert len(linear._blocks(tokens, vocab, chunk, dtype.itemsize)) > 1
    ones = (torch.ones(tokens), None)
    _, (of_hidden, *_) = differentiate(linear_logit_margin_hinge, arguments, biases, ones, **options)
    assert of_hidden.abs().amax(dim=1).min() > 1e-3
    if space == "logits" and shape is PLAIN:
        # Of each token dL/dz sums to -1 over the farthest logits, up to signs, so that weights of 1 tell it.
        arguments[1][:, 0] = 1.0
        arguments[3][:, 0] = 1.0
        arguments[2] = arguments[0].clone()
        arguments[2][:, 0] += 20.0  # all differences have one sign
        _, (of_hidden, *_) = differentiate(linear_logit_margin_hinge, arguments, biases, ones, **options)
        torch.testing.assert_close(of_hidden[:, 0].float(), torch.ones(tokens), rtol=2**-7, atol=0)


@CASES
def test_ignored_tokens_do_not_count(norm, space):
    """Whatever they hold; and the others are as they are without them."""
    hidden, weight, ref_hidden, ref_weight, labels, biases = models(12, bias=True)
    kept = labels != IGNORED
    options = dict(margin=MARGINS[norm], norm=norm, space=space, **SHAPED)
    hidden[~kept], ref_hidden[~kept] = math.nan, math.inf
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logit_margin_hinge(*leaves, ref_hidden, ref_weight, labels, chunk_tokens=5, **biases, **options)
    loss = got.loss + got.label_log_probs.sum()
    grads = torch.autograd.grad(loss, leaves)
    alone = linear_logit_margin_hinge(
        hidden[kept], weight, ref_hidden[kept], ref_weight, labels[kept], chunk_tokens=5, **biases, **options
    )
    assert not got.label_log_probs[~kept].any() and not got.ref_label_log_probs[~kept].any()
    torch.testing.assert_close(got.label_log_probs[kept], alone.label_log_probs)
    torch.testing.assert_close((got.loss, got.active_share), (alone.loss, alone.active_share))
    expected = torch.autograd.grad(alone.loss + alone.label_log_probs.sum(), leaves)
    torch.testing.assert_close(grads, expected)
    assert not grads[0][~kept].any()


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_to_average(norm):
    *arguments, biases = models(3, bias=True)
    arguments[-1] = torch.full((3,), IGNORED)
    empty = [x[:0] if i in (0, 2, 4) else x for i, x in enumerate(arguments)]
    for case in (arguments, empty):
        leaves = [x.clone().requires_grad_() for x in case[:2]]
        got = linear_logit_margin_hinge(*leaves, *case[2:], **biases, margin=1.0, norm=norm)
        assert got.loss == 0 and got.active_share == 0 and not got.label_log_probs.any()
        (got.loss + got.label_log_probs.sum()).backward()
        assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(norm, reduction):
    *arguments, _ = models(2, 9, dtype=torch.bfloat16)
    options = dict(margin=MARGINS[norm], norm=norm, space="logits", reduction=reduction)
    got = linear_logit_margin_hinge(*arguments, **options)
    expected = eager(*arguments, **options, **PLAIN)
    assert got.loss.shape == expected.loss.shape and got.label_log_probs.shape == (2, 9)
    assert {x.dtype for x in got} == {torch.float32}
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-5, atol=1e-5)
    assert not got.ref_label_log_probs.requires_grad and not got.active_share.requires_grad


@CASES
def test_nan_is_not_hidden(norm, space):
    hidden, weight, ref_hidden, ref_weight, labels, biases = models(3, bias=True)
    labels[1] = 5
    hidden[0, 3] = math.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    options = dict(margin=9.0, norm=norm, space=space, reduction="none")
    got = linear_logit_margin_hinge(*leaves, ref_hidden, ref_weight, labels, **options)
    assert got.loss[0].isnan() and got.label_log_probs[0].isnan()
    assert got.loss[1:].isfinite().all() and got.label_log_probs[1:].isfinite().all()
    grad, _ = torch.autograd.grad(got.loss.sum() + got.label_log_probs.sum(), leaves)
    assert grad[0].isnan().all() and grad[1:].isfinite().all()
    masked = {name: bias.index_fill(0, labels[1:2], -math.inf) for name, bias in biases.items()}
    got = linear_logit_margin_hinge(*leaves, ref_hidden, ref_weight, labels, **masked, **options)
    assert got.loss[1].isnan() and got.label_log_probs[1] == -math.inf


def test_tied_embeddings():
    """One parameter is looked up for the hidden states and multiplies them: its gradients add up."""
    _, embedding, _, ref_weight, labels, _ = models(2, 6, vocab=50, dtype=torch.float64)
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(3))
    grads = []
    for function in (linear_logit_margin_hinge, eager):
        parameter = torch.nn.Parameter(embedding.clone())
        hidden = F.embedding(ids, parameter).tanh()
        options = dict(margin=0.3, norm="l2", space="log_probs", **PLAIN)
        got = function(hidden[:, :-1], parameter, hidden[:, :-1].detach() + 0.01, ref_weight, labels[:, 1:], **options)
        (got.loss + got.label_log_probs.mean()).backward()
        grads.append(parameter.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_models_may_differ():
    """Another hidden size and dtype of the reference, which gets no gradient; int32 labels; views of hidden states."""
    hidden, weight, _, _, labels, _ = models(2, 6, dtype=torch.bfloat16)
    _, _, ref_hidden, ref_weight, _, _ = models(2, 6, features=40, seed=1)
    ref_hidden.requires_grad_(), ref_weight.requires_grad_(), hidden.requires_grad_(), weight.requires_grad_()
    arguments = (hidden[:, :-1], weight, ref_hidden[:, :-1], ref_weight)
    options = dict(margin=2.0, norm="per_logit", space="logits")
    got = linear_logit_margin_hinge(*arguments, labels[:, 1:].int(), **options)
    expected = eager(*arguments, labels[:, 1:], **options, **PLAIN)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-5, atol=1e-5)
    (got.loss + got.label_log_probs.sum()).backward()
    assert ref_hidden.grad is None and ref_weight.grad is None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16 and not hidden.grad[:, -1].any()


def test_a_vocabulary_of_any_size():
    for vocab in (1, 2, 17, 50257):
        *arguments, _ = models(3, features=8, vocab=vocab, dtype=torch.bfloat16)
        options = dict(margin=0.1, norm="per_logit", space="logits", reduction="none", **PLAIN)
        got, grads = differentiate(linear_logit_margin_hinge, arguments, {}, upstream((3,)), **options)
        expected, expected_grads = differentiate(eager, arguments, {}, upstream((3,)), **options)
        torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-5, atol=2e-5)
        for a, b in zip(grads, expected_grads, strict=True):
            assert (a - b).abs().max() <= 2**-7 * b.abs().max()


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bit_equal(norm, space, dtype):
    *arguments, biases = models(40, dtype=dtype, bias=True)
    options = dict(margin=MARGINS[norm], norm=norm, space=space, chunk_tokens=7, **SHAPED)
    first, second = (
        differentiate(linear_logit_margin_hinge, arguments, biases, (torch.tensor(2.0), torch.ones(40)), **options)
        for _ in range(2)
    )
    assert all(map(torch.equal, (*first[0], *first[1]), (*second[0], *second[1])))


class Allocations(TorchDispatchMode):
    """What aten allocates: bytes alive, their peak, the numbers of elements, and the products it does."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.largest = self.products = 0
        self.known = set()

    def _free(self, key, size):
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in given and key not in self.known:
                    size = storage.nbytes()
                    self.known.add(key)
                    weakref.finalize(storage, self._free, key, size)
                    self.alive += size
                    self.largest = max(self.largest, size // tensor.element_size())
                    self.peak = max(self.peak, self.alive)
        return result


@pytest.fixture
def allocations(monkeypatch):
    """A mode that looks into the op, too."""
    mode = Allocations()

    def seen(function):
        def inside(*args):
            with mode:
                return function(*args)

        return inside

    for name in ("_forward", "_backward_of_blocks"):
        monkeypatch.setattr(linear, name, seen(getattr(linear, name)))
    return mode


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [PLAIN, SHAPED], ids=["plain", "scale-softcap-bias"])
def test_no_tensor_of_all_logits(norm, shape, allocations):
    tokens, vocab, chunk = 64, 4096, 16
    *arguments, biases = models(tokens, vocab=vocab, features=8, bias=shape is SHAPED)
    given = (torch.tensor(1.0), torch.ones(tokens))
    options = dict(margin=0.1, norm=norm, space="log_probs", **shape)
    with allocations:
        differentiate(linear_logit_margin_hinge, arguments, biases, given, chunk_tokens=chunk, **options)
    assert allocations.products and 0 < allocations.largest <= chunk * vocab
    allocations.largest = 0
    with allocations:
        differentiate(eager, arguments, biases, given, **options)
    assert allocations.largest >= tokens * vocab, "the eager path holds what this is about"


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_a_tenth(norm, space, dtype, allocations, monkeypatch):
    """The proportions of 4,096 tokens, a vocabulary of 128,256 and 2,048 features; inputs are not counted."""
    monkeypatch.setattr("quail_kernels.margin_hinge._CHUNK", 1 << 14)
    *arguments, _ = models(1024, vocab=4096, features=64, dtype=dtype)
    arguments[-1] = arguments[-1].clamp(min=0)  # every token counts
    gradients = sum(x.nbytes for x in arguments[:2])
    peaks = []
    for function, extra in ((eager, PLAIN), (linear_logit_margin_hinge, dict(chunk_tokens=512 // dtype.itemsize))):
        leaves = [x.clone().requires_grad_() for x in arguments[:2]]
        allocations.alive, allocations.peak = 0, 0
        with allocations:
            got = function(*leaves, *arguments[2:], margin=0.1, norm=norm, space=space, **extra)
            (got.loss + got.label_log_probs.mean()).backward()
        peaks.append(allocations.peak)
        assert all(leaf.grad is not None for leaf in leaves)
        del got, leaves
    assert peaks[1] - gradients < (peaks[0] - gradients) / 10, peaks
    assert peaks[1] < peaks[0] / 8, peaks


def test_work_that_is_not_needed_is_not_done(allocations):
    """Products of one chunk and block: two forward; backward one for each model's logits and one for each gradient."""
    hidden, weight, ref_hidden, ref_weight, labels, _ = models(8)

    def products(hidden, weight, loss):
        allocations.products = 0
        with allocations:
            got = linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, labels, margin=0.1)
        forward, allocations.products = allocations.products, 0
        with allocations:
            loss(got).backward()
        return forward, allocations.products

    def leaf(x):
        return x.clone().requires_grad_()

    def both(got):
        return got.loss + got.label_log_probs.sum()

    assert products(leaf(hidden), leaf(weight), both) == (2, 4)
    assert products(leaf(hidden), weight, both) == (2, 3), "a frozen head"
    assert products(hidden, leaf(weight), both) == (2, 3)
    assert products(leaf(hidden), weight, lambda got: got.loss) == (2, 3)
    assert products(leaf(hidden), weight, lambda got: got.label_log_probs.sum()) == (2, 2), "no reference"


@CASES
def test_opcheck(norm, space):
    hidden, weight, ref_hidden, ref_weight, labels, biases = models(6, vocab=40, bias=True)
    models_ = (hidden, weight, biases["bias"], ref_hidden, ref_weight, biases["ref_bias"], labels)
    options = (MARGINS[norm], norm, space, IGNORED, 0.5, 4.0, 4)
    ops = torch.ops.quail
    leaves = [x.clone().requires_grad_() for x in models_[:3]]
    opcheck(ops.linear_logit_margin_hinge.default, (*leaves, *models_[3:], *options))
    opcheck(
        ops.linear_logit_margin_hinge.default, (hidden, weight, None, ref_hidden, ref_weight, None, labels, *options)
    )
    hinge, _, log_prob, _, lse, stats = ops.linear_logit_margin_hinge(*models_, *options)
    for grads in ((torch.randn_like(hinge), torch.randn_like(log_prob)), (None, torch.randn_like(log_prob))):
        for needed in ([True, True, True], [True, False, False], [False, True, True]):
            arguments = (IGNORED, *grads, *models_, lse, stats, *options[:3], *options[4:], needed)
            opcheck(ops.linear_logit_margin_hinge_backward.default, arguments)


def test_compiles_without_a_graph_break():
    hidden, weight, ref_hidden, ref_weight, labels, _ = models(2, 6, vocab=33)

    def function(hidden, weight):
        got = linear_logit_margin_hinge(
            hidden * 2, weight, ref_hidden, ref_weight, labels, margin=0.5, space="log_probs", chunk_tokens=4
        )
        return got.loss + got.active_share + npo(got.label_log_probs, got.ref_label_log_probs)

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, hidden, weight, ref_hidden, ref_weight, labels):
            return linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, labels, margin=0.5, softcap=4.0)

    *arguments, _ = models(6)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    dynamic = [{0: tokens}, None, {0: tokens}, None, {0: tokens}]
    program = torch.export.export(Module(), tuple(arguments), dynamic_shapes=dynamic)
    assert any(node.target == torch.ops.quail.linear_logit_margin_hinge.default for node in program.graph.nodes)
    *others, _ = models(9, seed=5)
    torch.testing.assert_close(tuple(program.module()(*others)), tuple(Module()(*others)))


def test_under_autocast_the_heads_run_in_its_dtype():
    hidden, weight, ref_hidden, ref_weight, labels, biases = models(10, bias=True)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    arguments = (*leaves, ref_hidden, ref_weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_logit_margin_hinge(*arguments, margin=0.1, **biases)
    rounded = [x.bfloat16() if x.is_floating_point() else x for x in arguments]
    by_hand = linear_logit_margin_hinge(*rounded, margin=0.1, **{name: x.bfloat16() for name, x in biases.items()})
    assert all(map(torch.equal, got, by_hand)) and got.loss.dtype == torch.float32
    grads = torch.autograd.grad(got.loss + got.label_log_probs.sum(), leaves)
    assert [x.dtype for x in grads] == [torch.float32] * 2


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
def test_it_is_the_head_of_transformers_models(family):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: there is no model to compare with"
    )
    config = getattr(transformers, f"{family}Config")(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **{
            "Gemma2": {"final_logit_softcapping": 3.0},
            "Cohere": {"logit_scale": 0.25},
            "Granite": {"logits_scaling": 8.0},
        }[family],
    )
    shape = {
        "Gemma2": lambda: {"softcap": config.final_logit_softcapping},
        "Cohere": lambda: {"logit_scale": config.logit_scale},
        "Granite": lambda: {"logit_scale": 1 / config.logits_scaling},
    }[family]()
    torch.manual_seed(0)
    model, reference = (getattr(transformers, f"{family}ForCausalLM")(config).eval() for _ in range(2))
    ids = torch.randint(3, 100, (2, 9))
    hidden, ref_hidden = (m.model(ids).last_hidden_state[:, :-1] for m in (model, reference))
    weight, ref_weight = (m.get_output_embeddings().weight for m in (model, reference))
    got = linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, ids[:, 1:], margin=5.0, **shape)
    logits, ref_logits = (m(ids).logits[:, :-1] for m in (model, reference))
    loss, share = logit_margin_hinge(logits, ref_logits, ids[:, 1:], margin=5.0, return_active_share=True)
    assert loss > 0
    expected = (loss, label_log_probs(logits, ids[:, 1:]), label_log_probs(ref_logits, ids[:, 1:]), share)
    torch.testing.assert_close(tuple(got), expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    hidden, weight, ref_hidden, ref_weight, labels, biases = models(4, vocab=10)
    bad_label = labels.clone()
    bad_label[0] = 10

    def call(hidden=hidden, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight, labels=labels, **options):
        return linear_logit_margin_hinge(hidden, weight, ref_hidden, ref_weight, labels, **{"margin": 1.0, **options})

    for options, says in [
        (dict(norm="l1"), "norm: expected one of per_logit.*got 'l1'"),
        (dict(space="probs"), "space: expected one of logits, log_probs"),
        (dict(reduction="avg"), "reduction: expected one of mean, sum"),
        (dict(margin=0.0), "margin: expected a finite number above 0"),
        (dict(logit_scale=0), "logit_scale: expected a finite number above 0; got 0"),
        (dict(logit_scale=math.inf), "logit_scale: expected a finite number above 0; got inf"),
        (dict(softcap=0.0), "softcap: expected None or a finite number above 0; got 0.0"),
        (dict(softcap="30"), "softcap: expected None or a finite number above 0; got '30'"),
        (dict(chunk_tokens=0), "chunk_tokens: expected a whole number above 0; got 0"),
        (dict(hidden=hidden.int()), "^hidden: expected float32.*got torch.int32"),
        (dict(hidden=hidden[:, :0]), r"^hidden: expected \[..., features\].*got \[4, 0\]"),
        (dict(weight=weight[:, :5]), r"^weight: expected \[vocabulary, 24\].*got \[10, 5\]"),
        (dict(weight=weight[0]), r"^weight: expected \[vocabulary, 24\].*got \[24\]"),
        (dict(weight=weight[:0], ref_weight=ref_weight[:0]), r"^weight: expected .*got \[0, 24\]"),
        (dict(weight=weight.bfloat16()), "^weight: expected torch.float32 on cpu, as hidden is; got torch.bfloat16"),
        (dict(bias=torch.zeros(9)), r"^bias: expected \[10\]; got \[9\]"),
        (dict(ref_bias=torch.zeros(10).half()), "^ref_bias: expected torch.float32 on cpu, as ref_hidden is; got"),
        (dict(ref_hidden=ref_hidden[:3]), r"^ref_hidden: expected \[4, 'any'\] on cpu.*got \[3, 24\]"),
        (dict(ref_weight=ref_weight[:9]), "^ref_weight: expected 10 rows, as weight has; got 9"),
        (dict(labels=labels[:3]), r"^labels: expected \[4\].*got \[3\]"),
        (dict(labels=labels.float()), "^labels: expected int64 or int32; got torch.float32"),
        (dict(labels=bad_label), "^labels: expected 0 to 9 .*got 10"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            call(**options)
        assert "\n" not in str(caught.value)
