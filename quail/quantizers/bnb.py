"""NF4, FP4 and LLM.int8 by bitsandbytes, through transformers.

4 bits: blocks of 64 over the flattened weight, absmax in fp32, with ``-dq`` quantized to 8 bits itself. int8: a scale
a row, activations quantized a token at a time but for columns with a value above 6, which stay in 16 bits.
"""

import os

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from .loading import load, quantized_layers, require_multiples, skeleton, skip_list

NAMES = ("bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq", "bnb-int8")


def deploy(checkpoint: str | os.PathLike, quantizer: str, dtype: torch.dtype, auto, config: PretrainedConfig):
    """The checkpoint with its linear layers quantized as it is loaded. Raises ValueError."""
    plain = skeleton(config, auto)
    layers = quantized_layers(plain)
    if quantizer == "bnb-int8":
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_list(plain))
    else:
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantizer.split("-")[1],
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=quantizer.endswith("-dq"),
            llm_int8_skip_modules=skip_list(plain),
        )
    model: PreTrainedModel = load(checkpoint, dtype, auto, quantization_config=options)
    packed = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    if packed and packed[0].weight.device.type == "cpu":
        reason = "as bitsandbytes' kernel for CPUs with AVX512-BF16 has it"
        require_multiples(quantizer, layers, 32, "out_features", reason)
        require_multiples(quantizer, layers, 64, "in_features", reason)
    return model
