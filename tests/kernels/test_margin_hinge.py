import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from quail_kernels import logit_margin_hinge
from quail_kernels.margin_hinge import NORMS, SPACES

IGNORED = -100
MARGINS = {"per_logit": 0.1, "l2": 3.2, "linf": 0.35, "label": 0.1}  # between all and none of the rows below
CASES = pytest.mark.parametrize(("norm", "space"), [(norm, space) for norm in NORMS for space in SPACES])


def rows(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    ref = z + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    if labels.ndim:
        labels.view(-1)[1::5] = IGNORED
    return z.to(dtype), ref.to(dtype), labels


def naive(z, ref, labels, margin, norm, space):
    """One expression for autograd, in the dtype it is given."""
    if space == "log_probs":
        z, ref = z.log_softmax(-1), ref.log_softmax(-1)
    d = z - ref
    if norm == "per_logit":
        h = (margin - d.abs()).relu().mean(-1)
    elif norm == "l2":
        h = (margin - torch.linalg.vector_norm(d, dim=-1)).relu()
    elif norm == "linf":
        h = (margin - d.abs().amax(-1)).relu()
    else:
        h = (margin - d.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).abs()).relu()
    return h if labels is None else h * (labels != IGNORED)


@CASES
def test_against_autograd_in_fp64(norm, space):
    z, ref, labels = rows(4, 7, 1001, dtype=torch.float64)
    margin = MARGINS[norm]
    got, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
    h = logit_margin_hinge(got, ref, labels, margin=margin, norm=norm, space=space, reduction="none")
    h_naive = naive(expected, ref, labels, margin, norm, space)
    assert 0 < (h > 0).sum() < (labels != IGNORED).sum() or norm == "per_logit"
    torch.testing.assert_close(h, h_naive, rtol=1e-12, atol=1e-13)
    grad = torch.randn(h.shape, dtype=torch.float64)
    h.backward(grad)
    h_naive.backward(grad)
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-10, atol=1e-14)
    assert not got.grad[labels == IGNORED].any()


@CASES
def test_gradcheck_away_from_kinks(norm, space):
    torch.manual_seed(0)
    ref = torch.randn(3, 6, dtype=torch.float64)
    sign = torch.tensor([1, -1, 1, -1, 1, -1])
    # Distances from 0, from the margin and from each other are far above gradcheck's step of 1e-6.
    z = (ref + sign * torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.9])).requires_grad_()
    labels = torch.tensor([1, 2, IGNORED])
    margin = {"per_logit": 0.45, "l2": 5.0, "linf": 5.0, "label": 5.0}[norm]
    assert torch.autograd.gradcheck(
        lambda z: logit_margin_hinge(z, ref, labels, margin=margin, norm=norm, space=space), (z,)
    )


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reductions_and_active_share(norm, space, dtype):
    z, ref, labels = rows(2, 9, 257, dtype=dtype)
    margin = MARGINS[norm] / 2 if norm == "l2" else MARGINS[norm]
    options = dict(margin=margin, norm=norm, space=space)
    h = logit_margin_hinge(z, ref, labels, reduction="none", **options)
    assert h.dtype == torch.float32 and h.shape == labels.shape and not h[labels == IGNORED].any()
    kept = labels != IGNORED
    mean, share = logit_margin_hinge(z, ref, labels, return_active_share=True, **options)
    assert mean.item() == pytest.approx(h[kept].double().mean().item(), rel=1e-6)
    total = logit_margin_hinge(z, ref, labels, reduction="sum", **options)
    assert total.item() == pytest.approx(h.double().sum().item(), rel=1e-6)
    d = z.float() - ref.float()
    if space == "log_probs":
        d = z.float().log_softmax(-1) - ref.float().log_softmax(-1)
    size = {
        "per_logit": d.abs(),
        "l2": d.norm(dim=-1),
        "linf": d.abs().amax(-1),
        "label": d.gather(-1, labels.clamp(min=0)[..., None])[..., 0].abs(),
    }[norm]
    inside = (size < margin)[kept].double().mean().item()
    assert share.item() == pytest.approx(inside, abs=2 / size[kept].numel() if space == "log_probs" else 1e-6)
    if norm != "label":
        without = logit_margin_hinge(z[kept], ref[kept], **options)
        assert without.item() == pytest.approx(mean.item(), rel=1e-6)


