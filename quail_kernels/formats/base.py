"""What every recipe has, and how a tensor is cut into groups."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_SIZES = range(8, 4097, 8)
# Small enough for a chunk's temporaries, half a megabyte each in fp32, to stay in cache, and large enough for an
# operation to take longer than its call.
_CHUNK_OF_A_CORE = 1 << 17
_LARGEST_CHUNK = 1 << 19


@dataclass(frozen=True)
class Format:
    """What every recipe has; ``group_size`` None means one group for the whole tensor.

    A subclass is a rule for the arithmetic. Its methods are the PyTorch reference, with groups as rows: x is
    [groups, group_size] in the model's dtype, ``short`` says that it is the one short group at the tensor's
    end, ``of_tensor`` is what ``fit_tensor`` gave for the whole of it.

    ``fit(x, short, of_tensor)``  the parameters, [groups], or [groups, 2] where ``n_params`` is 2
    ``rank(x, params, short)``    the bucket's number, 0 to 15
    ``bucket(rank, params)``      its place on the number line, int8; two ranks of one value are one bucket
    ``value(rank, params)``       what the bucket dequantizes to, before the cast to the model's dtype
    ``nearest(x, params, short)`` the value of x's rank
    ``unit(params)``              [groups], fp32: the width of a bucket, or what ``widths`` are multiples of
    ``step(rank, params)``        the width of the bucket, fp32
    ``stretched(change, rank)``   a change of the weight, fp32, as if its bucket were a unit wide
    ``kernel_rule(dtype)``        the constants that the tile functions of the rule's kind are given

    ``rank`` takes the parameters as ``fit`` gives them, ``value``, ``unit`` and ``step`` also as they are stored, in
    ``params_dtype``.
    """

    name: str
    group_size: int | None
    legal_group_sizes: tuple[int, ...] | range
    groups_divide_last_dim: bool

    kind = ""
    n_params = 1
    needs_tensor = False  # whether fit looks at of_tensor
    thresholds = ()  # between ranks, on the scale of a weight's position; () where buckets are uniform
    widths = ()  # by rank, as many as levels, where thresholds are
    inverse_widths = ()
    two_zeros = False  # whether the levels of rank 7 and 8 are the same
    pad_code = 0
    codes = tuple(range(16))  # by rank: what is stored
    buckets = tuple(range(16))  # by rank

    def __str__(self) -> str:
        return self.name if self.group_size is None else f"{self.name}@{self.group_size}"

    def params_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def groups(self, n: int) -> int:
        """How many groups n weights make."""
        return min(n, 1) if self.group_size is None else -(-n // self.group_size)

    def params_shape(self, n: int) -> tuple[int, ...]:
        return (self.groups(n), self.n_params) if self.n_params > 1 else (self.groups(n),)

    @property
    def looks_at_tensor(self) -> bool:
        """Whether the parameters of a group depend on weights of others."""
        return self.needs_tensor or self.group_size is None

    def fit_tensor(self, w: torch.Tensor) -> torch.Tensor | None:
        """What groups need to know of the whole tensor: for a whole-tensor group its parameters, else None.

        ``w`` has any shape and strides.
        """
        return self.fit_range(*tensor_range(w)) if self.looks_at_tensor and w.numel() else None

    def fit_range(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """``fit_tensor`` of a tensor with this smallest and largest weight: all that a rule can ask of one."""
        return self.fit(torch.stack([low, high])[None], False, None)

    def params(self, x: torch.Tensor, short: bool, of_tensor: torch.Tensor | None) -> torch.Tensor:
        """The parameters of these groups, which are pieces of one where it is the whole tensor."""
        return of_tensor if self.group_size is None else self.fit(x, short, of_tensor)

    def nearest(self, x: torch.Tensor, params: torch.Tensor, short: bool) -> torch.Tensor:
        return self.value(self.rank(x, params, short), params)

    def bucket(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return rank.to(torch.int8)

    @functools.cached_property
    def _tables(self) -> dict:
        return {}

    def table(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tuple of that name as a tensor, made once: for a thousand numbers that takes as long as to look up
        those of a chunk."""
        if (name, device) not in self._tables:
            self._tables[name, device] = torch.tensor(getattr(self, name), dtype=dtype, device=device)
        return self._tables[name, device]

    def unit(self, params: torch.Tensor) -> torch.Tensor:
        return (params if self.n_params == 1 else params[:, 0]).float()

    def step(self, rank: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        unit = self.unit(params)[:, None]
        return look_up(self.table("widths", rank.device), rank).mul_(unit) if self.widths else unit.expand(rank.shape)

    def stretched(self, change: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        return look_up(self.table("inverse_widths", rank.device), rank).mul_(change) if self.widths else change

    def kernel_rule(self, dtype: torch.dtype) -> tuple[float, ...]:
        return ()

    def kernel_table(self, device: torch.device) -> torch.Tensor | None:
        """What the tile functions look up in memory; ``column`` says where in it."""
        return None

    def column(self, name: str) -> int | None:
        """Where that tuple stands in ``kernel_table``, by cell; None where rank and entry are the same."""
        return None

    def kernel_constants(self, dtype: torch.dtype) -> dict:
        return {
            "KIND": self.kind,
            "RULE": self.kernel_rule(dtype),
            "THRESHOLDS": self.thresholds,
            "NEEDS_TENSOR": self.needs_tensor,
        }


def check_weight(name: str, w: torch.Tensor, recipe: Format) -> None:
    """Raises ValueError where ``w`` is no weight that ``recipe`` can take."""
    if w.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16; got {_short(w.dtype)}")
    check_shape(name, w.shape, recipe)


def check_shape(name: str, shape: torch.Size, recipe: Format) -> None:
    """Raises ValueError where the groups of ``recipe`` do not divide the last dimension and have to."""
    if recipe.groups_divide_last_dim and recipe.group_size is not None:
        if not shape or shape[-1] % recipe.group_size:
            expected = f"a last dimension that is a multiple of {recipe.group_size}, the group size of {recipe.name}"
            raise ValueError(f"{name}: expected {expected}; got shape {tuple(shape)}")


def tensor_range(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest element in w's dtype, both NaN where one is; nothing of w's size is made."""
    if w.is_contiguous():
        return torch.aminmax(w)
    # Without a dimension PyTorch would copy what is not contiguous.
    low, high = torch.aminmax(w, dim=max(range(w.dim()), key=w.shape.__getitem__))
    return low.amin(), high.amax()


def chunk_size(multiple_of: int = 1) -> int:
    """How many weights the references work on at a time: as many as the caches of PyTorch's threads hold."""
    most = min(_CHUNK_OF_A_CORE * torch.get_num_threads(), _LARGEST_CHUNK)
    return max(most // multiple_of, 1) * multiple_of


def group_spans(n: int, recipe: Format) -> Iterator[tuple[slice, slice, bool]]:
    """The groups of n weights, ``chunk_size()`` weights at a time: (slice of weights, slice of groups, short).

    The short last group comes alone; a whole-tensor group comes in pieces.
    """
    if recipe.group_size is None:
        stride = chunk_size()
        for start in range(0, n, stride):
            yield slice(start, min(start + stride, n)), slice(0, 1), False
        return
    size = recipe.group_size
    full = n // size * size
    stride = chunk_size(size)
    for start in range(0, full, stride):
        span = slice(start, min(start + stride, full))
        yield span, slice(span.start // size, span.stop // size), False
    if full < n:
        yield slice(full, n), slice(full // size, full // size + 1), True


def group_rows(flat: torch.Tensor, recipe: Format, short: bool) -> torch.Tensor:
    """The weights of a span with their groups as rows, a piece of a whole-tensor group as one."""
    return flat.view(1, -1) if short or recipe.group_size is None else flat.view(-1, recipe.group_size)


def flat_part(w: torch.Tensor, span: slice) -> torch.Tensor:
    """``w.reshape(-1)[span]``, contiguous; of a ``w`` that is not, no more than that is copied."""
    if w.is_contiguous():
        return w.view(-1)[span]
    if w.dim() == 1:
        return w[span].contiguous()
    row = w[0].numel()
    first, last = span.start // row, (span.stop - 1) // row
    if first == last:
        return flat_part(w[first], slice(span.start - first * row, span.stop - first * row))
    head = flat_part(w[first], slice(span.start - first * row, row))
    tail = flat_part(w[last], slice(0, span.stop - last * row))
    return torch.cat([head, w[first + 1 : last].reshape(-1), tail])


def group_chunks(w: torch.Tensor, recipe: Format) -> Iterator[tuple[slice, slice, torch.Tensor, bool]]:
    """``group_spans`` of w, of any strides: (slice of weights, slice of groups, [groups, group_size], short)."""
    for span, groups, short in group_spans(w.numel(), recipe):
        yield span, groups, group_rows(flat_part(w, span), recipe, short), short


def look_up(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``values[index]``, which on the CPU takes four times as long."""
    return values.index_select(0, index.flatten()).view(index.shape)


def finite_inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step, the largest number for one that overflows: no change at all is then still no step."""
    return (1.0 / step).clamp(max=torch.finfo(torch.float32).max)


def in_words(sizes: tuple[int, ...] | range) -> str:
    if isinstance(sizes, range):
        return f"a multiple of {sizes.step} from {sizes[0]} to {sizes[-1]}"
    return f"one of {', '.join(map(str, sizes))}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
