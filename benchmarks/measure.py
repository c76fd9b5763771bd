"""What every row of the table is measured with: rivals in turn, medians and quartiles of their ratio, the machine's own limits.

A row is a module with ``run(settings) -> list[Comparison]``. Rivals run one after the other within every round, the order turned around from round
to round, so that a slow minute of a shared machine hits all of them; the ratio is taken within a round, and its median is what a verdict rests on.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Clock = Literal["cpu", "wall"]
_CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How thoroughly to measure."""

    quick: bool = False
    """Small sizes, few rounds: does it run, roughly how does it compare? Its verdicts mean nothing."""

    def pick(self, full: Any, quick: Any) -> Any:
        """``quick`` in a quick run, else ``full``."""
        return quick if self.quick else full


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured line of the table."""

    row: int
    """Number of the row, as in README.md."""
    what: str
    """What was measured, with its sizes."""
    against: str
    """The rival; empty where there is only a bound."""
    unit: str
    """Of ``ours`` and ``theirs``, as ``ms`` or ``objects/s``."""
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    """How many times better ours is; larger is better whatever the unit."""
    low: float | None = None
    """Lower quartile of the ratio over the rounds."""
    high: float | None = None
    """Upper quartile."""
    num_rounds: int = 1
    at_least: float | None = None
    """The ratio that was aimed at."""
    at_most: float | None = None
    """Where ``ours`` itself is bounded: the most that it may be."""
    limit_share: float | None = None
    """Measured limit of the machine over ours: 1 = as fast as the hardware allows."""
    limit: str = ""
    """Which limit."""
    note: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``misses``, or empty without an aim."""
        if self.at_least is not None and self.ratio is not None:
            return "holds" if self.ratio >= self.at_least else "misses"
        if self.at_most is not None:
            return "holds" if self.ours <= self.at_most else "misses"
        return ""


# --- time -------------------------------------------------------------------------------------------------------------------------------------
def seconds_in_turn(rivals: Mapping[str, Callable[[], object]], *, rounds: int, clock: Clock = "cpu", warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every call: name -> one value a round.

    Args:
        clock: ``cpu``: seconds of this process (all its threads), to which neighbours on a shared machine add little; for rivals of one thread.
            ``wall``: for rivals that wait or have other processes.
        warm: call each once before the first round.
    """
    now = _CLOCKS[clock]
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    if warm:
        for call in rivals.values():
            call()
    for number in range(rounds):
        names = list(rivals) if number % 2 == 0 else list(rivals)[::-1]
        for name in names:
            gc.collect()
            started = now()
            rivals[name]()
            taken[name].append(now() - started)
    return taken


def times_better(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of ``theirs / ours`` round by round (seconds: how many times faster ours is)."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def compared(
    row: int, what: str, against: str, ours: Sequence[float], theirs: Sequence[float], *, per_call: float | None = None, unit: str = "ms", **further: Any
) -> Comparison:
    """A comparison of seconds, told in ms or, with ``per_call`` things done in a call, in things a second."""
    ratio, low, high = times_better(ours, theirs)
    a, b = statistics.median(ours), statistics.median(theirs)
    shown = (lambda s: per_call / s) if per_call is not None else (lambda s: 1e3 * s)
    return Comparison(
        row=row, what=what, against=against, unit=unit, ours=shown(a), theirs=shown(b), ratio=ratio, low=low, high=high, num_rounds=len(ours), **further
    )


def peak_memory_mb() -> float:
    """Largest resident size that this process has had, in MB."""
    try:
        # What getrusage tells includes the parent's size at the moment of the fork.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- limits -----------------------------------------------------------------------------------------------------------------------------------
def product_flops(dtype: str = "float32") -> float:
    """Floating-point operations a second of one thread in a large matrix product of torch; ``dtype`` as ``bfloat16``."""
    import torch

    kind = getattr(torch, dtype)
    a, b = torch.randn(1024, 1024).to(kind), torch.randn(1024, 4096).to(kind)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / _best_cpu_seconds(lambda: a @ b)


def copy_bandwidth() -> float:
    """Bytes a second of one thread that copies 256 MB within memory, read and written counted once each."""
    import torch

    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_cpu_seconds(lambda: target.copy_(source))


def _best_cpu_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    best = math.inf
    for _ in range(repeats):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


def machine() -> dict[str, Any]:
    """What the figures depend on, without a host's name: processor, cores, memory, versions, and how busy it is."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # no Linux: the platform's own word is what there is
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instructions": [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "gflops_float32": round(product_flops() / 1e9, 1),
        "gflops_bfloat16": round(product_flops("bfloat16") / 1e9, 1),
        "copy_gb_per_s": round(copy_bandwidth() / 1e9, 1),
    }


# --- telling ----------------------------------------------------------------------------------------------------------------------------------
def table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table."""
    lines = [
        "| # | what | against | ours | theirs | times better (quartiles) | at least | verdict | of the limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in comparisons:
        theirs = "" if c.theirs is None else _number(c.theirs)
        spread = "" if c.ratio is None else f"{c.ratio:.2f} ({c.low:.2f}–{c.high:.2f})" if c.num_rounds > 1 else f"{c.ratio:.2f}"
        aim = f"{c.at_least:g}" if c.at_least is not None else f"≤ {c.at_most:g} {c.unit}" if c.at_most is not None else ""
        limit = f"{100 * c.limit_share:.0f} % {c.limit}" if c.limit_share is not None else ""
        note = f" ({c.note})" if c.note else ""
        lines.append(f"| {c.row} | {c.what}{note} | {c.against} | {_number(c.ours)} {c.unit} | {theirs} | {spread} | {aim} | {c.verdict} | {limit} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row_main(run: Callable[[Settings], list[Comparison]]) -> None:
    """Command line of a row's module: ``python -m benchmarks.<module> [--quick] [--json FILE]``."""
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--json", type=Path, help="also write the comparisons to this file")
    flags = parser.parse_args()
    comparisons = run(Settings(quick=flags.quick))
    print(table(comparisons), flush=True)
    if flags.json is not None:
        flags.json.write_text(json.dumps([dataclasses.asdict(c) for c in comparisons]))
