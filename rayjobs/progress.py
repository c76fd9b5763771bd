"""Progress with rate and remaining time: one living line on a terminal, single lines elsewhere, and always a file."""

import json
import os
import sys
import time
from pathlib import Path

from rayjobs.telemetry import show


class Progress:
    """Counts finished units of a job.

    Args:
        title: What is going on, as ``prepare``.
        total: Units in all.
        unit: Their name, as ``objects``.
        done: Units that an earlier run finished; they count as done but not for the rate.
        file: JSON-lines file to append to, or None. Each line: time (seconds since the epoch), title, done, total, rate (units/s), eta_s.
        every_s: Seconds between two lines where there is no terminal.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0, file: Path | None = None, every_s: float = 10.0) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._reused = self._done = done
        self._file, self._every_s = file, every_s
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._start = time.monotonic()
        self._last = -float("inf")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        if done:
            print(f"{title}: {done:,} of {total:,} {unit} are there already", file=sys.stderr, flush=True)

    def add(self, count: int, note: str = "") -> None:
        """Count ``count`` more; show at most a few times a second on a terminal."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= (0.2 if self._terminal else self._every_s) or self._done >= self._total:
            self._last = now
            self._show(note)

    def close(self) -> None:
        """End the living line."""
        if self._terminal:
            print(file=sys.stderr, flush=True)

    def _show(self, note: str) -> None:
        seconds = time.monotonic() - self._start
        rate = (self._done - self._reused) / seconds if seconds > 0 else 0.0
        eta_s = (self._total - self._done) / rate if rate > 0 else float("nan")
        share = 100 * self._done / self._total if self._total else 100.0
        show({"cad_job_done": self._done, "cad_job_total": self._total, "cad_job_rate": rate}, job=self._title)
        text = f"{self._title}: {self._done:,}/{self._total:,} {self._unit} ({share:.0f} %), {rate:.2f}/s, {duration(eta_s)} left"
        text += f", {note}" if note else ""
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)
        if self._file is not None:
            line = {"time": time.time(), "title": self._title, "done": self._done, "total": self._total, "rate": rate}
            line["eta_s"] = eta_s if eta_s == eta_s else None
            with self._file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``42 s``, ``3 min 20 s``, ``2 h 5 min``; ``?`` for NaN."""
    if seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
