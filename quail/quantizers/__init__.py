"""Models as they are deployed: the name of a quantizer and a checkpoint give a model that any metric can run.

    none                            as it is stored
    bnb-nf4, bnb-nf4-dq, ...        bnb.py: bitsandbytes through transformers
    torchao-int4@64, torchao-int8   ao.py: torchao through transformers
    gguf-q4_0, gguf-mxfp4           gguf_files.py: written by gguf, read back
    rtn:FORMAT@64                   rounding.py: any recipe of quail_kernels, to the nearest
    gptq:FORMAT@64, awq:FORMAT@64   compressor.py, calibrated.py: llm-compressor, on calibration texts

Linear layers are quantized. Embeddings, norms, biases and the output head are left alone by all of them: for a causal
language model that is transformers' own choice; of a sequence classifier the head is left alone, too.
"""

import os
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import ao, bnb, calibrated, compressor, gguf_files, rounding
from .loading import load, load_config, quantized_layers

__all__ = ["QUANTIZERS", "check", "deploy", "quantized_layers"]

QUANTIZERS = ("none", *bnb.NAMES, *ao.NAMES, *gguf_files.NAMES)
_LIBRARIES = {name: library for library in (bnb, ao, gguf_files) for name in library.NAMES}


def check(quantizer: str) -> None:
    """Raises ValueError, with the legal names, where ``quantizer`` is none of them; nothing is loaded for that."""
    quantizer = quantizer if isinstance(quantizer, str) else repr(quantizer)  # a recipe's YAML may hold anything
    name = quantizer.partition("@")[0]
    if quantizer.startswith(rounding.PREFIX):
        rounding.parse(quantizer)
    elif quantizer.partition(":")[0] in calibrated.METHODS:
        compressor.parse(quantizer)
    elif name in ao.NAMES:
        ao.parse(quantizer)
    elif quantizer not in QUANTIZERS:
        expected = f"{', '.join(QUANTIZERS)}, rtn:FORMAT, gptq:FORMAT or awq:FORMAT"
        raise ValueError(f"quantizer: expected one of {expected}; got {quantizer!r}")


def deploy(
    checkpoint: str | os.PathLike,
    quantizer: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    auto=AutoModelForCausalLM,
    calibration: Sequence[str] | None = None,
) -> PreTrainedModel:
    """The checkpoint as a deployment loads it, in evaluation mode, on the GPU where there is one.

    Args:
        checkpoint: a folder or hub name.
        quantizer: one of ``QUANTIZERS``; ``torchao-int4@32``, ``@64`` or ``@128``; ``rtn:`` and a format of
            ``quail_kernels``; ``gptq:`` or ``awq:`` and ``ct-int4-sym`` or ``ct-int4-asym``, with ``@group_size``.
        dtype: of what is not quantized, of the arithmetic, and of the weights before they are quantized.
        auto: the transformers class that knows the model's head.
        calibration: texts, for GPTQ and AWQ only.

    Raises:
        ValueError: where the name is unknown, there is no such checkpoint, it lacks a weight or is quantized already
            (``none`` takes it as it is), its shapes do not suit the quantizer, or the library is not installed.
    """
    check(quantizer)
    config = load_config(checkpoint)
    stored = getattr(config, "quantization_config", None)
    if quantizer == "none":
        if stored and _method(stored) == "compressed-tensors":
            return compressor.load_stored(checkpoint, dtype, auto)
        return load(checkpoint, dtype, auto)
    if stored:
        raise ValueError(
            f"{checkpoint}: expected weights in 16 or 32 bits for {quantizer}; got {_method(stored)} already"
        )
    if quantizer.startswith(rounding.PREFIX):
        return rounding.deploy(checkpoint, quantizer, dtype, auto, config)
    if quantizer.partition(":")[0] in calibrated.METHODS:
        return compressor.deploy(checkpoint, quantizer, dtype, auto, calibration)
    return _LIBRARIES[quantizer.partition("@")[0]].deploy(checkpoint, quantizer, dtype, auto, config)


def _method(stored) -> str:
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method))
