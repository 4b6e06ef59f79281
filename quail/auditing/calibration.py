r"""What arrives of an update in each layer's output, on text.

With W and W' a linear layer's weights [out, in] before and after, Q what a deployment makes of either on its own
scales, all in the dtype of the deployment, and x_t the inputs of the layer while AFTER, not quantized, reads the text:

    dW = W' - W                      the update that was trained
    D = Q(W') - Q(W)                 the one that is delivered

    signal = sum_t ||dW x_t||^2      noise = sum_t ||(D - dW) x_t||^2      SNR = signal / noise

It is in the layer's own units, so that large and small layers compare, and it weighs an input channel by how much the
text uses it, which a comparison of weights alone cannot. An update that does not arrive at all has D = 0, so the
noise is the signal and the SNR is 1: 0 dB. One that arrives in the mean, by few weights that each jump a whole step,
may have far less than that and yet be there: ``share`` = sum <D x, dW x> / signal tells the two apart.

What the flip law expects of the noise. A weight that lies anywhere in its bucket of width s, with equal chance, and
moves by dw = (k + f) s with k whole and 0 <= f < 1, ends k buckets on with probability 1 - f and k + 1 with
probability f. Its deployed value moves by dw in the mean, with variance s^2 f (1 - f): s |dw| - dw^2 below one step.
With weights independent of each other, E[noise] = sum over weights of that variance times sum_t x_t^2 of its input.
It is exact for uniform buckets on one grid; levels of a codebook that are not in the middle of their buckets, and
scales that AFTER fits anew, add to it. For weights that start on the grid it does not hold.

Neither sum needs the outputs. Up to ``in`` tokens the inputs X [tokens, in] are kept as they are, in the dtype of the
deployment, and beyond that X^T X [in, in] in fp32, since sum_t ||E x_t||^2 = tr(E X^T X E^T): exact over all tokens
either way, and no more of them than the layer is wide are ever held. Layers that read one tensor (query, key and
value) share it. Weights are then compared block by block, all recipes at once.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from quail_kernels.formats import Format, group_rows, group_spans

from ..machine import linear_in_fp32
from .checkpoints import Checkpoint, one_line, some
from .figures import Calibration, NotMeasured, OutputFigures, OutputRow

DEFAULT_TOKENS = 2048
_WINDOW = 512
_BATCH_TOKENS = 2048
# Beyond it fp32 does not tell one from nothing.
_LARGEST_RATIO = 1e12
_SETS = (".json", ".jsonl")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"),
    "tekken.json",
)


@dataclass(frozen=True)
class OutputSums:
    """Sums over tokens, in fp64; those of two blocks, or of two layers, are added.

    Attributes:
        signal, noise, delivered: of ||dW x||^2, ||(D - dW) x||^2 and ||D x||^2.
        product: of <D x, dW x>.
        expected_noise: what the flip law expects of ``noise``.
    """

    signal: float = 0.0
    noise: float = 0.0
    delivered: float = 0.0
    product: float = 0.0
    expected_noise: float = 0.0

    def __add__(self, other: "OutputSums") -> "OutputSums":
        return OutputSums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Inputs:
    """The inputs of one linear layer, [tokens, width]: themselves, or their second moment where they are more.

    Attributes:
        width: of one input.
        tokens: how many were added.
        squares: fp64 [width], the sum over tokens of x^2; there from ``close`` on.
    """

    def __init__(self, width: int):
        self.width, self.tokens = width, 0
        self._rows: list[torch.Tensor] = []
        self._moment: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """``x`` is [..., width], in any float dtype, and is copied."""
        x = x.detach().reshape(-1, self.width)
        self.tokens += len(x)
        if self._moment is None and self.tokens <= self.width:
            self._rows.append(x.clone())
            return
        if self._moment is None:
            self._moment = torch.zeros(self.width, self.width, device=x.device)
        for rows in (*self._rows, x):
            rows = rows.float()
            self._moment.addmm_(rows.t(), rows)
        self._rows = []

    def close(self) -> None:
        """Nothing is added any more: several threads may ask from now on."""
        if self._moment is not None:
            self.squares = self._moment.diagonal().double()
        else:
            self._rows = [torch.cat(self._rows)]
            self.squares = self._rows[0].double().square().sum(0)

    def images(self, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b), both linear in ``e``, with sum(a b) = sum over tokens of ||e x||^2; ``e`` is fp32 [rows, width]."""
        if self._moment is not None:
            return e, e @ self._moment
        # Not kept in fp32: of all layers that would be twice the memory.
        image = e @ self._rows[0].to(e.dtype).t()
        return image, image


