"""The rooms, one line each. Importing this module imports no torch."""

import time
from typing import Any

import numpy as np

from cad_models.alignment.task import AlignmentTask
from cad_models.histograms.task import HistogramTask
from cad_models.images.task import ImagesTask
from cad_models.task import SECONDS, Columns, Input, Reject, Task

TASKS: dict[str, Task] = {task.name: task for task in (AlignmentTask(), HistogramTask(), ImagesTask())}


def read_input(task: str, item: Input, settings: Any) -> Columns | Reject:
    """`Task.read_input` of a task by name, as a function that another process can import. What the task names no stage of its own is ``read files``."""
    started = time.perf_counter()
    columns = TASKS[task].read_input(item, settings)
    if not isinstance(columns, Reject):
        named = sum(float(seconds) for name, seconds in columns.items() if name.startswith(SECONDS))
        columns[f"{SECONDS}read files"] = np.array(time.perf_counter() - started - named)
    return columns
