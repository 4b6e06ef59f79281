"""What a cell was made by and on: versions, the processor, and whether bf16 is fast there."""

import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "torchao", "gguf", "peft", "quail-unlearning")


def made_by() -> dict:
    """Versions of what computes, and the machine: a JSON object."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "versions": versions,
        "machine": {"device": device, "threads": torch.get_num_threads(), "autocast_bf16": bf16_is_fast()},
    }


def bf16_is_fast() -> bool:
    """Whether training runs under bf16 autocast: on a GPU that has it, and on a CPU with bf16 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = _cpuinfo()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _processor() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