def output_sums(
    inputs: Inputs,
    before: torch.Tensor,
    after: torch.Tensor,
    recipes: dict[str, Format],
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, OutputSums]:
    """What a block of rows of a layer shows, by recipe.

    ``before`` and ``after`` are whole rows [rows * width], flat, in the dtype of the deployment, and start with a
    group of every recipe. ``ranges`` are those of ``compare_updates``, for recipes that look at the whole tensor.
    """
    width = inputs.width
    update = after.float() - before.float()
    a, b = inputs.images(update.view(-1, width))
    signal = _energy(a, b)
    sums = {}
    for name, recipe in recipes.items():
        of = [
            recipe.fit_range(*ranges[side]) if recipe.looks_at_tensor else None
            for side in ("range_before", "range_after")
        ]
        delivered, variance = torch.empty_like(update), torch.empty_like(update)
        for span, _, short in group_spans(len(update), recipe):
            value, step = _deployed(before[span], recipe, of[0], short)
            delivered[span] = _deployed(after[span], recipe, of[1], short)[0] - value
            variance[span] = _flip_variance(update[span].view(len(step), -1), step).view(-1)
        c, d = inputs.images(delivered.view(-1, width))
        sums[name] = OutputSums(
            signal=signal,
            noise=_energy(c - a, d - b),
            delivered=_energy(c, d),
            product=_inner(c, b),
            expected_noise=float(variance.view(-1, width).sum(0, dtype=torch.float64) @ inputs.squares),
        )
    return sums


