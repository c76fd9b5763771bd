"""Load of a training process and its machine."""

import functools
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def system_metrics() -> dict[str, float]:
    """Load of this process and its machine, to be merged into an evaluation's metrics.

    Returns:
        CPU in percent since the last call (process: 100 = one core), memory in GB, and of each GPU its memory in GB
        and, where NVML is installed, its load in percent. Names begin with ``system/``.
    """
    import psutil

    process = _this_process()
    memory = process.memory_info()
    values = {
        "system/process_cpu_percent": process.cpu_percent(),
        "system/cpu_percent": psutil.cpu_percent(),
        "system/process_memory_gb": memory.rss / 1e9,
        # What is its own: pages of libraries and of Ray's object store are shared with other processes.
        "system/process_private_memory_gb": (memory.rss - getattr(memory, "shared", 0)) / 1e9,
        "system/memory_used_gb": psutil.virtual_memory().used / 1e9,
    }
    return values | _gpu_metrics()


@functools.cache
def _this_process() -> "psutil.Process":
    import psutil

    # psutil measures CPU between two calls on the same object.
    return psutil.Process()


def _gpu_metrics() -> dict[str, float]:
    # torch, not NVML: the package that binds NVML is no dependency, and torch is loaded already wherever there is
    # something to measure.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    values = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        values[f"system/gpu{index}_memory_used_gb"] = (total - free) / 1e9
        try:
            values[f"system/gpu{index}_percent"] = float(torch.cuda.utilization(index))
        except (ImportError, ModuleNotFoundError, RuntimeError):
            # Its load is known only where NVML's binding is installed.
            continue
    return values
