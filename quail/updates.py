"""Which weights an update reaches, and how far: callbacks of a Trainer.

A ``transformers.Trainer`` has no ``optimizer_step`` to override: what changes gradients acts in
``on_pre_optimizer_step``, after clipping, what changes weights in ``on_optimizer_step`` or at the end. Parameters that
are sharded over processes are not supported.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from quail_kernels import get_format
from quail_kernels.formats import Format, check_weight, group_chunks

from .weights import deployed_linears

LEVELS = Literal["module", "neuron", "weight"]
SCORES = Literal["update", "gradient", "flip_law"]
_BISECTIONS = 30  # of the way from a weight to the next bucket's value: more than an fp32 number has bits


@torch.no_grad()
def saliency_masks(gradients: Mapping[str, Tensor], level: LEVELS, share: float) -> dict[str, Tensor]:
    """Which weights are salient for what is to be forgotten: bool, by parameter, to be broadcast to its shape.

    ``gradients`` are those of the forget loss at the original model. ``module``: a parameter as a whole, and
    ``neuron``: an output row of it (of a vector, an element), by the L2 norm of their gradient, among all of the
    model; the ``share`` with the largest is salient, at least one. That is SURE's mask, 1 where the norm is at least a
    threshold gamma, with gamma the (1 - share) quantile: Zhang et al., ICLR 2025, https://arxiv.org/abs/2410.16454,
    section "quantization-robust unlearning"; by module in its text, by neuron in its code, which never applies it.
    ``weight``: a single weight, by the magnitude of its gradient, among those of its parameter, as in SalUn, Fan et
    al., https://arxiv.org/abs/2310.12508, whose threshold is one for the whole model.
    """
    if level == "weight":
        masks = {}
        for name, gradient in gradients.items():
            magnitude = gradient.abs()
            masks[name] = (magnitude >= _smallest_of_top(magnitude.flatten(), share)) & (magnitude > 0)
        return masks
    norms = {}
    for name, gradient in gradients.items():
        rows = gradient.float().reshape(1 if level == "module" or not gradient.dim() else len(gradient), -1)
        norms[name] = rows.norm(dim=1)
    threshold = _smallest_of_top(torch.cat([norm.cpu() for norm in norms.values()]), share)
    masks = {}
    for name, norm in norms.items():
        salient = (norm >= threshold.to(norm.device)) & (norm > 0)
        masks[name] = salient[0] if level == "module" else salient.view(-1, *[1] * (gradients[name].dim() - 1))
    return masks


def _smallest_of_top(values: Tensor, share: float) -> Tensor:
    top = min(max(round(share * values.numel()), 1), values.numel())
    return values.kthvalue(values.numel() - top + 1).values


class SaliencyMask(TrainerCallback):
    """Only salient weights are updated: theta = m * (theta_o + delta) + (1 - m) * theta_o, after every step.

    ``masks`` are as ``saliency_masks`` returns them; a trainable parameter that has none is not salient. What is not
    salient stays as it is to the bit, weight decay included. A parameter without a salient weight needs no gradient
    until training ends; of one with some, a copy is kept.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self._frozen, self._masked = [], []
        for name, p in model.named_parameters():
            mask = masks.get(name)
            if not p.requires_grad or (mask is not None and bool(mask.all())):
                continue
            if mask is None or not bool(mask.any()):
                p.requires_grad_(False)
                p.grad = None
                self._frozen.append(p)
            else:
                self._masked.append((p, mask.to(p.device), p.detach().clone()))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for p, mask, _ in self._masked:
            if p.grad is not None:
                p.grad.mul_(mask.to(p.grad.device))

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for p, mask, original in self._masked:
            p.copy_(torch.where(mask.to(p.device), p, original.to(p.device)))

    def on_train_end(self, args, state, control, **kwargs):
        for p in self._frozen:
            p.requires_grad_(True)