def _energy(a: torch.Tensor, b: torch.Tensor) -> float:
    # Where inputs cancel, fp32 may leave less than nothing.
    return max(_inner(a, b), 0.0)


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _deployed(
    w: torch.Tensor, recipe: Format, of_tensor: torch.Tensor | None, short: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dequantized, flat; widths of the buckets, [groups, group_size] or [groups, 1]), in fp32."""
    rows = group_rows(w, recipe, short)
    params = recipe.params(rows, short, of_tensor)
    rows = rows.float()
    rank = recipe.rank(rows, params, short)
    step = recipe.step(rank, params)
    return recipe.value(rank, params).to(w.dtype).float().view(-1), step if step.stride(1) else step[:, :1]


def _flip_variance(change: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    steps = (change.abs() / step).nan_to_num_(0, 0)  # a zero group has no step
    part = steps.frac_()
    return step.square() * part * (1 - part)


def read_texts(calibration: str | os.PathLike | Sequence[str]) -> tuple[str, list[str]]:
    """(what to call it, texts): of a text file, of a JSON set as ``load_examples`` reads it, or as they are.

    Raises:
        ValueError: where there is no such file, it is no UTF-8 text, or holds nothing.
    """
    if isinstance(calibration, (str, os.PathLike)):
        path = Path(calibration)
        if path.suffix in _SETS:
            from ..data import load_examples

            return str(path), [example.prompt + example.completion for example in load_examples(path)]
        try:
            name, texts = str(path), [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"calibration: expected a UTF-8 text file; got {path}: {one_line(error)}") from None
    else:
        name, texts = "texts", list(calibration)
    if not any(text.strip() for text in texts):
        raise ValueError(f"calibration: expected some text; got {name}, which holds none")
    return name, [text for text in texts if text.strip()]


@dataclass(frozen=True)
class Sequences:
    """What AFTER is to read.

    Attributes:
        source: the text's name.
        token_ids: by sequence.
    """

    source: str
    token_ids: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()

    def batches(self) -> Iterator[torch.Tensor]:
        """int64 [sequences, length]. Only sequences of one length make a batch: padding would be read by layers that
        do not know of it."""
        ordered = sorted(self.token_ids, key=len, reverse=True)
        while ordered:
            length = len(ordered[0])
            most = max(_BATCH_TOKENS // length, 1)
            count = sum(len(ids) == length for ids in ordered[:most])
            yield torch.tensor(ordered[:count])
            del ordered[:count]


def encode_texts(
    source: str, texts: list[str], sides: Iterable[str | os.PathLike], model: torch.nn.Module, tokens: int
) -> Sequences:
    """The texts in windows of the model's length, 512 tokens at most; of more than ``tokens``, windows evenly spread.

    The tokenizer is that of the first of ``sides`` that has one.

    Raises:
        ValueError: where neither has one, it is another model's, or it makes no tokens of the texts.
    """
    tokenizer = _tokenizer(sides)
    longest = [_WINDOW, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    window = int(min(length for length in longest if length))
    windows = [ids for ids in _windows(tokenizer, texts, window) if ids]
    size = model.config.get_text_config().vocab_size
    if not windows or max(map(max, windows)) >= size:
        got = f"one with token {max(map(max, windows))}" if windows else "one that makes none of the text"
        raise ValueError(f"calibration: expected a tokenizer of the model's {size} tokens; got {got}")
    return Sequences(source, _spread(windows, tokens))


def _tokenizer(sides: Iterable[str | os.PathLike]):
    from transformers import AutoTokenizer

    errors = []
    for side in sides:
        path = Path(side)
        options = {}
        if path.suffix == ".gguf" and path.is_file():
            path, options = path.parent, {"gguf_file": path.name}
        elif path.is_dir():
            # Without its files transformers makes an empty one up.
            if not any((path / name).is_file() for name in _TOKENIZER_FILES):
                errors.append(f"no tokenizer in {path}")
                continue
        try:
            return AutoTokenizer.from_pretrained(
                path if path.exists() else str(side), trust_remote_code=False, **options
            )
        except Exception as error:  # a tokenizer's files may be wrong in any way
            errors.append(one_line(error))
    raise ValueError(f"calibration: expected a tokenizer with AFTER or BEFORE; got {errors[0]:.200}")


def _windows(tokenizer, texts: list[str], window: int) -> list[list[int]]:
    if tokenizer.is_fast:
        # Each window with the special tokens that a text of its own would have.
        return tokenizer(
            texts, truncation=True, max_length=window, return_overflowing_tokens=True, return_attention_mask=False
        ).input_ids
    ids = [tokenizer(text).input_ids for text in texts]
    return [row[start : start + window] for row in ids for start in range(0, len(row), window)]


def _spread(windows: list[list[int]], tokens: int) -> list[list[int]]:
    total = sum(map(len, windows))
    if total <= tokens:
        return windows
    kept, read, taken = [], 0, 0
    for ids in windows:
        read += len(ids)
        if taken + len(ids) <= tokens * read / total:
            kept.append(ids)
            taken += len(ids)
    return kept or [windows[0][:tokens]]


def load_model(side: Checkpoint, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model of a checkpoint in ``dtype``, for inference: of the class that its configuration names, with the
    weights that the audit reads, an adapter merged and GGUF dequantized.

    Raises:
        ValueError: where transformers has no such model, it is no causal language model or encoder, or it has weights
            that the checkpoint has not.
    """
    if side.model is None:
        expected = f"{side.side} with the configuration of a model that transformers has"
        raise ValueError(f"calibration: expected {expected}; got {'one it cannot build' if side.build else 'none'}")
    architecture, config = type(side.model), side.model.config
    if config.is_encoder_decoder:
        expected = "a causal language model or an encoder"
        raise ValueError(f"calibration: expected {expected}; got {architecture.__name__}")
    config.use_cache = False
    weights = {
        name: stored.read(slice(None)).view(stored.shape).to(dtype)
        for name, stored in side.tensors.items()
        if stored.dtype is not None
    }
    try:
        with _no_bar_of_transformers():
            model, loaded = architecture.from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        model = model.to(device)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"calibration: expected {side.side} to load as {architecture.__name__}; got {one_line(error):.300}"
        ) from error
    if missing := loaded["missing_keys"]:
        expected = f"all weights of {architecture.__name__} in {side.side}"
        raise ValueError(f"calibration: expected {expected}; got none for {some(missing)}")
    return model.eval()


