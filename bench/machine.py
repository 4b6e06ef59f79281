"""Which machine and which versions a run had: read once, nothing of it needed for the run."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = ("triton", "numpy", "numba", "pytest", "bitsandbytes", "torchao", "liger-kernel")
_SMI = (
    *("driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "clocks.mem"),
    *("power.limit", "temperature.gpu", "ecc.mode.current", "mig.mode.current", "persistence_mode"),
)


def describe(device: torch.device) -> dict:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: _version(name) for name in _LIBRARIES}
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "device": device.type,
        "card": None,
    }
    if device.type != "cuda":
        return machine
    properties = torch.cuda.get_device_properties(device)
    return machine | {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "card_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cards": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nvidia_smi": parse_smi(_smi(getattr(properties, "uuid", None))),
    }


def slug(card: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as a file name: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def parse_smi(line: str | None) -> dict | None:
    """The comma-separated answer of nvidia-smi by field, MHz, W and degrees Celsius; None where it gave none."""
    values = [] if line is None else [value.strip() for value in line.split(",")]
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) else None


def _smi(uuid: object) -> str | None:
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    output = _output([*query, f"--id=GPU-{uuid}"]) if uuid is not None else None
    output = output or _output(query)
    return output.splitlines()[0] if output else None


def _git(*args: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *args])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
