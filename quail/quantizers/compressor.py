"""GPTQ and AWQ by llm-compressor, which runs in an environment of its own: ``calibrated.py`` there, the result here."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import calibrated
from .loading import load

ENVIRONMENT = "QUAIL_LLMCOMPRESSOR_PYTHON"


def parse(quantizer: str) -> tuple[str, str]:
    """(method, format) of ``gptq:ct-int4-sym@64``. Raises ValueError."""
    method, _, format = quantizer.partition(":")
    recipe, at, group = format.partition("@")
    if recipe not in calibrated.FORMATS or (at and not (group.isdecimal() and int(group))):
        formats = " or ".join(f"{method}:{name}" for name in calibrated.FORMATS)
        raise ValueError(f"quantizer: expected {formats}, optionally with @group_size; got {quantizer!r}")
    return method, format


def deploy(
    checkpoint: str | os.PathLike, quantizer: str, dtype: torch.dtype, auto, calibration: Sequence[str] | None
) -> PreTrainedModel:
    """The checkpoint quantized on the calibration texts, its weights dequantized to ``dtype``. Raises ValueError."""
    method, format = parse(quantizer)
    if auto is not AutoModelForCausalLM:
        raise ValueError(f"{quantizer}: expected a causal language model; got {auto.__name__}")
    if not calibration or isinstance(calibration, str):
        got = "none" if not calibration else "one string"
        raise ValueError(f"calibration: expected a sequence of texts for {quantizer}; got {got}")
    python = _python(quantizer)
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "calibration.txt", Path(folder) / "checkpoint"
        text.write_text("\n\n".join(calibration), encoding="utf-8")
        # It runs in the scratch folder, for what llm-compressor leaves behind: relative paths would lead elsewhere.
        python, checkpoint = (os.path.abspath(path) if os.path.exists(path) else path for path in (python, checkpoint))
        # Isolated: neither this folder nor PYTHONPATH, which may lead to this environment's packages.
        command = [python, "-I", calibrated.__file__, checkpoint, out, "--method", method, "--format", format]
        command += ["--calibration", text, "--dtype", str(dtype).removeprefix("torch.")]
        try:
            done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"{ENVIRONMENT}: expected a Python; got {python}: {error.strerror}") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1].removeprefix("quail: ")
            raise ValueError(said if done.returncode == 2 else f"{quantizer}: llm-compressor failed; got {said:.300}")
        return load_stored(out, dtype, auto)


def load_stored(checkpoint: str | os.PathLike, dtype: torch.dtype, auto) -> PreTrainedModel:
    """A compressed-tensors checkpoint with its weights dequantized as they are loaded."""
    from transformers import CompressedTensorsConfig

    try:
        options = CompressedTensorsConfig(dequantize=True)
    except ImportError:
        expected = "the library compressed-tensors (pip install compressed-tensors)"
        raise ValueError(f"{checkpoint}: expected {expected}; got none") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return load(checkpoint, dtype, auto, quantization_config=options)


def _python(quantizer: str) -> str:
    if named := os.environ.get(ENVIRONMENT):
        return named
    if importlib.util.find_spec("llmcompressor") is not None:
        return sys.executable
    expected = f"llm-compressor (python -m venv E; E/bin/pip install llmcompressor; {ENVIRONMENT}=E/bin/python)"
    raise ValueError(f"{quantizer}: expected {expected}; got none")