def test_documented_gradients_where_autograd_has_a_choice():
    ref = torch.zeros(1, 4)
    z = torch.tensor([[0.0, 0.5, -0.5, 0.25]], requires_grad=True)
    expected = {
        "per_logit": [0, -0.25, 0.25, -0.25],
        "linf": [0, -0.5, 0.5, 0],
        "label": [0, 0, 1, 0],
    }
    for norm, grad in expected.items():
        z.grad = None
        logit_margin_hinge(z, ref, torch.tensor([2]), margin=1.0, norm=norm).backward()
        assert z.grad.tolist() == [grad], norm
    for norm in NORMS:
        at_zero = torch.zeros(1, 4, requires_grad=True)
        loss = logit_margin_hinge(at_zero, ref, torch.tensor([2]), margin=1.0, norm=norm)
        loss.backward()
        assert loss == 1 and not at_zero.grad.any(), norm
        at_margin = torch.tensor([[1.0, -1.0, 1.0, 1.0]], requires_grad=True)
        loss = logit_margin_hinge(at_margin, ref, torch.tensor([2]), margin=1.0, norm=norm)
        loss.backward()
        assert loss == 0 and not at_margin.grad.any(), norm
        arguments = (at_margin.detach(), ref, torch.tensor([2]), 1.0, norm, "logits", IGNORED, False)
        h, active, stats = torch.ops.quail.logit_margin_hinge(*arguments)
        assert h == 0 and active == 0 and stats[0, 3] == 0, "neither counted nor in the slope for log_probs"


def test_log_probs_close_the_hole_of_a_common_shift():
    ref = torch.randn(5, 100)
    shifted = ref + 3
    assert logit_margin_hinge(shifted, ref, margin=1.0) == 0
    assert logit_margin_hinge(shifted, ref, margin=1.0, space="log_probs").item() == pytest.approx(1, abs=1e-5)


@CASES
def test_nothing_to_average(norm, space):
    z, ref, _ = rows(3, 11)
    labels = torch.full((3,), IGNORED)
    z[0, 0] = math.nan  # an ignored row is not read
    z.requires_grad_()
    loss, share = logit_margin_hinge(z, ref, labels, margin=9.0, norm=norm, space=space, return_active_share=True)
    loss.backward()
    assert loss == 0 and share == 0 and not z.grad.any()
    empty = torch.zeros(0, 11, requires_grad=True)
    loss = logit_margin_hinge(empty, empty.detach(), labels[:0], margin=9.0, norm=norm, space=space)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 11)


@CASES
def test_nan_is_not_hidden(norm, space):
    z, ref, _ = rows(2, 11)
    labels = torch.tensor([3, 3])
    for bad in (math.nan, math.inf):
        spoiled, spoiled_ref = z.clone(), ref.clone()
        spoiled[0, 3] = bad
        spoiled_ref[0, 3] = bad
        spoiled.requires_grad_()
        h = logit_margin_hinge(spoiled, spoiled_ref, labels, margin=9.0, norm=norm, space=space, reduction="none")
        assert h[0].isnan() and h[1].isfinite()
        h.sum().backward()
        assert spoiled.grad[0].isnan().any() and spoiled.grad[1].isfinite().all()


@CASES
def test_strides_and_inplace_backward(norm, space):
    z, ref, labels = rows(3, 9, 64)
    options = dict(margin=MARGINS[norm] / 2 if norm == "l2" else MARGINS[norm], norm=norm, space=space)
    expected = z[:, :-1].clone().requires_grad_()
    loss = logit_margin_hinge(expected, ref[:, :-1].clone(), labels[:, 1:], **options)
    loss.backward()

    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    shifted = logit_margin_hinge(logits[:, :-1], ref[:, :-1], labels[:, 1:], inplace_backward=True, **options)
    shifted.backward()
    assert shifted == loss
    assert torch.equal(leaf.grad[:, :-1], expected.grad) and not leaf.grad[:, -1].any()
    assert torch.equal(logits.detach()[:, :-1], expected.grad), "the gradient lies over the logits"
    assert torch.equal(logits.detach()[:, -1], z[:, -1])

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits = leaf * 1
        again = logit_margin_hinge(logits, ref, labels, inplace_backward=True, **options)
        again.backward(retain_graph=True)
        again.backward()

    four = torch.stack([z, z]).requires_grad_()
    logit_margin_hinge(
        four, torch.stack([ref, ref]), torch.stack([labels, labels]), inplace_backward=True, **options
    ).backward()
    assert torch.equal(four.detach()[0], z)


def test_dtypes_may_differ_and_the_reference_gets_no_gradient():
    z, ref, labels = rows(6, 50)
    z, ref = z.bfloat16().requires_grad_(), ref.requires_grad_()
    loss = logit_margin_hinge(z, ref, labels, margin=0.1)
    assert loss.item() == pytest.approx(
        naive(z.float(), ref, None, 0.1, "per_logit", "logits")[labels != IGNORED].mean().item(), rel=1e-6
    )
    loss.backward()
    assert z.grad.dtype == torch.bfloat16 and ref.grad is None
    for_labels = logit_margin_hinge(z, ref, labels.int(), margin=0.1, norm="label")
    assert for_labels == logit_margin_hinge(z, ref, labels, margin=0.1, norm="label")
    one_row = logit_margin_hinge(z[0], ref[0], margin=0.1, reduction="none")
    assert one_row.shape == ()