@torch.no_grad()
def push_over_edge(
    after: Tensor,
    before: Tensor,
    direction: Tensor,
    format: str,
    share: float = 0.01,
    past: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A floor for updates: chosen weights are moved over the nearest edge of their bucket, and no other one is.

    An update below half a step leaves a weight that starts on the grid in its bucket, and a deployment in 4 bits is
    then what it was. Here a few weights take whole steps in its place. Buckets are those of ``before`` under
    ``format``, on its scales, in bf16, as a deployment rounds it. A weight whose bucket ``after`` already lies beyond
    that of ``before`` in its direction stays where it is; another one is set to edge + ``past`` * (v - edge), rounded
    to bf16, with v what the neighbouring bucket dequantizes to: past the edge, and by enough to stay there under a
    scale that is a little different.

    Chosen are the ``share`` of the tensor's weights with the largest |direction|; with ``generator``, each
    weight with the probability |after - before| / s instead, s its bucket's width: then the step that is taken is, on
    average, the update (the flip law of ``quail_kernels.bucket_compare``, for weights that start on the grid). Never
    chosen are a weight without a direction; the smallest and the largest of a group, on which its scale rests; one
    that has no bucket in that direction, or none that ends before those two.

    Args:
        after, before: the trained and the original weights, of one shape and dtype.
        direction: of their shape; its sign is where a weight is to go.
        past: above 0, at most 1.

    Returns:
        The new weights, like ``after``, and which of them were chosen, bool. Each of these lies in another bucket
        than ``before`` does; all others are what they are in ``after``.

    Raises:
        ValueError: where the shapes differ, the format cannot take them, or a number is out of its range.
    """
    if not after.shape == before.shape == direction.shape:
        got = f"{tuple(after.shape)}, {tuple(before.shape)} and {tuple(direction.shape)}"
        raise ValueError(f"after, before, direction: expected one shape; got {got}")
    if not (0 < past <= 1 and 0 <= share <= 1):
        raise ValueError(f"share, past: expected numbers of at most 1, past above 0; got {share!r} and {past!r}")
    recipe = get_format(format)
    check_weight("before", before, recipe)
    x0 = before.detach().to(torch.bfloat16).contiguous()
    of_tensor = recipe.fit_tensor(x0)
    grids = []  # of each chunk's candidates: index, rank of before, target rank, parameters, group's ends; short
    flat, odds = direction.flatten().float(), (after.float() - before.float()).abs().flatten()
    for span, _, x, short in group_chunks(x0, recipe):
        params = recipe.params(x, short, of_tensor)
        rank = recipe.rank(x, params, short)
        target = _next_rank(recipe, rank, params, flat[span].view(x.shape))
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        if recipe.group_size is None:
            low, high = x0.amin().expand_as(low), x0.amax().expand_as(high)
        allowed = (target >= 0) & (x != low) & (x != high) & (flat[span].view(x.shape) != 0)
        if generator is not None:
            draw = torch.rand(x.shape, generator=generator, device=x.device)
            allowed &= draw * recipe.step(rank, params) < odds[span].view(x.shape)
        row, column = allowed.nonzero(as_tuple=True)
        if len(row):
            index = span.start + row * x.shape[1] + column
            grids.append((index, rank[row, column], target[row, column], params[row], low[row, 0], high[row, 0], short))
    new, chosen = after.detach().clone().contiguous(), torch.zeros(after.shape, dtype=torch.bool, device=after.device)
    if generator is None and grids:
        candidates = torch.cat([grid[0] for grid in grids])
        top = min(round(share * after.numel()), len(candidates))
        taken = torch.zeros(after.numel(), dtype=torch.bool, device=after.device)
        taken[candidates[flat[candidates].abs().topk(top).indices]] = True
    for index, *grid, short in grids:
        if generator is None:
            kept = taken[index]
            index, grid = index[kept], [of_weight[kept] for of_weight in grid]
        if len(index):
            trained = after.reshape(-1)[index].float()
            moved, arrived = _over_edge(recipe, x0.view(-1)[index].float(), trained, *grid, short, past)
            new.view(-1)[index] = torch.where(arrived, moved, trained).to(new.dtype)
            chosen.view(-1)[index] = arrived
    return new, chosen


def _next_rank(recipe: Format, rank: Tensor, params: Tensor, direction: Tensor) -> Tensor:
    """The rank of the neighbouring bucket in that direction, -1 where there is none."""
    first, last = torch.zeros_like(rank[:, :1]), torch.full_like(rank[:, :1], 15)
    # Values ascend with ranks, but for a negative scale.
    ascends = (recipe.value(last, params) >= recipe.value(first, params)).int() * 2 - 1
    way = direction.sign().int() * ascends
    target = rank + way
    # A codebook may have two ranks for zero, which are one bucket.
    same = recipe.bucket(target.clamp(0, 15), params) == recipe.bucket(rank, params)
    target = torch.where(same, target + way, target)
    return target.masked_fill((target < 0) | (target > 15) | (way == 0), -1)


def _over_edge(
    recipe: Format,
    start: Tensor,
    trained: Tensor,
    rank: Tensor,
    target: Tensor,
    params: Tensor,
    low: Tensor,
    high: Tensor,
    short: bool,
    past: float,
) -> tuple[Tensor, Tensor]:
    """Of weights that each are a group of their own: (where they go, whether they are in another bucket there)."""
    way, own_bucket = (target - rank).sign(), recipe.bucket(rank[:, None], params)

    def is_beyond(w: Tensor) -> Tensor:
        there = recipe.rank(w[:, None], params, short)
        other = recipe.bucket(there, params) != own_bucket
        return other[:, 0] & ((there[:, 0] - rank).sign() == way)

    value = recipe.value(target[:, None], params)[:, 0].float()
    # Bisection needs to know no more of a recipe than that ranks are monotone.
    inside, edge = start, value
    for _ in range(_BISECTIONS):
        middle = (inside + edge) / 2
        beyond = is_beyond(middle)
        inside, edge = torch.where(beyond, inside, middle), torch.where(beyond, middle, edge)
    moved, centre = _in_bf16(edge + past * (value - edge)), _in_bf16(value)
    moved = torch.where(is_beyond(moved), moved, centre)
    arrived = is_beyond(moved) & (moved > low.float()) & (moved < high.float())
    crossed = is_beyond(_in_bf16(trained))
    return torch.where(crossed, trained, moved), crossed | arrived


def _in_bf16(w: Tensor) -> Tensor:
    return w.to(torch.bfloat16).float()


class WeightFloor(TrainerCallback):
    """``push_over_edge`` of every linear layer that a deployment quantizes, when training ends.

    Args:
        model: as it is before training: a copy of those weights is kept, and ``gradient`` keeps as much again.
        format: whose buckets are meant; made for weights that lie on its grid.
        share: of each layer's weights, for the first two ways to choose them.
        score: ``update``: the largest |after - before|, in that direction. ``gradient``: the largest sum of the
            gradients that the optimizer was given, against it. ``flip_law``: at random, with probability
            |after - before| / step.
        seed: of the random choice.

    Attributes:
        chosen: once training has ended, how many weights of each layer were chosen, by name.

    A training run that is resumed sums the gradients from there on.
    """

    def __init__(self, model: nn.Module, format: str, share: float = 0.01, score: SCORES = "update", seed: int = 0):
        recipe = get_format(format)
        self.format, self.share, self.score, self.seed = format, share, score, seed
        self.chosen: dict[str, int] = {}
        self._layers = deployed_linears(model)
        for name, layer in self._layers.items():
            check_weight(name, layer.weight, recipe)
        self._before = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        self._descent = {}
        if score == "gradient":
            self._descent = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in self._before.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, total in self._descent.items():
            gradient = self._layers[name].weight.grad
            if gradient is not None:
                self._descent[name] = total.to(gradient.device).sub_(gradient)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        for number, (name, layer) in enumerate(self._layers.items()):
            after, generator = layer.weight, None
            before = self._before[name].to(after.device)
            if self.score == "flip_law":
                generator = torch.Generator(after.device).manual_seed(self.seed + number)
            direction = self._descent.get(name, after - before)
            new, chosen = push_over_edge(after, before, direction, self.format, self.share, generator=generator)
            after.copy_(new)
            self.chosen[name] = int(chosen.sum())
