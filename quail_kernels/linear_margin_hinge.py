r"""The logit margin hinge from hidden states and output heads: no [tokens, vocabulary] tensor of either model.

With hidden states x, head weights W and bias b, the logits of a token are, in the order of transformers' models,

    u = x W^T + b        z = c tanh(s u / c)        with the logit scale s and the softcap c; without one, z = s u

and the loss is that of ``margin_hinge.py`` for z and the z_ref of the reference model. From the same logits come
the label's log-probabilities l = z_label - lse(z) under both models, which is all that gradient ascent, NPO and
SimNPO need. With h the hinge of a token, G and g what arrives for h and for l, and p = softmax(z),

    dL/dz_v = G dh/dz_v + g (1[v = label] - p_v)        dL/du_v = dL/dz_v s (1 - (z_v / c)^2)
    dL/dx = sum_v dL/du_v W_v        dL/dW_v = sum_tokens dL/du_v x        dL/db_v = sum_tokens dL/du_v

The forward pass takes a chunk of tokens at a time, with all of their logits: one product a model into a buffer
that the chunks share. It keeps a few numbers a token. Given these, gradients of single logits depend on nothing
else, so the backward pass takes a block of the vocabulary at a time, with all tokens: it recomputes the block's
logits (the idea of cut cross-entropy, https://arxiv.org/abs/2411.09009) and turns them into dL/du in place. The rows
of dL/dW that belong to the block are then one product over all tokens: nothing is summed over chunks in low
precision, and no fp32 copy of dL/dW is needed. dL/dx is a sum over blocks, in fp32 [tokens, D]; its terms are
products in the dtype of the model.

The hinge ``linf`` asks for more than that. A product of another shape may differ in the last bit, and with it the
set of logits that are farthest away. So its forward pass computes a chunk's logits in products of one block of the
vocabulary each, and its backward pass fills a block with those very products, chunk by chunk.

Beside what the products read and write, the forward pass reads the logits of both models twice (three times with a
scale or a softcap in the space of log-probabilities) and with a scale or a softcap writes them once; ``linf`` copies
them once besides. The backward pass reads both and writes a gradient for the hinge; log-probabilities, a scale or a
softcap add two reads and a write, and the latter two also a read and a write of both models' logits. For 2-byte
logits without scale and softcap that is 8 bytes a pair of logits and at most 12, where the products are 4 D operations
forward and 4 D to 8 D backward.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from ._sharding import admit_dtensors, flat_rows
from ._triton import tl, triton
from .margin_hinge import (
    _LOGIT_DTYPES,
    _STATS,
    _add_exps,
    _as_3d,
    _check_label_range,
    _check_options,
    _exp,
    _log_sum_exp,
    _margin_hinge_bwd_cpu,
    _margin_hinge_bwd_triton,
    _margin_hinge_fwd_cpu,
    _margin_hinge_fwd_triton,
    _row_chunks,
)

_BLOCK_V = 4096
_CHUNK_BYTES = 2048  # of a column of logits: enough rows for a product to be bound by arithmetic
_MIN_VOCAB_BLOCK = 1024
_SUM_ROWS = 4096  # of a term in low precision: enough for a product, little beside an output head
_PAD = 16  # Triton knows of an argument that 16 divides it, or nothing
_IGNORED = -1


class LinearMarginHinge(NamedTuple):
    """What ``linear_logit_margin_hinge`` returns: fp32, on the device of the hidden states.

    Attributes:
        loss: the hinge, 0-dim, or [...] for ``reduction="none"``. Differentiable.
        label_log_probs: [...], log-probability of each label under the model, 0 where it is ignored.
            Differentiable.
        ref_label_log_probs: [...], the same under the reference model, without a gradient.
        active_share: 0-dim, the share of terms inside the margin: of logits with ``per_logit``, of tokens else.
    """

    loss: torch.Tensor
    label_log_probs: torch.Tensor
    ref_label_log_probs: torch.Tensor
    active_share: torch.Tensor


def _arithmetic_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where a tensor has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _epilogue_fwd_torch(
    lse: torch.Tensor | None,
    z: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> None:
    """Products [n, V] become logits, in place; ``lse`` [n], where it is asked for, their normalizers."""
    dtype = _arithmetic_dtype(z)
    for _, rows, _ in _row_chunks(_as_3d(z).shape):
        if softcap is not None:
            z[rows] = (z[rows].to(dtype) * logit_scale).div_(softcap).tanh_().mul_(softcap).to(z.dtype)
        elif logit_scale != 1:
            z[rows] = (z[rows].to(dtype) * logit_scale).to(z.dtype)
        if lse is not None:
            lse[rows] = z[rows].to(dtype).logsumexp(dim=1).where(labels[rows] != ignore_index, 0).to(lse.dtype)


def _epilogue_bwd_torch(
    z: torch.Tensor,
    grad_hinge_logits: torch.Tensor | None,
    lse: torch.Tensor,
    grad_log_prob: torch.Tensor | None,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Logits [n, V] become gradients of the products, in place. A label of V is none of these columns, -1 ignored."""
    vocab = torch.arange(z.shape[1], device=z.device)
    for _, rows, _ in _row_chunks(_as_3d(z).shape):
        x = z[rows].to(lse.dtype)
        grad = torch.zeros_like(x) if grad_hinge_logits is None else grad_hinge_logits[rows].to(lse.dtype)
        if grad_log_prob is not None:
            p = (x - lse[rows, None]).exp_()
            grad = grad + ((vocab == labels[rows, None]).to(p.dtype) - p) * grad_log_prob[rows, None]
        if softcap is not None:
            grad = grad * (1 - (x / softcap).square_())
        z[rows] = (grad * logit_scale).where(labels[rows, None] != _IGNORED, 0).to(z.dtype)


