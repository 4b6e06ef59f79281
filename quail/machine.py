"""What a cell was made by and on, whether bf16 is fast there, and what helps where it is not."""

import contextlib
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch.nn import functional as F

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
    return _cpu_has_bf16()


@contextlib.contextmanager
def linear_in_fp32(device: torch.device) -> Iterator[None]:
    """On a CPU without bf16 instructions ``F.linear`` of bf16 tensors is done in fp32 and its result rounded to bf16.

    So does PyTorch's own, but for the order of its fp32 sums, and there takes several times as long. It is the function
    that is replaced, for all threads: bitsandbytes calls it on weights that it has just dequantized, where neither a
    module's forward nor a mode of PyTorch's is seen.
    """
    if device.type != "cpu" or _cpu_has_bf16():
        yield
        return
    plain = F.linear

    def linear(input, weight, bias=None):
        if not input.dtype == weight.dtype == torch.bfloat16 or type(weight) not in (torch.Tensor, torch.nn.Parameter):
            return plain(input, weight, bias)
        return plain(input.float(), weight.float(), None if bias is None else bias.float()).bfloat16()

    F.linear = linear
    try:
        yield
    finally:
        F.linear = plain


def _cpu_has_bf16() -> bool:
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
