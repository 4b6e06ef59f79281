r"""The logit margin hinge: unlearned logits z must differ from the original ones by a margin m.

The QUAIL paper (https://arxiv.org/abs/2601.15538) asks for a difference of at least half a quantization step.
With d = z - z_ref, differences in fp32, and V the size of the vocabulary, the hinge of one token is

    per_logit   h = 1/V sum_v max(0, m - |d_v|)     dh/dd_v = -sign(d_v) / V      where |d_v| < m
    l2          h = max(0, m - ||d||_2)             dh/dd_v = -d_v / ||d||_2      where ||d||_2 < m
    linf        h = max(0, m - max_v |d_v|)         dh/dd_v = -sign(d_v) / ties   where |d_v| = max |d| < m
    label       h = max(0, m - |d_label|)           dh/dd_v = -sign(d_v)          where v = label, |d_v| < m

and everything else is 0: at d = 0, too, as PyTorch has it for |.| and for norms, so that the hinge alone
never starts from z = z_ref. Several maxima share the gradient of linf evenly, as in torch.amax.

``space="log_probs"`` takes d between the log-softmaxes, d_v = (z_v - z_ref_v) - (lse - lse_ref). A softmax
does not see a constant added to all logits, and the hinge on raw logits can be satisfied by one; here it
cannot. With g = dh/dd,

    dh/dz_v = g_v - softmax(z)_v sum_u g_u

The forward pass reads both logits once (log_probs: twice, for the normalizers first), the backward pass reads
them once and writes the gradient once. What the backward pass needs besides is five numbers a token.
"""

import math
from typing import Literal

import torch

from ._triton import abs_bits, tl, triton

NORMS = ("per_logit", "l2", "linf", "label")
SPACES = ("logits", "log_probs")
REDUCTIONS = ("mean", "sum", "none")

_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_V = 4096
_CHUNK = 1 << 20
_STATS = 5  # lse, shift = lse - lse_ref, weight of the gradient, peak = max |d|, slope = sum of dh/dd


def _as_3d(x: torch.Tensor) -> torch.Tensor:
    """[..., V] as [batch, tokens, V]; up to three dimensions without a copy, as logits[:, :-1] needs it."""
    return x.flatten(0, -3) if x.ndim > 3 else x[(None,) * (3 - x.ndim)]


