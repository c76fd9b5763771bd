"""The rooms, one line each. Importing this module imports no torch."""

from typing import Any

from cad_models.alignment.task import AlignmentTask
from cad_models.histograms.task import HistogramTask
from cad_models.images.task import ImagesTask
from cad_models.task import Columns, Input, Reject, Task

TASKS: dict[str, Task] = {task.name: task for task in (AlignmentTask(), HistogramTask(), ImagesTask())}


def read_input(task: str, item: Input, settings: Any) -> Columns | Reject:
    """`Task.read_input` of a task by name, as a function that another process can import."""
    return TASKS[task].read_input(item, settings)
