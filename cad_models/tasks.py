"""The rooms, one line each. Importing this module imports no torch."""

from cad_models.alignment.task import AlignmentTask
from cad_models.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (AlignmentTask(),)}
