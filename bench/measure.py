"""How long a call takes on the device, how much memory it takes, and what the machine could do at best.

One meter for CUDA and for the CPU: the loop, the quantiles and the interface are the same, and what differs is
the events, the synchronisation and the allocator's books.
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
_MAX_RUNS, _MIN_RUNS = 200, 5
_QUANTILES = {"p20_ms": 0.2, "p50_ms": 0.5, "p80_ms": 0.8}


class _CpuEvent:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "_CpuEvent") -> float:
        return (end.at - self.at) * 1e3


class Meter:
    """Device-synchronised timing with a cold cache: the L2 of a GPU, the last level of a CPU.

    Between two calls, outside the events, a buffer of four times the cache is read: what is left there is clean,
    so that no write-back of it is charged to the call. Nothing synchronises between the first call and the last.
    """

    def __init__(self, device: torch.device, dry: bool = False):
        self.device = device
        # A dry run traces what is compiled but builds no kernels.
        self.compile_backend = "eager" if dry else "inductor"
        self._cuda = device.type == "cuda"
        if self._cuda:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
        else:
            cache = 2**18 if dry else _last_level_cache()
        self._sweep = torch.zeros(4 * cache // 4, dtype=torch.float32, device=device)
        self._sink = torch.zeros((), dtype=torch.float32, device=device)
        self._copied = 2**22 if dry else 2**30 if self._cuda else 2**28

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        """What the device could still give, blocks that the allocator keeps for reuse included."""
        if not self._cuda:
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()

    def _event(self):
        return torch.cuda.Event(enable_timing=True) if self._cuda else _CpuEvent()

    def _milliseconds(self, call: Callable[[], object], runs: int) -> list[float]:
        events = [(self._event(), self._event()) for _ in range(runs)]
        self.synchronize()
        for start, end in events:
            torch.sum(self._sweep, dim=0, out=self._sink)
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def time(self, call: Callable[[], object], seconds: float) -> dict:
        """``p20_ms``, ``p50_ms``, ``p80_ms`` and ``runs`` of about ``seconds`` of calls, after three to warm up.

        Fewer where emptying a large cache before each call would take more than three times as long.
        """
        began = time.perf_counter()
        estimate = min(self._milliseconds(call, 3))
        with_sweep = (time.perf_counter() - began) / 3
        wanted = min(seconds * 1e3 / max(estimate, 1e-3), 4 * seconds / with_sweep)
        runs = min(max(int(wanted), _MIN_RUNS), _MAX_RUNS)
        return quantiles(self._milliseconds(call, runs))

    def peak_extra_bytes(self, call: Callable[[], object]) -> int | None:
        """The most memory that a call holds beyond what was there before it, its result included.

        On the CPU it is resident memory, from Linux's own books, pages of 4 KiB that were touched for the first time;
        None where there are none.
        """
        if not self._cuda:
            return _peak_extra_resident(call)
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device)
        del result
        return peak - before

    def roof(self, seconds: float) -> dict:
        """What this machine's own copy of a large tensor reaches, in GB/s of bytes read and written."""
        n = self._copied
        if self._cuda:
            n = min(n, self.free_bytes() // 8)
        source = torch.ones(n, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        took = self.time(lambda: target.copy_(source), seconds)
        return {"copied_bytes": n, "copy_gb_s": 2 * n / took["p50_ms"] / 1e6} | took


def _last_level_cache() -> int:
    """Bytes; 32 MiB where Linux does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=2**25)


def forget_peak() -> None:
    """The most resident memory of this process is from now on what it is now; Linux only."""
    CLEAR_REFS.write_text("5", encoding="ascii")


def resident(field: str) -> int:
    """``VmRSS``, what is resident now, or ``VmHWM``, the most since ``forget_peak``, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_extra_resident(call: Callable[[], object]) -> int | None:
    if not CLEAR_REFS.exists():
        return None
    try:
        # What the allocator keeps of freed memory would hide what the call takes of it.
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # of a C library that has no such function
        pass
    forget_peak()
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM")
    del result
    return max(peak - before, 0)


def quantiles(milliseconds: list[float]) -> dict:
    """The nearest-rank 20th, 50th and 80th percentile."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return {name: ordered[round(share * last)] for name, share in _QUANTILES.items()} | {"runs": len(ordered)}
