"""The ops on DTensors: which shardings leave every group or row whole, and which reduction an output needs.

A shard is quantized as a weight of its own, so it may be cut between groups only. Where the groups of a recipe
straddle shards, or a recipe looks at the whole tensor, the weight is gathered first.

The hinges may be cut between tokens: each rank has the rows of its own, and its share of the gradient of an output
head. What is sharded over the vocabulary is gathered first.
"""

import functools
import math

import torch

from .formats import Format, get_format


def admit_dtensors(*tensors: torch.Tensor) -> bool:
    """Gives the ops their sharding rules where one of these is a DTensor, and says whether one is.

    To import DTensor takes longer than to import this package, so it is left to who has one. torch.compile cannot
    trace the registration: a compiled function finds it done if DTensor was imported before this package, or if
    an op has run on a DTensor.
    """
    if not any(hasattr(tensor, "device_mesh") for tensor in tensors):
        return False
    if not torch.compiler.is_compiling():
        register_rules()
    return True


def flat_rows(x: torch.Tensor, *row_shape: int) -> torch.Tensor:
    """[..., *row_shape] as [rows, *row_shape]; DTensor cannot flatten dimensions that ranks hold parts of unevenly."""
    if x.ndim > 1 + len(row_shape) and hasattr(x, "device_mesh"):
        from torch.distributed.tensor import Replicate

        dims = {place.dim for place in x.placements if place.is_shard()}
        if dims and (dims != {0} or x.shape[0] % x.device_mesh.size()):
            x = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)
    return x.reshape(-1, *row_shape)


def _keeps_groups(w, recipe: Format, dim: int, evenly: bool) -> bool:
    """Whether no group of ``w`` (a DTensorSpec) straddles ranks when ``dim`` is sharded over any of its mesh.

    ``evenly``: all ranks must hold as much as each other.
    """
    if recipe.group_size is None or recipe.needs_tensor:
        return False
    row = math.prod(w.shape[dim + 1 :])
    if row % recipe.group_size == 0 and not evenly:
        return True
    ranks = w.mesh.size()
    return w.shape[dim] % ranks == 0 and w.shape[dim] // ranks * row % recipe.group_size == 0


@functools.cache
def register_rules() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.quail

    @register_sharding(ops.fake_quant.default)
    def _(w, group_size, format):
        recipe = get_format(format, group_size)
        dims = [dim for dim in range(len(w.shape)) if _keeps_groups(w, recipe, dim, evenly=False)]
        rules = [([place], [place, None, None]) for place in (Replicate(), *map(Shard, dims))]
        return rules

    @register_sharding(ops.quantize.default)
    def _(w, group_size, format):
        rules = [([Replicate()] * 2, [Replicate(), None, None])]
        # Codes and scales are one-dimensional: a DTensor takes the same number of them from each rank.
        if len(w.shape) and _keeps_groups(w, get_format(format, group_size), 0, evenly=True):
            rules.append(([Shard(0)] * 2, [Shard(0), None, None]))
        return rules

    @register_sharding(ops.dequantize.default)
    def _(codes, scales, group_size, format, shape, dtype):
        # The shape that the op is given is that of the whole weight.
        return [([Replicate()], [Replicate()] * 2 + [None] * 4)]

    @register_sharding(ops.bucket_compare.default)
    def _(before, after, group_size, format, shared_scales, per_group):
        recipe = get_format(format, group_size)
        rules = [([Replicate()] * 4, [Replicate()] * 2 + [None] * 4)]
        for dim in range(min(len(before.shape), 1) if per_group else len(before.shape)):
            if _keeps_groups(before, recipe, dim, evenly=per_group):
                sums = [Partial("sum"), Partial("sum"), Partial("max")]
                rules.append(([*sums, Shard(0) if per_group else Replicate()], [Shard(dim)] * 2 + [None] * 4))
        return rules

    def of_rows(logits):
        # The outputs are one-dimensional, and DTensor cuts those evenly: so must whole batches be.
        even = len(logits.shape) == 2 or len(logits.shape) > 2 and logits.shape[0] % logits.mesh.size() == 0
        return (Replicate(), Shard(0)) if even else (Replicate(),)

    def placed(arguments, place, heads=()):
        """``place`` for every tensor, but the output heads whole on each rank."""
        return [
            (Replicate() if i in heads else place) if hasattr(argument, "placements") else None
            for i, argument in enumerate(arguments)
        ]

    @register_sharding(ops.logit_margin_hinge.default)
    def _(*arguments):
        return [([place] * 3, placed(arguments, place)) for place in of_rows(arguments[0])]

    @register_sharding(ops.logit_margin_hinge_backward.default)
    def _(*arguments):
        return [([place], placed(arguments, place)) for place in of_rows(arguments[1])]

    @register_sharding(ops.linear_logit_margin_hinge.default)
    def _(*arguments):
        return [([place] * 6, placed(arguments, place, heads=(1, 2, 4, 5))) for place in (Replicate(), Shard(0))]

    @register_sharding(ops.linear_logit_margin_hinge_backward.default)
    def _(*arguments):
        inputs = [placed(arguments, place, heads=(4, 5, 7, 8)) for place in (Replicate(), Shard(0))]
        return [([Replicate()] * 3, inputs[0]), ([Shard(0), Partial("sum"), Partial("sum")], inputs[1])]