@triton.jit
def _tile_tanh(x):
    # Near 0 the difference of 1 and nearly 1 would leave few digits; the series errs by 1e-8 at most there.
    square = x * x
    odd = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * 62.0 / 2835.0))))
    # 1 - 2 / (e^2x + 1); two reciprocal roots of a number from 1 on take fewer instructions than a division.
    root = tl.math.rsqrt(tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.25, odd, 1.0 - 2.0 * root * root)


@triton.jit
def _epilogue_fwd_kernel(
    lse_ptr,
    z_ptr,
    stride_zt,
    labels_ptr,
    n_vocab,
    logit_scale,
    softcap,
    ignore_index,
    HAS_LSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A token a program. One read of each logit, and with a scale or a softcap one write.

    On sm_90, Triton 3.7, about 12 instructions (epilogue_fwd bf16) for the normalizer alone, and with a softcap about
    32 instructions (epilogue_fwd softcap bf16). An H100 has time for 18 in 2 bytes and for 35 in 4 bytes (132
    multiprocessors, 4 warp instructions a cycle, 1.755 GHz, 3.35 TB/s).
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(labels_ptr + row) == ignore_index:
        if HAS_LSE:
            tl.store(lse_ptr + row, 0.0)
        return
    z_ptr += row * stride_zt
    # A thread's neighbours are a chunk, whose sum is rescaled as one.
    WIDTH: tl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
    lanes = tl.arange(0, BLOCK_V // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([BLOCK_V // WIDTH], tl.float32)
    # Finite, so that a chunk that has seen nothing yet does not compute inf - inf.
    top = total - 3.0e38
    for start in range(0, n_vocab, BLOCK_V):
        v = start + lanes  # to compare in int64 costs registers, and on sm_100 spilled one
        # Rows are padded to a multiple of 16: a mask that ends there keeps accesses 128 bits wide for any vocabulary.
        z = tl.load(z_ptr + v.to(tl.int64), mask=v < stride_zt, other=0.0).to(tl.float32)
        if HAS_SCALE or HAS_SOFTCAP:
            if HAS_SOFTCAP:
                z = softcap * _tile_tanh(z * (logit_scale / softcap))
            else:
                z *= logit_scale
            stored = z.to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + v.to(tl.int64), stored, mask=v < stride_zt)
            z = stored.to(tl.float32)
        if HAS_LSE:
            top, total = _add_exps(top, total, tl.where(v < n_vocab, z, float("-inf")))
    if HAS_LSE:
        tl.store(lse_ptr + row, _log_sum_exp(top, total))


@triton.jit
def _epilogue_bwd_kernel(
    z_ptr,
    stride_zt,
    grad_hinge_logits_ptr,
    stride_gt,
    lse_ptr,
    grad_log_prob_ptr,
    labels_ptr,
    n_vocab,
    logit_scale,
    softcap,
    HAS_HINGE: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V logits of a token a program. One read of each logit and of the hinge's gradient, one write.

    On sm_90 about 19 instructions (epilogue_bwd bf16), about 23 instructions (epilogue_bwd softcap bf16); an H100 has
    time for 53 in 6 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = v < stride_zt
    z_ptr += row * stride_zt
    label = tl.load(labels_ptr + row)
    if label == -1:
        tl.store(z_ptr + v, tl.zeros([BLOCK_V], z_ptr.dtype.element_ty), mask=mask)
        return
    z = tl.load(z_ptr + v, mask=mask, other=0.0).to(tl.float32)
    grad = tl.zeros([BLOCK_V], tl.float32)
    if HAS_HINGE:
        grad += tl.load(grad_hinge_logits_ptr + row * stride_gt + v, mask=mask, other=0.0).to(tl.float32)
    if HAS_LOG_PROB:
        p = _exp(z - tl.load(lse_ptr + row))
        grad += (tl.where(v == label, 1.0, 0.0) - p) * tl.load(grad_log_prob_ptr + row)
    if HAS_SOFTCAP:
        z *= 1.0 / softcap
        grad *= 1.0 - z * z
    tl.store(z_ptr + v, (grad * logit_scale).to(z_ptr.dtype.element_ty), mask=mask)


def _launch_constants(vocab: int, softcap: float | None, block_v: int) -> dict:
    block_v = min(block_v, max(1 << (vocab - 1).bit_length(), _PAD))
    return {
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_V": block_v,
        "num_warps": 8 if block_v >= 4096 else 4,
        "enable_fp_fusion": True,
    }


def _epilogue_fwd_triton(
    lse: torch.Tensor | None,
    z: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    block_v: int = _BLOCK_V,
) -> None:
    """``z``: the first V columns of a buffer whose rows are a multiple of 16 long."""
    rows, vocab = z.shape
    if not rows:
        return
    with torch.cuda.device_of(z):
        _epilogue_fwd_kernel[(rows,)](
            lse,
            z,
            z.stride(0),
            labels,
            vocab,
            logit_scale,
            softcap or 0.0,
            ignore_index,
            HAS_LSE=lse is not None,
            HAS_SCALE=logit_scale != 1,
            **_launch_constants(vocab, softcap, block_v),
        )


def _epilogue_bwd_triton(
    z: torch.Tensor,
    grad_hinge_logits: torch.Tensor | None,
    lse: torch.Tensor,
    grad_log_prob: torch.Tensor | None,
    labels: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    block_v: int = _BLOCK_V,
) -> None:
    """``z`` and ``grad_hinge_logits``: the first V columns of buffers whose rows are a multiple of 16 long."""
    rows, vocab = z.shape
    if not rows:
        return
    constants = _launch_constants(vocab, softcap, block_v)
    with torch.cuda.device_of(z):
        _epilogue_bwd_kernel[(rows, -(-vocab // constants["BLOCK_V"]))](
            z,
            z.stride(0),
            grad_hinge_logits,
            0 if grad_hinge_logits is None else grad_hinge_logits.stride(0),
            lse,
            grad_log_prob,
            labels,
            vocab,
            logit_scale,
            softcap or 0.0,
            HAS_HINGE=grad_hinge_logits is not None,
            HAS_LOG_PROB=grad_log_prob is not None,
            **constants,
        )


class _Kernels(NamedTuple):
    hinge_fwd: Callable
    hinge_bwd: Callable
    epilogue_fwd: Callable
    epilogue_bwd: Callable


_TORCH = _Kernels(_margin_hinge_fwd_cpu, _margin_hinge_bwd_cpu, _epilogue_fwd_torch, _epilogue_bwd_torch)
_TRITON = _Kernels(_margin_hinge_fwd_triton, _margin_hinge_bwd_triton, _epilogue_fwd_triton, _epilogue_bwd_triton)


def _buffer(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, -(-columns // _PAD) * _PAD, dtype=like.dtype, device=like.device)


def _product(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _logits(
    kernels: _Kernels,
    out: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> None:
    _product(out, hidden, weight, bias)
    if logit_scale != 1 or softcap is not None:
        kernels.epilogue_fwd(None, out, targets, logit_scale, softcap, ignore_index)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _blocks(n: int, vocab: int, chunk_tokens: int, itemsize: int) -> list[slice]:
    """Of the vocabulary, whose gradients for all ``n`` tokens are computed together.

    A quarter of the logits that the forward pass holds, as dL/dW is in memory beside them now, and in fp32, where that
    is twice as large and products take so long that to add up dL/dx does not show, a sixteenth; but no slivers of the
    vocabulary where there are very many tokens.
    """
    share = 4 if itemsize < 4 else 16
    width = max(-(-vocab * chunk_tokens // (share * max(n, 1))), min(_MIN_VOCAB_BLOCK, chunk_tokens))
    return _slices(vocab, -(-width // _PAD) * _PAD)


def _forward(
    kernels: _Kernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int,
) -> tuple[torch.Tensor, ...]:
    """Hinge, active count, the label's log-probability under both models, normalizer and hinge statistics."""
    n, vocab = labels.numel(), weight.shape[0]
    dtype = _arithmetic_dtype(hidden, ref_hidden)
    floats = {"dtype": dtype, "device": hidden.device}
    hinge, log_prob, ref_log_prob, lse = (torch.empty(n, **floats) for _ in range(4))
    ref_lse = torch.empty(n, **floats)
    active, stats = torch.empty(n, dtype=torch.int32, device=hidden.device), torch.empty(n, _STATS, **floats)
    z_buffer, ref_buffer = (_buffer(min(chunk_tokens, n), vocab, like) for like in (hidden, ref_hidden))
    models = ((z_buffer, lse, hidden, weight, bias), (ref_buffer, ref_lse, ref_hidden, ref_weight, ref_bias))
    shape = (ignore_index, logit_scale, softcap)
    # In the space of log-probabilities the hinge needs the normalizers itself.
    of_hinge = space == "log_probs" and logit_scale == 1 and softcap is None
    blocks = _blocks(n, vocab, chunk_tokens, hidden.element_size()) if norm == "linf" else []
    tiles = [_buffer(min(chunk_tokens, n), blocks[0].stop, like) for like in (hidden, ref_hidden) if blocks]
    for rows in _slices(n, chunk_tokens):
        targets = labels[rows]
        count = targets.numel()
        z, z_ref = (buffer[:count, :vocab] for buffer in (z_buffer, ref_buffer))
        for i, (buffer, normalizer, x, w, b) in enumerate(models):
            logits = buffer[:count, :vocab]
            for block in blocks:
                tile = tiles[i][:count, : block.stop - block.start]
                _logits(kernels, tile, x[rows], w[block], None if b is None else b[block], targets, *shape)
                logits[:, block] = tile
            if not blocks:
                _product(logits, x[rows], w, b)
            if not of_hinge:
                scale_and_cap = (1.0, None) if blocks else (logit_scale, softcap)
                kernels.epilogue_fwd(normalizer[rows], logits, targets, *scale_and_cap, ignore_index)
        hinge[rows], active[rows], stats[rows] = kernels.hinge_fwd(z, z_ref, targets, margin, norm, space, ignore_index)
        if of_hinge:
            lse[rows], ref_lse[rows] = stats[rows, 0], stats[rows, 0] - stats[rows, 1]
        inside = (targets >= 0) & (targets < vocab)
        column = targets.where(inside, 0)[:, None]
        for out, logits, normalizer in ((log_prob, z, lse), (ref_log_prob, z_ref, ref_lse)):
            of_label = logits.gather(1, column).squeeze(1) - normalizer[rows]
            out[rows] = of_label.where(inside, math.nan).where(targets != ignore_index, 0)
    return hinge, active, log_prob, ref_log_prob, lse, stats


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Sums in the dtype of ``total``, products in that of ``a``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        for start in range(0, a.shape[0], _SUM_ROWS):
            total[start : start + _SUM_ROWS] += torch.mm(a[start : start + _SUM_ROWS], b)


def _backward_of_blocks(
    kernels: _Kernels,
    grad_hinge: torch.Tensor | None,
    grad_log_prob: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    lse: torch.Tensor,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int,
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; of those not needed an empty tensor."""
    n, vocab = labels.numel(), weight.shape[0]
    need_hidden, need_weight, need_bias = needed
    kept = labels != ignore_index
    counted = hidden
    # On a GPU, to ask whether every token is kept would synchronise.
    if need_weight and not (kept.is_cpu and kept.all()):
        # Padding may hold NaN, which a gradient of 0 does not silence in a product.
        counted = hidden.where(kept[:, None], 0)
    blocks = _blocks(n, vocab, chunk_tokens, hidden.element_size())
    sums = {"dtype": hidden.dtype if len(blocks) == 1 else _arithmetic_dtype(hidden), "device": hidden.device}
    grad_hidden = torch.zeros(hidden.shape if need_hidden else (0,), **sums)
    grad_weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(weight.shape[:1] if need_bias else (0,), dtype=weight.dtype, device=weight.device)
    models = [(_buffer(n, blocks[0].stop, hidden), hidden, weight, bias)]
    if grad_hinge is not None:
        models.append((_buffer(n, blocks[0].stop, ref_hidden), ref_hidden, ref_weight, ref_bias))
        hinge_buffer = models[1][0] if ref_hidden.dtype == hidden.dtype else torch.empty_like(models[0][0])
    shaped = logit_scale != 1 or softcap is not None
    chunks = _slices(n, chunk_tokens if grad_hinge is not None and norm == "linf" else max(n, 1))
    for block in blocks:
        columns = block.stop - block.start
        targets = labels - block.start
        targets = targets.where((targets >= 0) & (targets < columns), columns).where(kept, _IGNORED)
        for buffer, x, w, b in models:
            for rows in chunks:
                of_block = (w[block], None if b is None else b[block], targets[rows], _IGNORED, logit_scale, softcap)
                _logits(kernels, buffer[rows, :columns], x[rows], *of_block)
        z = models[0][0][:, :columns]
        hinge_grad = None
        if grad_hinge is not None:
            hinge_grad = z if grad_log_prob is None and not shaped else hinge_buffer[:, :columns]
            options = (margin, norm, space, _IGNORED)
            kernels.hinge_bwd(hinge_grad, grad_hinge, z, models[1][0][:, :columns], targets, stats, *options)
        if grad_log_prob is not None or shaped:
            kernels.epilogue_bwd(z, hinge_grad, lse, grad_log_prob, targets, logit_scale, softcap)
        if need_hidden:
            _add_product(grad_hidden, z, weight[block])
        if need_weight:
            torch.mm(z.t(), counted, out=grad_weight[block])
        if need_bias:
            torch.sum(z, dim=0, out=grad_bias[block])
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@torch.library.custom_op("quail::linear_logit_margin_hinge", mutates_args=(), device_types="cpu")
def _linear_margin_hinge_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_label_range(labels, weight.shape[0], ignore_index)
    heads = (weight, bias), (ref_weight, ref_bias)
    options = (margin, norm, space, ignore_index, logit_scale, softcap, chunk_tokens)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if kept.numel() == labels.numel():
        return _forward(_TORCH, hidden, *heads[0], ref_hidden, *heads[1], labels, *options)
    outputs = _forward(_TORCH, hidden[kept], *heads[0], ref_hidden[kept], *heads[1], labels[kept], *options)
    return tuple(x.new_zeros(labels.numel(), *x.shape[1:]).index_copy_(0, kept, x) for x in outputs)


@_linear_margin_hinge_op.register_kernel("cuda")
def _(*args):
    return _forward(_TRITON, *args)


@_linear_margin_hinge_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, *_):
    n, dtype = labels.shape[0], _arithmetic_dtype(hidden, ref_hidden)
    hinge, log_prob, ref_log_prob, lse = (hidden.new_empty(n, dtype=dtype) for _ in range(4))
    active, stats = hidden.new_empty(n, dtype=torch.int32), hidden.new_empty(n, _STATS, dtype=dtype)
    return hinge, active, log_prob, ref_log_prob, lse, stats


# Among a DTensor's arguments those before the first integer that are None do not tell one call from another.
@torch.library.custom_op("quail::linear_logit_margin_hinge_backward", mutates_args=(), device_types="cpu")
def _linear_margin_hinge_backward_op(
    ignore_index: int,
    grad_hinge: torch.Tensor | None,
    grad_log_prob: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    ref_bias: torch.Tensor | None,
    labels: torch.Tensor,
    lse: torch.Tensor,
    stats: torch.Tensor,
    margin: float,
    norm: str,
    space: str,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int,
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = (margin, norm, space, ignore_index, logit_scale, softcap, chunk_tokens, needed)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    every = kept.numel() == labels.numel()

    def rows(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or every else x[kept]

    grad_hidden, grad_weight, grad_bias = _backward_of_blocks(
        _TORCH,
        rows(grad_hinge),
        rows(grad_log_prob),
        rows(hidden),
        weight,
        bias,
        rows(ref_hidden),
        ref_weight,
        ref_bias,
        rows(labels),
        rows(lse),
        rows(stats),
        *options,
    )
    if needed[0] and not every:
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, kept, grad_hidden)
    return grad_hidden, grad_weight, grad_bias


@_linear_margin_hinge_backward_op.register_kernel("cuda")
def _(ignore_index, *args):
    return _backward_of_blocks(_TRITON, *args[:-4], ignore_index, *args[-4:])


@_linear_margin_hinge_backward_op.register_fake
def _(ignore_index, grad_hinge, grad_log_prob, hidden, weight, *args):
    need_hidden, need_weight, need_bias = args[-1]
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    return grad_hidden, grad_weight, weight.new_empty(weight.shape[0] if need_bias else 0)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.margin, ctx.norm, ctx.space, ctx.ignore_index, ctx.logit_scale, ctx.softcap, ctx.chunk_tokens = inputs
    _, active, _, ref_log_prob, lse, stats = output
    ctx.mark_non_differentiable(active, ref_log_prob, lse, stats)
    ctx.set_materialize_grads(False)  # without the hinge's gradient the reference's logits are not recomputed
    ctx.save_for_backward(*tensors, lse, stats)


def _backward(ctx, grad_hinge, _grad_active, grad_log_prob, _grad_ref_log_prob, _grad_lse, _grad_stats):
    needed = [ctx.needs_input_grad[i] for i in range(3)]
    if grad_hinge is None and grad_log_prob is None:
        return (None,) * 14
    grads = _linear_margin_hinge_backward_op(
        ctx.ignore_index,
        None if grad_hinge is None else grad_hinge.contiguous(),
        None if grad_log_prob is None else grad_log_prob.contiguous(),
        *ctx.saved_tensors,
        ctx.margin,
        ctx.norm,
        ctx.space,
        ctx.logit_scale,
        ctx.softcap,
        ctx.chunk_tokens,
        needed,
    )
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *(None,) * 11)


_linear_margin_hinge_op.register_autograd(_backward, setup_context=_setup_context)


def _check_head(prefix: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.dtype not in _LOGIT_DTYPES and not (hidden.dtype == torch.float64 and not hidden.is_cuda):
        raise ValueError(f"{prefix}hidden: expected float32, bfloat16 or float16; got {hidden.dtype}")
    if not hidden.ndim or not hidden.shape[-1]:
        raise ValueError(f"{prefix}hidden: expected [..., features] with at least one; got {list(hidden.shape)}")
    if weight.ndim != 2 or not weight.shape[0] or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: expected [vocabulary, {hidden.shape[-1]}] with at least one row; got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias: expected [{weight.shape[0]}]; got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            expected = f"{hidden.dtype} on {hidden.device}, as {prefix}hidden is"
            raise ValueError(f"{prefix}{name}: expected {expected}; got {tensor.dtype} on {tensor.device}")


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_tokens: int,
) -> None:
    if not (isinstance(logit_scale, (int, float)) and math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale: expected a finite number above 0; got {logit_scale!r}")
    if softcap is not None and not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: expected None or a finite number above 0; got {softcap!r}")
    if not (isinstance(chunk_tokens, int) and chunk_tokens > 0):
        raise ValueError(f"chunk_tokens: expected a whole number above 0; got {chunk_tokens!r}")
    _check_head("", hidden, weight, bias)
    _check_head("ref_", ref_hidden, ref_weight, ref_bias)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.device != hidden.device:
        expected = f"{[*hidden.shape[:-1], 'any']} on {hidden.device}, one row for each of hidden"
        raise ValueError(f"ref_hidden: expected {expected}; got {list(ref_hidden.shape)} on {ref_hidden.device}")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight: expected {weight.shape[0]} rows, as weight has; got {ref_weight.shape[0]}")
    if labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        expected = f"{list(hidden.shape[:-1])} on {hidden.device}, one for each row of hidden"
        raise ValueError(f"labels: expected {expected}; got {list(labels.shape)} on {labels.device}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64 or int32; got {labels.dtype}")
    sharded = hasattr(hidden, "device_mesh")
    others = {"weight": weight, "bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, tensor in {**others, "labels": labels}.items():
        if tensor is not None and hasattr(tensor, "device_mesh") != sharded:
            kinds = ("a DTensor", "a plain tensor")
            expected, got = kinds if sharded else kinds[::-1]
            raise ValueError(f"{name}: expected {expected}, as hidden is; got {got}")


def _as_autocast(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """In the dtype that autocast would run a linear layer in, where it is on."""
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def linear_logit_margin_hinge(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: float,
    norm: Literal["per_logit", "l2", "linf", "label"] = "per_logit",
    space: Literal["logits", "log_probs"] = "logits",
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> LinearMarginHinge:
    """``logit_margin_hinge`` of two output heads, and the labels' log-probabilities, without [tokens, V] logits.

    The formulas and the way of computing stand at the top of the file. Logits are what the products of the model's
    dtype give; scale and softcap are applied in fp32 and rounded once. Under autocast the heads run in its dtype.
    Of the forward pass only numbers of tokens are kept. A head that needs no gradient, frozen or under LoRA, costs no
    product; if only ``label_log_probs`` are differentiated, the reference's logits are not recomputed. DTensors whose
    tokens are sharded stay so, with output heads whole on every rank, and the gradients of these are sums over the
    ranks; heads that are sharded, or batches that are cut unevenly, are gathered first.

    Memory: beside its results, ``chunk_tokens`` rows of logits of each model, and in the backward pass a quarter as
    many logits, in blocks of the vocabulary. Measured on a CPU (``python -m bench.memory``) at 4,096 tokens, a
    vocabulary of 128,256 and hidden size 2,048 in bf16: 0.71 to 0.74 GB beyond the inputs, where the eager hinge takes
    8.4 (label) to 14.7 GB (per_logit on log_probs), 5 to 9 %. 0.54 GB of that are the gradients of hidden and weight,
    which eager returns as well; in the forward pass, without them, it is 0.53 to 0.56 GB. In fp32 these gradients alone
    are a tenth of eager's memory, 1.08 of 10.5 GB (per_logit): no path that returns them is far below it
    (bench/memory.py reckons).

    Args:
        hidden: float32, bfloat16 or float16 [..., D], of the model that unlearns, aligned with ``labels``:
            ``hidden[:, :-1]`` and ``labels[:, 1:]``. Such a view is copied, to [tokens, D].
        weight: [V, D], of its output head (or its embedding, where they are tied), in the dtype of ``hidden``.
        ref_hidden, ref_weight: [..., D'] and [V, D'], of the original model; D' and dtype may differ. They get no
            gradient.
        labels: int64 or int32 [...]. Rows whose label is ``ignore_index`` count as no token and get a gradient
            of 0, whatever they hold. On the CPU they cost nothing. On CUDA, where to count them would synchronise,
            they cost their share of the products, but no pass over logits: leave them out if there are many.
        margin: in units of logits (nats, with ``space="log_probs"``), above 0.
        norm, space: which hinge, and between what.
        reduction: of the loss: ``"mean"`` over the tokens that are not ignored (0 if there are none), ``"sum"``, or
            ``"none"``.
        bias, ref_bias: [V], of the heads.
        logit_scale: what the models multiply their logits by: ``config.logit_scale`` of Cohere,
            ``1 / config.logits_scaling`` of Granite.
        softcap: ``config.final_logit_softcapping`` of Gemma 2.
        chunk_tokens: rows of logits held at once. None: 1,024, for float32 512; with fewer, products lose efficiency.

    Returns:
        A ``LinearMarginHinge``: loss, label_log_probs, ref_label_log_probs, active_share. A NaN among the logits of a
        token makes its hinge and log-probability NaN: never a silent 0.

    Raises:
        ValueError: on an unknown option, a margin, scale or softcap that is not finite and above 0, dtypes, shapes or
            devices that do not fit, and, on the CPU, on a label outside the vocabulary. On CUDA, where the check
            would synchronise, the hinge and the log-probabilities of such a row are NaN.
    """
    _check_options(margin, norm, space, reduction)
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = map(
        _as_autocast, (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    )
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_BYTES // max(hidden.element_size(), ref_hidden.element_size())
    _check(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, logit_scale, softcap, chunk_tokens)
    admit_dtensors(hidden)
    hinge, active, log_prob, ref_log_prob, _, _ = _linear_margin_hinge_op(
        flat_rows(hidden, hidden.shape[-1]),
        weight,
        bias,
        flat_rows(ref_hidden.detach(), ref_hidden.shape[-1]),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        flat_rows(labels).long().contiguous(),
        float(margin),
        norm,
        space,
        ignore_index,
        float(logit_scale),
        None if softcap is None else float(softcap),
        chunk_tokens,
    )
    tokens = (labels != ignore_index).sum().clamp(min=1)
    if reduction == "none":
        loss = hinge.view(labels.shape)
    else:
        loss = hinge.sum() / tokens if reduction == "mean" else hinge.sum()
    terms = weight.shape[0] if norm == "per_logit" else 1
    active_share = (active.sum() / (tokens * terms)).float()
    return LinearMarginHinge(loss, log_prob.view(labels.shape), ref_log_prob.view(labels.shape), active_share)
