"""Fused Triton kernels for unlearning that survives 4-bit quantization, with PyTorch references."""

import sys

from ._sharding import register_rules
from .bucket_compare import BucketComparison, bucket_compare
from .fake_quant import dequantize, fake_quant, quantize
from .formats import FORMATS, get_format
from .linear_margin_hinge import LinearMarginHinge, linear_logit_margin_hinge
from .margin_hinge import logit_margin_hinge

__all__ = [
    "FORMATS",
    "BucketComparison",
    "LinearMarginHinge",
    "bucket_compare",
    "dequantize",
    "fake_quant",
    "get_format",
    "linear_logit_margin_hinge",
    "logit_margin_hinge",
    "quantize",
]

if "torch.distributed.tensor" in sys.modules:
    register_rules()
