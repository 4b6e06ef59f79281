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

The forward pass reads both logits once, per_logit in log_probs twice; the backward pass reads them once and
writes the gradient once. What the backward pass needs besides is six numbers a token.

Rows of any length and of any start are loaded and stored 128 bits at a time: the kernels count a row from its
first 16-byte boundary, and take the few logits before it and after the last whole chunk by themselves. That needs
all tensors of a launch to lie alike: unit strides, and rows equally far, in elements, from such a boundary. Others
are read one logit at a time, which for bf16 takes 31 instructions a logit where 14 do (sm_90, per_logit).
"""

import math
from typing import Literal

import numpy as np
import torch

from . import cpu
from ._sharding import admit_dtensors
from ._triton import larger, tl, triton

NORMS = ("per_logit", "l2", "linf", "label")
SPACES = ("logits", "log_probs")
REDUCTIONS = ("mean", "sum", "none")

_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_V = 4096
_CHUNK, _LARGEST_CHUNK = 1 << 16, 1 << 20
# lse, shift = lse - lse_ref, weight of the gradient, slope = sum of dh/dd where it is needed (log_probs), and for
# linf the z - z_ref above or below which |d| is largest.
_STATS = 6


def _as_3d(x: torch.Tensor) -> torch.Tensor:
    """[..., V] as [batch, tokens, V]; up to three dimensions without a copy, as logits[:, :-1] needs it."""
    return x.flatten(0, -3) if x.ndim > 3 else x[(None,) * (3 - x.ndim)]


def _row_chunks(shape: torch.Size):
    """Pieces that the caches of PyTorch's threads hold: (batch index, slice of its tokens, slice of all tokens)."""
    batch, tokens, vocab = shape
    stride = max(min(_CHUNK * torch.get_num_threads(), _LARGEST_CHUNK) // vocab, 1)
    for b in range(batch):
        for start in range(0, tokens, stride):
            stop = min(start + stride, tokens)
            yield b, slice(start, stop), slice(b * tokens + start, b * tokens + stop)


def _kept(labels: torch.Tensor | None, ignore_index: int, rows: slice, like: torch.Tensor) -> torch.Tensor:
    if labels is None:
        return torch.ones(rows.stop - rows.start, dtype=torch.bool, device=like.device)
    return labels[rows] != ignore_index


def _sign_or_nan(d: torch.Tensor) -> torch.Tensor:
    # torch.sign gives 0 for NaN, and on the CPU torch.where takes five times as long as arithmetic.
    huge = torch.finfo(d.dtype).max
    return (d * huge).mul_(huge).clamp_(-1, 1)


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
        lse, shift = torch.zeros_like(z[:, 0]), torch.zeros_like(z[:, 0])
        above, below = torch.full_like(lse, math.inf), torch.full_like(lse, -math.inf)
        if space == "log_probs":
            lse = z.logsumexp(dim=1)
            shift = lse - z_ref.logsumexp(dim=1)
        if norm == "label":
            label = labels[rows].where(kept, 0)[:, None]
            z, z_ref = z.gather(1, label), z_ref.gather(1, label)
        d = e = z - z_ref
        if space == "log_probs":
            d = e - shift[:, None]
        if norm == "per_logit":
            size = d.abs()
            h = (margin - size).clamp_(min=0).mean(dim=1)
            weight = torch.full_like(h, 1 / vocab)
            is_inside = torch.lt(size, margin, out=size)
            count = is_inside.sum(dim=1)
            if space == "log_probs":
                slope = -weight * _sign_or_nan(d).mul_(is_inside).sum(dim=1)
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
            # Rounding may make one |d| of two e; which logits share the maximum is told by e.
            top, bottom = e.amax(dim=1), e.amin(dim=1)
            above = top.where(top - shift == peak, math.inf)
            below = bottom.where(shift - bottom == peak, -math.inf)
            hi, lo = (e == above[:, None]).sum(dim=1), (e == below[:, None]).sum(dim=1)
            weight = (1 / (hi + lo) + 0 * peak).masked_fill(peak >= margin, 0)
            slope = -weight * (hi - lo).masked_fill(peak == 0, 0)
        else:
            d_label = d.squeeze(1)
            count = d_label.abs() < margin
            h = (margin - d_label.abs()).clamp(min=0)
            weight = _sign_or_nan(d_label).masked_fill(d_label.abs() >= margin, 0)
            slope = -weight
        if space == "logits":
            slope = torch.zeros_like(h)
        hinge[rows] = h.where(kept, 0)
        active[rows] = count.where(kept, 0).int()
        stats[rows] = torch.stack([lse, shift, weight, slope, above, below], dim=1).where(kept[:, None], 0)
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
        kept = _kept(labels, ignore_index, rows, z3)
        lse, shift, weight, slope, above, below = stats[rows, :, None].unbind(1)
        z = z3[b, tokens].to(stats.dtype)
        if norm != "label":
            e = d = z - ref3[b, tokens].to(stats.dtype)
            if space == "log_probs":
                d = e - shift
        if norm == "per_logit":
            is_inside = d.abs()
            torch.lt(is_inside, margin, out=is_inside)
            g = _sign_or_nan(d).mul_(is_inside).mul_(-weight)
        elif norm == "l2":
            g = -weight * d
        elif norm == "linf":
            g = (-weight * _sign_or_nan(d)).masked_fill((e < above) & (e > below), 0)
        else:
            # A label may lie outside: of blocks of the vocabulary one has it.
            vocab = torch.arange(z.shape[1], device=z.device)
            g = torch.where(vocab == labels[rows, None], -weight, 0)
        if space == "log_probs":
            g -= (z - lse).exp_().mul_(slope)
        out3[b, tokens] = g.mul_(grad_hinge[rows, None])
        if labels is not None:
            out3[b, tokens][~kept] = 0


def _of_rows(labels: torch.Tensor | None, ignore_index: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels, which rows are kept)."""
    if labels is None:
        return np.zeros(n, np.int64), np.ones(n, np.bool_)
    return labels.numpy(), (labels != ignore_index).numpy()


def _margin_hinge_fwd_cpu(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    labels: torch.Tensor | None,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z3, ref3 = _as_3d(logits), _as_3d(ref_logits)
    loops = cpu.loops_for_rows(z3, ref3)
    if loops is None:
        return _margin_hinge_fwd_torch(logits, ref_logits, labels, margin, norm, space, ignore_index)
    n, vocab = z3.shape[0] * z3.shape[1], z3.shape[2]
    hinge, active, stats = torch.empty(n), torch.empty(n, dtype=torch.int32), torch.empty(n, _STATS)
    (z, z_at), (ref, ref_at), (label, kept) = cpu.rows_of(z3), cpu.rows_of(ref3), _of_rows(labels, ignore_index, n)
    outputs = hinge.numpy(), active.numpy(), stats.numpy()
    options = NORMS.index(norm), space == "log_probs", np.float32(margin)

    def work(span: slice) -> None:
        rows = slice(span.start // vocab, span.stop // vocab)
        of_z, of_ref = (z, z_at[rows], loops.MODES[z3.dtype]), (ref, ref_at[rows], loops.MODES[ref3.dtype])
        loops.hinge_forward(*of_z, *of_ref, vocab, label[rows], kept[rows], options, *(out[rows] for out in outputs))

    cpu.in_threads(work, cpu.spans_of(n * vocab, vocab))
    return hinge, active, stats


def _margin_hinge_bwd_cpu(
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
    loops = cpu.loops_for_rows(out3, z3, ref3)
    if loops is None:
        options = (margin, norm, space, ignore_index)
        return _margin_hinge_bwd_torch(out, grad_hinge, logits, ref_logits, labels, stats, *options)
    n, vocab = z3.shape[0] * z3.shape[1], z3.shape[2]
    gradient = out3 if out3.stride(2) == 1 else torch.empty(out3.shape, dtype=out3.dtype)
    (g, g_at), (z, z_at), (ref, ref_at) = cpu.rows_of(gradient), cpu.rows_of(z3), cpu.rows_of(ref3)
    label, kept = _of_rows(labels, ignore_index, n)
    grad, by_row = grad_hinge.numpy(), stats.numpy()
    options = NORMS.index(norm), space == "log_probs", np.float32(margin)

    def work(span: slice) -> None:
        rows = slice(span.start // vocab, span.stop // vocab)
        of_z, of_ref = (z, z_at[rows], loops.MODES[z3.dtype]), (ref, ref_at[rows], loops.MODES[ref3.dtype])
        args = (vocab, label[rows], kept[rows], options, grad[rows], by_row[rows])
        loops.hinge_backward(g, g_at[rows], *of_z, *of_ref, *args)

    cpu.in_threads(work, cpu.spans_of(n * vocab, vocab))
    if gradient is not out3:
        out3.copy_(gradient)


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_sign_or_nan(d):
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def _row_body(row_ptr, n_vocab, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """How many elements come before the first 16-byte boundary, and how many chunks of WIDTH cover from there."""
    if ALIGNED:
        itemsize: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        past = (row_ptr.to(tl.int64) // itemsize % WIDTH).to(tl.int32)
        head = (WIDTH - past) % WIDTH
    else:
        head = 0
    return head, (n_vocab - head) // WIDTH * WIDTH


@triton.jit
def _from_body(row_ptr, head, stride, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    if ALIGNED:
        # The address rounded up, which is head further on: for AMD, Triton would make one offset of head and what
        # follows, and know no divisor of it.
        unit: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8 * WIDTH
        row_ptr = tl.multiple_of(((row_ptr.to(tl.int64) + (unit - 1)) & -unit).to(row_ptr.dtype), 16)
    else:
        row_ptr += head * stride
    return row_ptr


@triton.jit
def _edge_lanes(lanes, head, body, n_vocab, WIDTH: tl.constexpr):
    """What the chunks of the body leave over, counted from its start: up to WIDTH - 1 before it and after it."""
    v = tl.where(lanes < WIDTH, lanes - WIDTH, body + lanes - WIDTH)
    return v, (v >= -head) & (v < n_vocab - head)


@triton.jit
def _load_pair(z_ptr, stride_zv, ref_ptr, stride_rv, v, mask):
    offsets = v.to(tl.int64)
    z = tl.load(z_ptr + offsets * stride_zv, mask=mask, other=float("-inf")).to(tl.float32)
    return z, tl.load(ref_ptr + offsets * stride_rv, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _exp(x):
    """Half of ``tl.exp``'s instructions: that one sees to results below fp32's normal range, which are 0 here."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _add_exps(top, total, z):
    """Adds chunks z [chunks, width] to running sums of exponentials: sum exp(z) = total * exp(top)."""
    new_top = tl.maximum(top, tl.max(z, axis=1))
    total = total * _exp(top - new_top) + tl.sum(_exp(z - new_top[:, None]), axis=1)
    return new_top, total


@triton.jit
def _log_sum_exp(top, total):
    row_top = tl.max(top, axis=0)
    return row_top + tl.log(tl.sum(total * _exp(top - row_top), axis=0))


# A chunk lies in the row or does not: ``mask`` [chunks] is applied to what is left of a chunk.


@triton.jit
def _add_hinges(sum_h, sum_sign, counts, d, mask, margin, SIGNS: tl.constexpr):
    # Here and below: a NaN is not >= margin, and so gets through.
    outside = tl.abs(d) >= margin
    sum_h += tl.where(mask, tl.sum(tl.where(outside, 0.0, margin - tl.abs(d)), axis=1), 0.0)
    if SIGNS:
        sum_sign += tl.where(mask, tl.sum(tl.where(outside, 0.0, _tile_sign_or_nan(d)), axis=1), 0.0)
    counts += tl.where(mask, tl.sum((tl.abs(d) < margin).to(tl.int32), axis=1), 0)
    return sum_h, sum_sign, counts


@triton.jit
def _add_moments(n, mean, m2, e, mask, k):
    """Adds k elements a chunk to running counts, means and sums of squared deviations (Chan, Golub, LeVeque)."""
    # An infinity would make NaN of a deviation; this is as far beyond any margin, and its square is finite.
    e = tl.where(e > 1e18, 1e18, tl.where(e < -1e18, -1e18, e))
    chunk_mean = tl.where(mask, tl.sum(e, axis=1), 0.0) / tl.maximum(k, 1.0)
    deviation = e - chunk_mean[:, None]
    apart = chunk_mean - mean
    share = k / tl.maximum(n + k, 1.0)
    m2 += tl.where(mask, tl.sum(deviation * deviation, axis=1), 0.0) + apart * apart * (n * share)
    return n + k, mean + apart * share, m2


@triton.jit
def _add_maxima(top, ties, e, mask):
    """Adds chunks to running maxima, NaN where they have one, and how often each was met."""
    chunk_top = tl.where(mask, tl.reduce(e, 1, larger), float("-inf"))
    chunk_ties = tl.where(mask, tl.sum((e == chunk_top[:, None]).to(tl.int32), axis=1), 0)
    ties = tl.where(chunk_top > top, chunk_ties, tl.where(chunk_top == top, ties + chunk_ties, ties))
    return larger(top, chunk_top), ties


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
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token a program. Bytes: those of an element of z and of one of z_ref per logit, and 32 per token.

    Norm label reads one element of each tensor instead (log_probs: besides). Norm per_logit reads both rows
    twice in log_probs, because whether a logit is inside the margin cannot be told before the last one is
    read. The second time comes from the L2 cache only while all rows in flight fit it: on an H100 (50 MB, 5
    programs an SM) bf16 rows of up to 19,000 logits. The other two norms need no second pass: a sum of squares
    and a maximum can be shifted afterwards.

    On sm_90 about 15 instructions (hinge_fwd per_logit logits 49152 bf16), about 41 instructions (hinge_fwd per_logit
    log_probs 49152 bf16); an H100 has time for 35 in 4 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row * 6
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            tl.store(hinge_ptr + row, 0.0)
            tl.store(active_ptr + row, 0)
            for i in tl.static_range(6):
                tl.store(stats_ptr + i, 0.0)
            return
    z_ptr += (row // n_tokens) * stride_zb + (row % n_tokens) * stride_zt
    ref_ptr += (row // n_tokens) * stride_rb + (row % n_tokens) * stride_rt
    head, body = _row_body(z_ptr, n_vocab, ALIGNED, WIDTH)
    z_ptr = _from_body(z_ptr, head, stride_zv, ALIGNED, WIDTH)
    ref_ptr = _from_body(ref_ptr, head, stride_rv, ALIGNED, WIDTH)

    chunk = tl.arange(0, BLOCK_V // WIDTH)
    lanes = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    edge_v, edge_mask = _edge_lanes(chunk, head, body, n_vocab, WIDTH)
    edge_v = edge_v[:, None]
    zero = tl.zeros([BLOCK_V // WIDTH], tl.float32)
    none = tl.zeros([BLOCK_V // WIDTH], tl.int32)
    lowest = tl.full([BLOCK_V // WIDTH], float("-inf"), tl.float32)
    ONE_PASS: tl.constexpr = not (NORM == "per_logit" and LOG_PROBS)

    if LOG_PROBS or NORM != "label":
        # Every chunk starts with one logit of the edges, or with none.
        edge_z, edge_ref = _load_pair(z_ptr, stride_zv, ref_ptr, stride_rv, edge_v, edge_mask[:, None])
        edge_e = edge_z - edge_ref
        if LOG_PROBS:
            # Finite, so that chunks that have seen nothing yet do not compute inf - inf.
            top, total = _add_exps(zero - 3.0e38, zero, edge_z)
            ref_top, ref_total = _add_exps(zero - 3.0e38, zero, edge_ref)
        if NORM == "l2":
            n, mean, m2 = _add_moments(zero, zero, zero, edge_e, edge_mask, edge_mask.to(tl.float32))
        elif NORM == "linf":
            hi, hi_ties = _add_maxima(lowest, none, edge_e, edge_mask)
            lo, lo_ties = _add_maxima(lowest, none, -edge_e, edge_mask)
        elif ONE_PASS:
            sum_h, sum_sign, counts = _add_hinges(zero, zero, none, edge_e, edge_mask, margin, False)
        for start in range(0, body, BLOCK_V):
            mask = start + chunk * WIDTH < body  # no chunk lies half in the body
            z, z_ref = _load_pair(z_ptr, stride_zv, ref_ptr, stride_rv, start + lanes, mask[:, None])
            if LOG_PROBS:
                top, total = _add_exps(top, total, z)
                ref_top, ref_total = _add_exps(ref_top, ref_total, z_ref)
            e = z - z_ref
            if NORM == "l2":
                n, mean, m2 = _add_moments(n, mean, m2, e, mask, tl.where(mask, WIDTH, 0.0))
            elif NORM == "linf":
                hi, hi_ties = _add_maxima(hi, hi_ties, e, mask)
                lo, lo_ties = _add_maxima(lo, lo_ties, -e, mask)
            elif NORM == "per_logit" and ONE_PASS:
                sum_h, sum_sign, counts = _add_hinges(sum_h, sum_sign, counts, e, mask, margin, False)

    lse = 0.0
    shift = 0.0
    if LOG_PROBS:
        lse = _log_sum_exp(top, total)
        shift = lse - _log_sum_exp(ref_top, ref_total)
    above = 0.0
    below = 0.0
    if NORM == "label":
        in_range = (label >= 0) & (label < n_vocab)
        v = label - head
        z = tl.load(z_ptr + v * stride_zv, mask=in_range, other=float("nan")).to(tl.float32)
        d = z - tl.load(ref_ptr + v * stride_rv, mask=in_range, other=float("nan")).to(tl.float32) - shift
        h = tl.where(tl.abs(d) >= margin, 0.0, margin - tl.abs(d))
        count = (tl.abs(d) < margin).to(tl.int32)
        weight = tl.where(tl.abs(d) >= margin, 0.0, _tile_sign_or_nan(d))
        slope = -weight
    elif NORM == "per_logit":
        if not ONE_PASS:
            edge_z, edge_ref = _load_pair(z_ptr, stride_zv, ref_ptr, stride_rv, edge_v, edge_mask[:, None])
            edge_d = edge_z - edge_ref - shift
            sum_h, sum_sign, counts = _add_hinges(zero, zero, none, edge_d, edge_mask, margin, True)
            for start in range(0, body, BLOCK_V):
                mask = start + chunk * WIDTH < body
                z, z_ref = _load_pair(z_ptr, stride_zv, ref_ptr, stride_rv, start + lanes, mask[:, None])
                sum_h, sum_sign, counts = _add_hinges(sum_h, sum_sign, counts, z - z_ref - shift, mask, margin, True)
        weight = 1.0 / n_vocab
        h = tl.sum(sum_h, axis=0) * weight
        count = tl.sum(counts, axis=0)
        slope = -weight * tl.sum(sum_sign, axis=0)
    else:
        if NORM == "l2":
            # sum (e - shift)^2, from parts that are all positive: nothing cancels.
            off = mean - shift
            length = tl.sqrt(tl.sum(m2 + n * off * off, axis=0))
            weight = tl.where((length >= margin) | (length == 0), 0.0, 1.0 / length)
            slope = -weight * tl.sum(n * off, axis=0)
        else:
            row_hi = tl.reduce(hi, 0, larger)
            row_lo = tl.reduce(lo, 0, larger)
            top_d = row_hi - shift
            bottom_d = row_lo + shift
            length = larger(top_d, bottom_d)
            hi_count = tl.where(top_d == length, tl.sum(tl.where(hi == row_hi, hi_ties, 0), axis=0), 0)
            lo_count = tl.where(bottom_d == length, tl.sum(tl.where(lo == row_lo, lo_ties, 0), axis=0), 0)
            above = tl.where(top_d == length, row_hi, float("inf"))
            below = tl.where(bottom_d == length, -row_lo, float("-inf"))
            weight = tl.where(length == length, 1.0 / (hi_count + lo_count).to(tl.float32), length)
            weight = tl.where(length >= margin, 0.0, weight)
            slope = -weight * tl.where(length == 0, 0, hi_count - lo_count).to(tl.float32)
        h = tl.where(length >= margin, 0.0, margin - length)
        count = (length < margin).to(tl.int32)
    if HAS_LABELS:
        h = tl.where((label >= 0) & (label < n_vocab), h, float("nan"))
    tl.store(hinge_ptr + row, h)
    tl.store(active_ptr + row, count)
    tl.store(stats_ptr, lse)
    tl.store(stats_ptr + 1, shift)
    tl.store(stats_ptr + 2, weight)
    tl.store(stats_ptr + 3, slope if LOG_PROBS else 0.0)
    tl.store(stats_ptr + 4, above)
    tl.store(stats_ptr + 5, below)


@triton.jit
def _tile_grad(
    out_ptr,
    stride_ov,
    z_ptr,
    stride_zv,
    ref_ptr,
    stride_rv,
    v,
    mask,
    label,
    margin,
    grad_hinge,
    lse,
    shift,
    weight,
    slope,
    above,
    below,
    NORM: tl.constexpr,
    LOG_PROBS: tl.constexpr,
):
    """Stores the gradient of the logits v, and reads of z and z_ref what it needs for it."""
    offsets = v.to(tl.int64)
    if LOG_PROBS or NORM != "label":
        z = tl.load(z_ptr + offsets * stride_zv, mask=mask, other=0.0).to(tl.float32)
    if NORM == "label":
        g = tl.where(v == label, -weight, 0.0)
    else:
        e = z - tl.load(ref_ptr + offsets * stride_rv, mask=mask, other=0.0).to(tl.float32)
        d = e - shift
        if NORM == "per_logit":
            g = tl.where(tl.abs(d) >= margin, 0.0, -weight * _tile_sign_or_nan(d))
        elif NORM == "l2":
            g = -weight * d
        else:
            g = tl.where((e < above) & (e > below), 0.0, -weight * _tile_sign_or_nan(d))
    if LOG_PROBS:
        g -= _exp(z - lse) * slope
    tl.store(out_ptr + offsets * stride_ov, (g * grad_hinge).to(out_ptr.dtype.element_ty), mask=mask)


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
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V logits of one token a program. Bytes per logit: one element of z, of z_ref and of the gradient.

    Norm label needs no z_ref, and in space logits no z.

    On sm_90 about 25 instructions (hinge_bwd per_logit logits 49152 bf16), about 28 instructions (hinge_bwd per_logit
    log_probs 49152 bf16); an H100 has time for 53 in 6 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    out_ptr += (row // n_tokens) * stride_ob + (row % n_tokens) * stride_ot
    z_ptr += (row // n_tokens) * stride_zb + (row % n_tokens) * stride_zt
    ref_ptr += (row // n_tokens) * stride_rb + (row % n_tokens) * stride_rt
    head, body = _row_body(z_ptr, n_vocab, ALIGNED, WIDTH)
    out_ptr = _from_body(out_ptr, head, stride_ov, ALIGNED, WIDTH)
    z_ptr = _from_body(z_ptr, head, stride_zv, ALIGNED, WIDTH)
    ref_ptr = _from_body(ref_ptr, head, stride_rv, ALIGNED, WIDTH)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = v < body
    edge_v, edge_mask = _edge_lanes(tl.arange(0, 2 * WIDTH), head, body, n_vocab, WIDTH)
    edge_mask = edge_mask & (tile == 0)
    label = -1
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            element: tl.constexpr = out_ptr.dtype.element_ty
            tl.store(out_ptr + v.to(tl.int64) * stride_ov, tl.zeros([BLOCK_V], element), mask=mask)
            tl.store(out_ptr + edge_v.to(tl.int64) * stride_ov, tl.zeros([2 * WIDTH], element), mask=edge_mask)
            return
        label -= head
    grad_hinge = tl.load(grad_hinge_ptr + row)
    stats_ptr += row * 6
    lse, shift = tl.load(stats_ptr), tl.load(stats_ptr + 1)
    weight, slope = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    above, below = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
    _tile_grad(
        *(out_ptr, stride_ov, z_ptr, stride_zv, ref_ptr, stride_rv, v, mask, label, margin, grad_hinge),
        *(lse, shift, weight, slope, above, below, NORM, LOG_PROBS),
    )
    _tile_grad(
        *(out_ptr, stride_ov, z_ptr, stride_zv, ref_ptr, stride_rv, edge_v, edge_mask, label, margin, grad_hinge),
        *(lse, shift, weight, slope, above, below, NORM, LOG_PROBS),
    )


def _launch_constants(
    rows: list[torch.Tensor], labels: torch.Tensor | None, norm: str, space: str, block_v: int
) -> dict:
    """``rows`` are all tensors [batch, tokens, V] of the launch."""
    vocab = rows[0].shape[-1]
    width = 16 // min(x.element_size() for x in rows)
    # Where rows lie alike, one head brings each tensor's body to a 16-byte boundary.
    starts = [(x.data_ptr() // x.element_size() % width, *(s % width for s in x.stride()[:2])) for x in rows]
    # The forward kernel needs as many chunks as edges can hold logits.
    block_v = min(block_v, max(1 << (vocab - 1).bit_length(), 2 * width * width))
    return {
        "NORM": norm,
        "LOG_PROBS": space == "log_probs",
        "HAS_LABELS": labels is not None,
        "ALIGNED": vocab >= width and len(set(starts)) == 1 and all(x.stride(-1) == 1 for x in rows),
        "WIDTH": width,
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
                **_launch_constants([z, z_ref], labels, norm, space, block_v),
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
    constants = _launch_constants([out, z, z_ref], labels, norm, space, block_v)
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
    return _margin_hinge_fwd_cpu(logits, ref_logits, labels, margin, norm, space, ignore_index)


@_margin_hinge_op.register_kernel("cuda")
def _(*args):
    return _margin_hinge_fwd_triton(*args[:-1])  # inplace_backward is for autograd


@_margin_hinge_op.register_fake
def _(logits, ref_logits, *_):
    n = math.prod(logits.shape[:-1])  # numel() would be the example's, where a dimension is symbolic
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
    _margin_hinge_bwd_cpu(out, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)
    return out


@_margin_hinge_backward_op.register_kernel("cuda")
def _(grad_hinge, logits, *args):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _margin_hinge_bwd_triton(out, grad_hinge, logits, *args)
    return out


@_margin_hinge_backward_op.register_fake
def _(grad_hinge, logits, *_):
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
    _margin_hinge_bwd_cpu(logits, grad_hinge, logits, ref_logits, labels, stats, margin, norm, space, ignore_index)


@_margin_hinge_backward_inplace_op.register_kernel("cuda")
def _(grad_hinge, logits, *args):
    _margin_hinge_bwd_triton(logits, grad_hinge, logits, *args)


@_margin_hinge_backward_inplace_op.register_fake
def _(*_):
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
    Nothing synchronises. Up to three dimensions may have any strides, so ``logits[:, :-1]`` is not copied; of more,
    all but the last two are flattened, which copies where their strides do not allow a view. DTensors sharded over
    the first dimension stay sharded (of three or more, where the ranks divide it); others are gathered first.

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
            pass. Without effect under torch.compile, on a DTensor, or for more than three dimensions.
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
    sharded = admit_dtensors(logits)
    inplace = inplace_backward and logits.ndim <= 3 and not (sharded or torch.compiler.is_compiling())
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
