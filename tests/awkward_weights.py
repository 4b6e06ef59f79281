"""Weights for tests of recipes: Gaussian ones, and rows that are hard in one way each."""

import torch

COLUMNS = 1152  # groups of 128, 96, 64 and 32 divide it


def gaussian(rows, dtype=torch.float32, seed=0):
    return (torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def awkward(dtype):
    """Rows of zeros, constants, ties, one sign, subnormal and huge numbers, and ranges that overflow."""
    finfo = torch.finfo(dtype)
    magnitudes = [10.0**e for e in (-45, -43, -40, -38, -36, -30, -8, -7, -6, -5, -4, -3, 3, 4, 5, 30, 37, 38)]
    magnitudes += [finfo.smallest_normal, finfo.smallest_normal * finfo.eps * 4, finfo.max / 8, finfo.max / 2]
    steps = torch.arange(COLUMNS).double()
    shapes = [
        gaussian(1)[0].double().clamp(-0.08, 0.08) / 0.08,
        steps.remainder(31) / 15 - 1,  # every half step where the scale is absmax / 7.5 or the range / 15
        steps.remainder(29) / 14 - 1,  # the same for absmax / 7
        steps.remainder(33) / 16 - 1,  # and for absmax / 8
        steps.remainder(31) / 15,
        1 + gaussian(1, seed=1)[0].double(),
        torch.full((COLUMNS,), 0.375).double(),
    ]
    rows = [sign * shape * magnitude for shape in shapes for magnitude in [1.0, *magnitudes] for sign in (1, -1)]
    rows += [torch.zeros(COLUMNS).double(), -torch.zeros(COLUMNS).double()]
    # Halves of powers of two, so that ties are ties in every arithmetic.
    rows += [(steps.remainder(2 * n + 1) - n) * 2.0**-8 for n in (14, 15, 16)]
    rows += [(steps.remainder(31) - offset) * 2.0**-8 for offset in range(31)]
    # Minima near half a step, where adding an integer in bf16 or fp16 rounds to a tie.
    for k in range(4):
        for off in (-(2.0**-8), -(2.0**-10), 2.0**-10, 2.0**-8):
            row = steps.remainder(8) / 7 * (14.5 - k)
            rows.append(torch.where(steps.remainder(8) == 0, -(k + 0.5 + off), row) * 2.0**-6)
    w = torch.stack(rows).clamp(finfo.min, finfo.max)
    return w.to(dtype)
