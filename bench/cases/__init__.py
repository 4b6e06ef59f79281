"""One case file an op; ``all_cases`` gives them, the headlines of every op first."""

from ..case import Case
from . import bucket_compare, fake_quant, linear_margin_hinge, margin_hinge, quantize, training_step

_OPS = (fake_quant, bucket_compare, margin_hinge, linear_margin_hinge, quantize, training_step)


def all_cases(size: float) -> list[Case]:
    """Every case, on that share of the rows of real models; 0: on a few rows, to see that the code works."""
    return sorted((case for op in _OPS for case in op.cases(size)), key=lambda case: not case.headline)
