"""The most memory that a stretch of work takes."""

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin_peak() -> bool:
    """Give back what is free and count from here; False: the system only knows the whole process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # resets the high-water mark of resident memory, proc(5)
    except OSError:
        return False
    return True


def peak() -> dict[str, int]:
    """MB (10^6 bytes) of resident memory, and of GPU memory where there is one."""
    peaks = {"memory_mb": round(_resident() / 1e6)}
    if torch.cuda.is_available():
        peaks["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return peaks


def _resident() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