@CASES
def test_opcheck(norm, space):
    z, ref, labels = rows(6, 20)
    options = (MARGINS[norm], norm, space, IGNORED)
    ops = torch.ops.quail
    opcheck(ops.logit_margin_hinge.default, (z.clone().requires_grad_(), ref, labels, *options, False))
    h, _, stats = ops.logit_margin_hinge(z, ref, labels, *options, False)
    arguments = (torch.randn_like(h), z, ref, labels, stats, *options)
    opcheck(ops.logit_margin_hinge_backward.default, arguments)
    opcheck(ops.logit_margin_hinge_backward_.default, arguments)


def test_compiles_without_a_graph_break():
    z, ref, labels = rows(2, 6, 33)

    def loss(z):
        hidden = z * 2
        hinge, share = logit_margin_hinge(
            hidden,
            ref,
            labels,
            margin=0.5,
            space="log_probs",
            inplace_backward=True,
            return_active_share=True,
        )
        return hinge + share

    eager, compiled = z.clone().requires_grad_(), z.clone().requires_grad_()
    a, b = loss(eager), torch.compile(loss, fullgraph=True)(compiled)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(eager.grad, compiled.grad)


def test_what_is_refused():
    z, ref, labels = rows(4, 10)
    bad_label = labels.clone()
    bad_label[0] = 10
    for call, says in [
        (
            lambda: logit_margin_hinge(z, ref, margin=1.0, norm="l1"),
            "norm: expected one of per_logit.*got 'l1'",
        ),
        (
            lambda: logit_margin_hinge(z, ref, margin=1.0, space="probs"),
            "space: expected one of logits, log_probs",
        ),
        (
            lambda: logit_margin_hinge(z, ref, margin=1.0, reduction="avg"),
            "reduction: expected one of mean, sum",
        ),
        *(
            (lambda m=m: logit_margin_hinge(z, ref, margin=m), "margin: expected a finite number above 0")
            for m in (0.0, -1, math.nan, math.inf, "1")
        ),
        (lambda: logit_margin_hinge(z, ref[:3], margin=1.0), r"ref_logits: expected the shape.*\[3, 10\]"),
        (lambda: logit_margin_hinge(z.int(), ref, margin=1.0), "logits: expected float32.*got torch.int32"),
        (lambda: logit_margin_hinge(z[:, :0], ref[:, :0], margin=1.0), r"logits: expected .*got \[4, 0\]"),
        (
            lambda: logit_margin_hinge(z, ref, margin=1.0, norm="label"),
            "labels: expected a tensor for norm 'label'",
        ),
        (lambda: logit_margin_hinge(z, ref, labels[:3], margin=1.0), r"labels: expected \[4\].*got \[3\]"),
        (lambda: logit_margin_hinge(z, ref, labels.float(), margin=1.0), "labels: expected int64 or int32"),
        (lambda: logit_margin_hinge(z, ref, bad_label, margin=1.0), "labels: expected 0 to 9 .*got 10"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_exports():
    class Loss(torch.nn.Module):
        def forward(self, z, ref, labels):
            return logit_margin_hinge(
                z, ref, labels, margin=6.0, norm="l2", space="log_probs", return_active_share=True
            )

    tokens = {1: torch.export.Dim("tokens", min=2, max=4096)}
    program = torch.export.export(Loss(), rows(2, 5, 33), dynamic_shapes=(tokens, tokens, tokens))
    assert any(node.target == torch.ops.quail.logit_margin_hinge.default for node in program.graph.nodes)
    longer = rows(2, 9, 33)
    loss, share = program.module()(*longer)
    assert loss > 0 and (loss, share) == Loss()(*longer)


def test_meta_tensors():
    z, ref, labels = (x.to("meta") for x in rows(2, 6, 33))
    z.requires_grad_()
    for h in (
        logit_margin_hinge(z, ref, labels, margin=1.0, reduction="none"),
        logit_margin_hinge(z[0, 0], ref[0, 0], margin=1.0, reduction="none"),
    ):
        h.sum().backward()
        assert h.device.type == z.grad.device.type == "meta" and h.dtype == torch.float32
    assert z.grad.shape == z.shape


def _on_two_ranks(rank, store):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, compared = init_device_mesh("cpu", (2,)), 0
    for shape in ((6, 33), (5, 33), (4, 3, 33), (3, 4, 33)):
        z, ref, labels = rows(*shape)
        labels_or_none = (labels, None) if len(shape) == 2 or shape[0] % 2 == 0 else (None,)
        for place in (Shard(0), Shard(len(shape) - 1), Replicate()):
            for y in labels_or_none:
                case = (shape, place, y is None)
                whole, sharded = z.clone().requires_grad_(), distribute_tensor(z, mesh, [place]).requires_grad_()
                sharded_ref = distribute_tensor(ref, mesh, [place])
                sharded_y = (
                    None if y is None else distribute_tensor(y, mesh, [Shard(0) if place.is_shard(0) else Replicate()])
                )
                options = dict(margin=0.3, norm="linf", space="log_probs", reduction="none", inplace_backward=True)
                h = logit_margin_hinge(sharded, sharded_ref, sharded_y, **options)
                expected = logit_margin_hinge(whole, ref, y, **options | {"inplace_backward": False})
                stays = place.is_shard(0) and (len(shape) == 2 or shape[0] % 2 == 0)
                assert h.placements == (Shard(0) if stays else Replicate(),), case
                assert torch.equal(h.full_tensor(), expected) and (expected > 0).any(), case
                h.sum().backward()
                expected.sum().backward()
                assert torch.equal(sharded.grad.full_tensor(), whole.grad), case
                loss = logit_margin_hinge(sharded, sharded_ref, sharded_y, margin=0.3).full_tensor()
                torch.testing.assert_close(loss, logit_margin_hinge(whole, ref, y, margin=0.3))
                compared += 1
    store.with_name(f"compared-{rank}").write_text(str(compared))
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts when it is torn down


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_tokens_sharded_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(_on_two_ranks, args=(tmp_path / "store",), nprocs=2)
    # Three placements of four shapes, with and without labels, but for the batch of 3 that ranks do not divide.
    assert [(tmp_path / f"compared-{rank}").read_text() for rank in range(2)] == ["21", "21"]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    vocab=st.one_of(st.integers(1, 40), st.just(50257)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_properties(data, vocab, dtype):
    """Any finite logits, ties and subnormals among them: close to fp64, the same twice, and through any strides."""
    norm, space = data.draw(st.sampled_from(NORMS)), data.draw(st.sampled_from(SPACES))
    margin = data.draw(st.sampled_from([1e-3, 0.25, 1.0, 8.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    # 1e-6 is more than fp32 loses beside a margin of 8: d is an fp32 difference, and may not round to m here.
    numbers = torch.tensor([0.0, -0.0, margin, -margin, margin / 2, 1e-6, -3.0, 2.0, 1e-40, 30.0])
    z = numbers[torch.randint(len(numbers), (3, vocab), generator=generator)].to(dtype)
    ref = torch.where(torch.rand(3, vocab, generator=generator) < 0.5, z, z.flip(0))
    labels = torch.tensor([0, IGNORED, vocab - 1])
    options = dict(margin=margin, norm=norm, space=space, reduction="none")

    def run(z, ref):
        z = z.detach().requires_grad_()
        h = logit_margin_hinge(z, ref, labels, **options)
        return h.detach(), torch.autograd.grad(h.sum(), z)[0]

    h, grad = run(z, ref)
    exact_h, exact_grad = run(z.double(), ref.double())
    # What a difference of two log-sum-exps may be wrong by: ulps of numbers up to 30 + log V.
    error = 1e-6 if space == "logits" else 2e-5
    scale = vocab**0.5 if norm == "l2" else 1
    torch.testing.assert_close(h.double(), exact_h, rtol=1e-5, atol=error * scale)
    assert h[1] == 0 and not grad[1].any() and (h >= 0).all() and (h <= margin).all()
    if space == "logits":
        # fp16 holds 1 / 50257 to three digits only, as a subnormal.
        torch.testing.assert_close(
            grad.double(), exact_grad, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
        )
    apart = torch.full((3, 2 * vocab + 3), math.nan, dtype=dtype)
    view = apart[:, 3::2].copy_(z)
    for again in (run(z, ref), run(view, ref)):
        assert torch.equal(again[0], h) and torch.equal(again[1], grad)


@settings(max_examples=100, deadline=None)
@given(
    case=st.sampled_from([(norm, space) for norm in NORMS for space in SPACES]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    in_z=st.booleans(),
    in_ref=st.booleans(),
    at=st.integers(0, 10),
)
def test_nan_and_infinity_are_never_a_silent_number(case, bad, in_z, in_ref, at):
    """A row is NaN, or what fp64 autograd says of it: an infinity in one tensor is a difference beyond the margin."""
    z, ref, _ = rows(2, 11)
    labels = torch.tensor([at, at])
    if in_z:
        z[0, at] = bad
    if in_ref:
        ref[0, at] = bad
    h = logit_margin_hinge(z, ref, labels, margin=9.0, norm=case[0], space=case[1], reduction="none")
    expected = naive(z.double(), ref.double(), labels, 9.0, *case)
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if in_z and in_ref or (in_z or in_ref) and math.isnan(bad):
        assert h[0].isnan()
    assert h[1].isfinite()