@contextlib.contextmanager
def _no_bar_of_transformers():
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def read_inputs(
    model: torch.nn.Module, sequences: Sequences, shapes: dict[str, tuple[int, int]], progress: bool = True
) -> tuple[dict[str, Inputs], tuple[NotMeasured, ...]]:
    """Runs the model over the sequences.

    Args:
        model: in evaluation mode.
        sequences: what it reads.
        shapes: (out, in) by the name of a weight that a deployment quantizes, as its checkpoint spells it.
        progress: as of ``audit``.

    Returns:
        The inputs by the name of the weight, and those that have none, with the reason.
    """
    from transformers.pytorch_utils import Conv1D

    linear = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    prefix = model.base_model_prefix
    inputs: dict[str, Inputs] = {}
    # The weight whose layer read the same tensor before, and that tensor with its version.
    first_of: dict[str, str] = {}
    last: list = [None, None, ""]

    def recorder(name: str) -> Callable:
        width = shapes[name][1]

        def record(module, args, kwargs) -> None:
            x = args[0] if args else kwargs["input"]
            if x is last[0] and x._version == last[1]:
                first = last[2]
            else:
                first = name
                last[:] = x, x._version, first
            if first_of.setdefault(name, first) != first:
                raise ValueError(f"calibration: expected {name} to read the tensor of {first_of[name]} in each batch")
            if first == name:
                inputs.setdefault(name, Inputs(width)).add(x)

        return record

    not_measured, handles = {}, []
    for name, (_, width) in shapes.items():
        spelled = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        module = next((linear[other] for other in spelled if other in linear), None)
        if module is None:
            not_measured[name] = f"no linear layer of {type(model).__name__} has it"
            continue
        features = module.in_features if isinstance(module, torch.nn.Linear) else module.nx
        if features != width:
            not_measured[name] = f"{width} inputs in the checkpoint, {features} in the model"
            continue
        handles.append(module.register_forward_pre_hook(recorder(name), with_kwargs=True))
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    hidden = None if progress else True
    try:
        with (
            torch.no_grad(),
            linear_in_fp32(model.device),
            tqdm(desc="calibration", total=sequences.tokens, unit=" tokens", disable=hidden) as bar,
        ):
            for ids in sequences.batches():
                model(input_ids=ids.to(model.device), **options)
                last[:] = None, None, ""
                bar.update(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    found = {name: inputs[first] for name, first in first_of.items() if first in inputs}
    for each in inputs.values():
        each.close()
    broken = {id(each) for each in inputs.values() if not each.squares.isfinite().all()}
    for name in shapes:
        if name not in found:
            not_measured.setdefault(name, "no token of the text reaches it")
        elif id(found[name]) in broken:
            not_measured[name] = "NaN or infinity in its inputs"
            del found[name]
    return found, tuple(NotMeasured(name, reason) for name, reason in sorted(not_measured.items()))


@dataclass(frozen=True)
class Measured:
    """One tensor in one recipe."""

    name: str
    layer: str
    module: str
    format: str
    sums: OutputSums


def summary(
    sequences: Sequences,
    formats: Iterable[str],
    measured: list[Measured],
    not_measured: tuple[NotMeasured, ...],
    by_number: Callable[[str], list],
) -> Calibration:
    """The report's part of a calibration."""
    order = {format: i for i, format in enumerate(formats)}

    def rows(group: Callable[[Measured], tuple[str, str, str] | None]) -> tuple[OutputRow, ...]:
        groups: dict[tuple, list[OutputSums]] = {}
        for each in measured:
            if (named := group(each)) is not None:
                groups.setdefault((each.format, named), []).append(each.sums)
        made = [OutputRow(*named, format, len(sums), figures_of(sums)) for (format, named), sums in groups.items()]
        return tuple(sorted(made, key=lambda row: (order[row.format], by_number(row.name))))

    return Calibration(
        source=sequences.source,
        sequences=len(sequences.token_ids),
        tokens=sequences.tokens,
        formats={
            format: figures_of(sums) if (sums := [each.sums for each in measured if each.format == format]) else None
            for format in order
        },
        layers=rows(lambda each: (each.layer, each.layer, "") if each.layer else None),
        modules=rows(lambda each: (each.module, "", each.module)),
        cells=rows(lambda each: (f"{each.layer}.{each.module}".strip("."), each.layer, each.module)),
        tensors=rows(lambda each: (each.name, each.layer, each.module)),
        not_measured=not_measured,
    )


def figures_of(tensors: list[OutputSums]) -> OutputFigures:
    """Of some tensors together."""
    pooled = sum(tensors[1:], start=tensors[0])
    snr = _ratio(pooled.signal, pooled.noise)
    each = [number for sums in tensors if (number := _ratio(sums.signal, sums.noise)) is not None]
    lengths = math.sqrt(pooled.signal) * math.sqrt(pooled.delivered)
    return OutputFigures(
        signal=pooled.signal,
        noise=pooled.noise,
        output_snr=snr,
        output_snr_db=_decibels(snr),
        output_snr_median=median(each) if each else None,
        output_snr_min=min(each, default=None),
        output_snr_flip_law=_ratio(pooled.signal, pooled.expected_noise),
        # Rounding in the sums may leave the cosine of one direction above 1.
        output_cosine=None if not pooled.signal else min(pooled.product / lengths, 1.0) if lengths else 0.0,
        output_share=pooled.product / pooled.signal if pooled.signal else None,
    )


def _ratio(signal: float, noise: float) -> float | None:
    if not signal and not noise:
        return None
    return min(max(signal / noise if noise else math.inf, 1 / _LARGEST_RATIO), _LARGEST_RATIO)


def _decibels(ratio: float | None) -> float | None:
    return None if ratio is None else 10 * math.log10(ratio)
