"""One case file an op; ``all_cases`` gives them, the headlines of every op first."""

from ..case import Case
from . import bucket_compare, fake_quant, linear_margin_hinge, margin_hinge, quantize

_OPS = (fake_quant, bucket_compare, margin_hinge, linear_margin_hinge, quantize)


def all_cases(small: bool) -> list[Case]:
    """Every case, on shapes of real models, or on a few rows of them where ``small``."""
    return sorted((case for op in _OPS for case in op.cases(small)), key=lambda case: not case.headline)