def _row_chunks(shape: torch.Size):
    """Pieces of about a million logits: (batch index, slice of its tokens, slice of all tokens)."""
    batch, tokens, vocab = shape
    stride = max(_CHUNK // vocab, 1)
    for b in range(batch):
        for start in range(0, tokens, stride):
            stop = min(start + stride, tokens)
            yield b, slice(start, stop), slice(b * tokens + start, b * tokens + stop)


def _kept(labels: torch.Tensor | None, ignore_index: int, rows: slice, like: torch.Tensor) -> torch.Tensor:
    if labels is None:
        return torch.ones(rows.stop - rows.start, dtype=torch.bool, device=like.device)
    return labels[rows] != ignore_index


def _sign_or_nan(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d.isnan(), d, d.sign())


def _margin_hinge_fwd_torch(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z3, ref3 = _as_3d(logits), _as_3d(ref_logits)
    vocab, n = z3.shape[-1], z3.shape[0] * z3.shape[1]
    dtype = torch.promote_types(torch.promote_types(z3.dtype, ref3.dtype), torch.float32)
    hinge = torch.zeros(n, dtype=dtype, device=z3.device)
    active = torch.zeros(n, dtype=torch.int32, device=z3.device)
    stats = torch.zeros(n, _STATS, dtype=dtype, device=z3.device)
    for b, tokens, rows in _row_chunks(z3.shape):
        kept = _kept(labels, ignore_index, rows, z3)
        z, z_ref = z3[b, tokens].to(dtype), ref3[b, tokens].to(dtype)
        d = z - z_ref
        lse = shift = peak = slope = torch.zeros_like(d[:, 0])
        if space == "log_probs":
            lse = z.logsumexp(dim=1)
            shift = lse - z_ref.logsumexp(dim=1)
            d -= shift[:, None]
        if norm == "per_logit":
            h = (margin - d.abs()).clamp(min=0).mean(dim=1)
            weight = torch.full_like(h, 1 / vocab)
            count = (d.abs() < margin).sum(dim=1)
            slope = -weight * _sign_or_nan(d).masked_fill(d.abs() >= margin, 0).sum(dim=1)
        elif norm == "l2":
            length = torch.linalg.vector_norm(d, dim=1)
            count = length < margin
            h = (margin - length).clamp(min=0)
            weight = (1 / length).masked_fill((length >= margin) | (length == 0), 0)
            slope = -weight * d.sum(dim=1)
        elif norm == "linf":
            peak = d.abs().amax(dim=1)
            count = peak < margin
            h = (margin - peak).clamp(min=0)
            below_peak = d.abs() < peak[:, None]
            weight = (1 / (~below_peak).sum(dim=1)).masked_fill(peak >= margin, 0)
            slope = -weight * _sign_or_nan(d).masked_fill(below_peak, 0).sum(dim=1)
        else:
            d_label = d.gather(1, labels[rows].where(kept, 0)[:, None]).squeeze(1)
            count = d_label.abs() < margin
            h = (margin - d_label.abs()).clamp(min=0)
            weight = _sign_or_nan(d_label).masked_fill(d_label.abs() >= margin, 0)
            slope = -weight
        hinge[rows] = h.where(kept, 0)
        active[rows] = count.where(kept, 0).int()
        stats[rows] = torch.stack([lse, shift, weight, peak, slope], dim=1).where(kept[:, None], 0)
    return hinge, active, stats


def _margin_hinge_bwd_torch(
    out: torch.Tensor,
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> None:
    out3, z3, ref3 = _as_3d(out), _as_3d(logits), _as_3d(ref_logits)
    for b, tokens, rows in _row_chunks(z3.shape):
        kept = _kept(labels, ignore_index, rows, z3)[:, None]
        lse, shift, weight, peak, slope = stats[rows, :, None].unbind(1)
        z = z3[b, tokens].to(stats.dtype)
        d = z - ref3[b, tokens].to(stats.dtype) - shift
        if norm == "per_logit":
            g = (-weight * _sign_or_nan(d)).masked_fill(d.abs() >= margin, 0)
        elif norm == "l2":
            g = -weight * d
        elif norm == "linf":
            g = (-weight * _sign_or_nan(d)).masked_fill(d.abs() < peak, 0)
        else:
            vocab = torch.arange(z.shape[1], device=z.device)
            g = torch.where(vocab == labels[rows, None], -weight, 0)
        if space == "log_probs":
            g -= (z - lse).exp() * slope
        out3[b, tokens] = (g * grad_hinge[rows, None]).where(kept, 0).to(out.dtype)


@triton.jit
def _tile_sign_or_nan(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def _margin_hinge_fwd_kernel(
    hinge_ptr,
    active_ptr,
    stats_ptr,
    z_ptr,
    stride_zb,
    stride_zt,
    stride_zv,
    ref_ptr,
    stride_rb,
    stride_rt,
    stride_rv,
    labels_ptr,
    n_tokens,
    n_vocab,
    margin,
    ignore_index,
    NORM: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row * 5
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(hinge_ptr + row, 0.0)
            tl.store(active_ptr + row, 0)
            for i in tl.static_range(5):
                tl.store(stats_ptr + i, 0.0)
            return
    z_ptr += (row // n_tokens) * stride_zb + (row % n_tokens) * stride_zt
    ref_ptr += (row // n_tokens) * stride_rb + (row % n_tokens) * stride_rt
    lanes = tl.arange(0, BLOCK_V)

    lse = 0.0
    shift = 0.0
    if LOG_PROBS:
        # Finite, so that a lane that has seen nothing yet does not compute inf - inf.
        top = tl.full([BLOCK_V], -3.0e38, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        ref_top = tl.full([BLOCK_V], -3.0e38, tl.float32)
        ref_total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, n_vocab, BLOCK_V):
            v = start + lanes.to(tl.int64)
            z = tl.load(z_ptr + v * stride_zv, mask=v < n_vocab, other=float("-inf")).to(tl.float32)
            z_ref = tl.load(ref_ptr + v * stride_rv, mask=v < n_vocab, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, z)
            total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
            top = new_top
            new_top = tl.maximum(ref_top, z_ref)
            ref_total = ref_total * tl.exp(ref_top - new_top) + tl.exp(z_ref - new_top)
            ref_top = new_top
        row_top = tl.max(top, axis=0)
        lse = row_top + tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
        row_top = tl.max(ref_top, axis=0)
        shift = lse - (row_top + tl.log(tl.sum(ref_total * tl.exp(ref_top - row_top), axis=0)))

    peak = 0.0
    if NORM == "label":
        in_range = (label >= 0) & (label < n_vocab)
        z = tl.load(z_ptr + label * stride_zv, mask=in_range, other=float("nan")).to(tl.float32)
        d = z - tl.load(ref_ptr + label * stride_rv, mask=in_range, other=float("nan")).to(tl.float32) - shift
        # Here and below: a NaN is not >= margin, and so gets through.
        h = tl.where(tl.abs(d) >= margin, 0.0, margin - tl.abs(d))
        count = (tl.abs(d) < margin).to(tl.int32)
        weight = tl.where(tl.abs(d) >= margin, 0.0, _tile_sign_or_nan(d))
        slope = -weight
    else:
        sum_h = tl.zeros([BLOCK_V], tl.float32)
        sum_d = tl.zeros([BLOCK_V], tl.float32)
        counts = tl.zeros([BLOCK_V], tl.int32)
        peaks = tl.full([BLOCK_V], -1, tl.int32)
        for start in range(0, n_vocab, BLOCK_V):
            v = start + lanes.to(tl.int64)
            z = tl.load(z_ptr + v * stride_zv, mask=v < n_vocab, other=0.0).to(tl.float32)
            z_ref = tl.load(ref_ptr + v * stride_rv, mask=v < n_vocab, other=0.0).to(tl.float32)
            d = tl.where(v < n_vocab, z - z_ref - shift, 0.0)
            if NORM == "per_logit":
                outside = (tl.abs(d) >= margin) | (v >= n_vocab)
                sum_h += tl.where(outside, 0.0, margin - tl.abs(d))
                sum_d += tl.where(outside, 0.0, _tile_sign_or_nan(d))
                counts += tl.where(outside | (d != d), 0, 1)
            elif NORM == "l2":
                sum_h += d * d
                sum_d += d
            else:
                bits = tl.where(v < n_vocab, abs_bits(d), -1)
                beyond = bits > peaks
                level = (bits == peaks) & (v < n_vocab)
                sum_d = tl.where(beyond, _tile_sign_or_nan(d), tl.where(level, sum_d + _tile_sign_or_nan(d), sum_d))
                counts = tl.where(beyond, 1, tl.where(level, counts + 1, counts))
                peaks = tl.maximum(peaks, bits)
        if NORM == "per_logit":
            weight = 1.0 / n_vocab
            h = tl.sum(sum_h, axis=0) * weight
            count = tl.sum(counts, axis=0)
            slope = -weight * tl.sum(sum_d, axis=0)
        else:
            if NORM == "l2":
                length = tl.sqrt(tl.sum(sum_h, axis=0))
                weight = tl.where((length >= margin) | (length == 0), 0.0, 1.0 / length)
                slope = -weight * tl.sum(sum_d, axis=0)
            else:
                top_bits = tl.max(peaks, axis=0)
                length = top_bits.to(tl.float32, bitcast=True)
                peak = length
                ties = tl.sum(tl.where(peaks == top_bits, counts, 0), axis=0)
                weight = tl.where(length >= margin, 0.0, 1.0 / ties.to(tl.float32))
                slope = -weight * tl.sum(tl.where(peaks == top_bits, sum_d, 0.0), axis=0)
            h = tl.where(length >= margin, 0.0, margin - length)
            count = (length < margin).to(tl.int32)
        if HAS_LABELS:
            h = tl.where((label >= 0) & (label < n_vocab), h, float("nan"))
    tl.store(hinge_ptr + row, h)
    tl.store(active_ptr + row, count)
    tl.store(stats_ptr, lse)
    tl.store(stats_ptr + 1, shift)
    tl.store(stats_ptr + 2, weight)
    tl.store(stats_ptr + 3, peak)
    tl.store(stats_ptr + 4, slope)


@triton.jit
def _margin_hinge_bwd_kernel(
    out_ptr,
    stride_ob,
    stride_ot,
    stride_ov,
    grad_hinge_ptr,
    z_ptr,
    stride_zb,
    stride_zt,
    stride_zv,
    ref_ptr,
    stride_rb,
    stride_rt,
    stride_rv,
    labels_ptr,
    stats_ptr,
    n_tokens,
    n_vocab,
    margin,
    ignore_index,
    NORM: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = v < n_vocab
    out_ptr += (row // n_tokens) * stride_ob + (row % n_tokens) * stride_ot
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(out_ptr + v * stride_ov, tl.zeros([BLOCK_V], out_ptr.dtype.element_ty), mask=mask)
            return
    z_ptr += (row // n_tokens) * stride_zb + (row % n_tokens) * stride_zt
    ref_ptr += (row // n_tokens) * stride_rb + (row % n_tokens) * stride_rt
    weight = tl.load(stats_ptr + row * 5 + 2)
    z = tl.load(z_ptr + v * stride_zv, mask=mask, other=0.0).to(tl.float32)
    if NORM == "label":
        g = tl.where(v == label, -weight, 0.0)
    else:
        z_ref = tl.load(ref_ptr + v * stride_rv, mask=mask, other=0.0).to(tl.float32)
        d = z - z_ref - tl.load(stats_ptr + row * 5 + 1)
        if NORM == "per_logit":
            g = tl.where(tl.abs(d) >= margin, 0.0, -weight * _tile_sign_or_nan(d))
        elif NORM == "l2":
            g = -weight * d
        else:
            peak = tl.load(stats_ptr + row * 5 + 3)
            g = tl.where(tl.abs(d) < peak, 0.0, -weight * _tile_sign_or_nan(d))
    if LOG_PROBS:
        g -= tl.exp(z - tl.load(stats_ptr + row * 5)) * tl.load(stats_ptr + row * 5 + 4)
    g *= tl.load(grad_hinge_ptr + row)
    tl.store(out_ptr + v * stride_ov, g.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_constants(vocab: int, labels: torch.Tensor | None, norm: str, space: str, block_v: int) -> dict:
    block_v = min(block_v, 1 << (vocab - 1).bit_length())
    return {
        "NORM": norm,
        "LOG_PROBS": space == "log_probs",
        "HAS_LABELS": labels is not None,
        "BLOCK_V": block_v,
        "num_warps": 8 if block_v >= 4096 else 4,
        "enable_fp_fusion": True,
    }


def _margin_hinge_fwd_triton(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    block_v: int = _BLOCK_V,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, z_ref = _as_3d(logits), _as_3d(ref_logits)
    batch, tokens, vocab = z.shape
    n = batch * tokens
    hinge = torch.empty(n, dtype=torch.float32, device=z.device)
    active = torch.empty(n, dtype=torch.int32, device=z.device)
    stats = torch.empty(n, _STATS, dtype=torch.float32, device=z.device)
    if n:
        with torch.cuda.device_of(z):
            _margin_hinge_fwd_kernel[(n,)](
                hinge,
                active,
                stats,
                z,
                *z.stride(),
                z_ref,
                *z_ref.stride(),
                labels,
                tokens,
                vocab,
                margin,
                ignore_index,
                **_launch_constants(vocab, labels, norm, space, block_v),
            )
    return hinge, active, stats


def _margin_hinge_bwd_triton(
    out: torch.Tensor,
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    block_v: int = _BLOCK_V,
) -> None:
    out, z, z_ref = _as_3d(out), _as_3d(logits), _as_3d(ref_logits)
    batch, tokens, vocab = z.shape
    if not batch * tokens:
        return
    constants = _launch_constants(vocab, labels, norm, space, block_v)
    with torch.cuda.device_of(z):
        _margin_hinge_bwd_kernel[(batch * tokens, -(-vocab // constants["BLOCK_V"]))](
            out,
            *out.stride(),
            grad_hinge,
            z,
            *z.stride(),
            z_ref,
            *z_ref.stride(),
            labels,
            stats,
            tokens,
            vocab,
            margin,
            ignore_index,
            **constants,
        )


def _check_options(margin: float, norm: str, space: str, reduction: str) -> None:
    for name, choice, choices in (
        ("norm", norm, NORMS),
        ("space", space, SPACES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if choice not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {choice!r}")
    if not (isinstance(margin, (int, float)) and math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin: expected a finite number above 0; got {margin!r}")


def _check_label_range(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]
    if bad.numel():
        raise ValueError(f"labels: expected 0 to {vocab - 1} or ignore_index {ignore_index}; got {bad[0]}")


@torch.library.custom_op("quail::logit_margin_hinge", mutates_args=(), device_types="cpu")
def _margin_hinge_op(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if labels is not None:
        _check_label_range(labels, logits.shape[-1], ignore_index)
    return _margin_hinge_fwd_torch(logits, ref_logits, labels, margin, norm, space, ignore_index)


@_margin_hinge_op.register_kernel("cuda")
def _(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _margin_hinge_fwd_triton(logits, ref_logits, labels, margin, norm, space, ignore_index)


@_margin_hinge_op.register_fake
def _(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = logits.shape[:-1].numel()
    dtype = torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)
    active = logits.new_empty(n, dtype=torch.int32)
    return logits.new_empty(n, dtype=dtype), active, logits.new_empty(n, _STATS, dtype=dtype)


@torch.library.custom_op("quail::logit_margin_hinge_backward", mutates_args=(), device_types="cpu")
def _margin_hinge_backward_op(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _margin_hinge_bwd_torch(out, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)
    return out


@_margin_hinge_backward_op.register_kernel("cuda")
def _(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _margin_hinge_bwd_triton(out, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)
    return out


@_margin_hinge_backward_op.register_fake
def _(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("quail::logit_margin_hinge_backward_", mutates_args=("logits",), device_types="cpu")
def _margin_hinge_backward_inplace_op(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> None:
    _margin_hinge_bwd_torch(logits, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)


@_margin_hinge_backward_inplace_op.register_kernel("cuda")
def _(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> None:
    _margin_hinge_bwd_triton(logits, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)


@_margin_hinge_backward_inplace_op.register_fake
def _(
    grad_hinge: torch.Tensor,
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, ref_logits, labels, *ctx.options, ctx.inplace = inputs
    _, active, stats = output
    ctx.mark_non_differentiable(active, stats)
    ctx.save_for_backward(logits, ref_logits, labels, stats)


def _backward(ctx, grad_hinge, _grad_active, _grad_stats):
    logits, ref_logits, labels, stats = ctx.saved_tensors
    args = (grad_hinge.contiguous(), logits.detach(), ref_logits, labels, stats, *ctx.options)
    if ctx.inplace:
        _margin_hinge_backward_inplace_op(*args)
        grad = logits.detach()
    else:
        grad = _margin_hinge_backward_op(*args)
    return (grad, *(None,) * 7)


_margin_hinge_op.register_autograd(_backward, setup_context=_setup_context)


def _check(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    reduction: str,
) -> None:
    _check_options(margin, norm, space, reduction)
    for name, tensor in (("logits", logits), ("ref_logits", ref_logits)):
        # float64 is there for gradient checks, which run on the CPU.
        if tensor.dtype not in _LOGIT_DTYPES and not (tensor.dtype == torch.float64 and not tensor.is_cuda):
            raise ValueError(f"{name}: expected float32, bfloat16 or float16; got {tensor.dtype}")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits: expected [..., vocabulary] with at least one entry; got {list(logits.shape)}")
    if ref_logits.shape != logits.shape or ref_logits.device != logits.device:
        expected = f"the shape and device of logits, {list(logits.shape)} on {logits.device}"
        raise ValueError(f"ref_logits: expected {expected}; got {list(ref_logits.shape)} on {ref_logits.device}")
    if labels is None:
        if norm == "label":
            raise ValueError("labels: expected a tensor for norm 'label'; got None")
        return
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        expected = f"{list(logits.shape[:-1])} on {logits.device}, one for each row of logits"
        raise ValueError(f"labels: expected {expected}; got {list(labels.shape)} on {labels.device}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64 or int32; got {labels.dtype}")


def logit_margin_hinge(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    margin: float,
    norm: Literal["per_logit", "l2", "linf", "label"] = "per_logit",
    space: Literal["logits", "log_probs"] = "logits",
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    inplace_backward: bool = False,
    return_active_share: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The hinge that pushes ``logits`` at least ``margin`` away from ``ref_logits``.

    The formulas stand at the top of the file; the idea is that of QUAIL, https://arxiv.org/abs/2601.15538.
    Nothing synchronises. Up to three dimensions may have any strides, so ``logits[:, :-1]`` is not copied.

    Args:
        logits: float32, bfloat16 or float16 [..., V], of the model that unlearns.
        ref_logits: the same shape, of the original model; its dtype may differ. It gets no gradient.
        labels: int64 or int32 [...], needed for ``norm="label"``. Rows whose label is ``ignore_index`` are
            not read, count as no token and get a gradient of 0. None counts all rows.
        margin: in units of logits (nats, with ``space="log_probs"``), above 0.
        norm, space: which hinge, and between what.
        reduction: ``"mean"`` over the tokens that are not ignored (0 if there are none), ``"sum"``, or
            ``"none"``.
        inplace_backward: store the gradient over ``logits``, whose values nothing may need after the backward
            pass. Without effect under torch.compile, or for more than three dimensions.
        return_active_share: also return the share of terms inside the margin: of logits with ``per_logit``,
            of tokens else.

    Returns:
        The loss, fp32: 0-dim, or [...] for ``reduction="none"``. With ``return_active_share`` also a 0-dim
        fp32 share. A NaN among the logits of a token, or one infinity in both (a masked vocabulary), makes
        the loss NaN: never a silent 0.

    Raises:
        ValueError: on an unknown option, a margin that is not finite and above 0, dtypes, shapes or devices
            that do not fit, and, on the CPU, on a label outside the vocabulary. On CUDA, where the check
            would synchronise, the hinge of such a row is NaN.
    """
    _check(logits, ref_logits, labels, margin, norm, space, reduction)
    flat_labels = None if labels is None else labels.reshape(-1).long().contiguous()
    inplace = inplace_backward and logits.ndim <= 3 and not torch.compiler.is_compiling()
    hinge, active, _ = _margin_hinge_op(
        logits, ref_logits.detach(), flat_labels, float(margin), norm, space, ignore_index, inplace
    )
    if labels is None:
        tokens = max(hinge.numel(), 1)
    else:
        tokens = (labels != ignore_index).sum().clamp(min=1)
    if reduction == "none":
        loss = hinge.view(logits.shape[:-1])
    else:
        loss = hinge.sum() / tokens if reduction == "mean" else hinge.sum()
    if not return_active_share:
        return loss
    terms = logits.shape[-1] if norm == "per_logit" else 1
    return loss, (active.sum() / (tokens * terms)).float()
