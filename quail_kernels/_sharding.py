"""The ops on DTensors: which shardings leave every group whole, and which reduction an output needs.

A shard is quantized as a weight of its own, so it may be cut between groups only. Where the groups of a recipe
straddle shards, or a recipe looks at the whole tensor, the weight is gathered first.
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
