"""What ``train.py`` tells instead of training: the task's named runs, and the command line and recipe that a command stands for."""

import json
import shlex
from typing import Any

from cad_models.config import paths, replace_all, to_dict
from cad_models.task import Task
from cad_models.tasks import TASKS

_ONLY_TOLD = ("task", "run", "smoke", "list_runs", "dry_run")


def runs_text(task: Task) -> str:
    """The named runs of a task, each with its seeds and what it changes in the task's recipe."""
    if not task.runs:
        return f"--task {task.name} has no named runs"
    lines = [f"named runs of --task {task.name} (python rayjobs/train.py --task {task.name} --run NAME --dataset ...):"]
    for name, run in task.runs.items():
        lines += ["", f"{name}: {run.note}" if run.note else name]
        if run.seeds:
            lines.append(f"  --seeds {' '.join(map(str, run.seeds))}")
        before = paths(task.recipe)
        after = paths(replace_all(task.recipe, run.changes))
        lines += [f"  {shlex.join(_flag(path, after[path], may_be_unset=before[path] is None))}" for path in after if after[path] != before[path]]
    return "\n".join(lines)


def dry_run_text(job: Any) -> str:
    """The command line without named run or ``--smoke``, and the whole recipe as JSON."""
    return f"{shlex.join(command_line(job))}\n{json.dumps(to_dict(job.recipe), indent=1, sort_keys=True)}"


def command_line(job: Any) -> list[str]:
    """The words of a command that asks for the same without ``--run`` and ``--smoke``: every flag that differs from the task's defaults."""
    plain = paths(type(job)(task=job.task, recipe=TASKS[job.task].recipe, dataset=""))
    words = ["python", "rayjobs/train.py", "--task", job.task, "--dataset", job.dataset or "DATASET"]
    for path, value in paths(job).items():
        if path not in (*_ONLY_TOLD, "dataset") and value != plain[path]:
            words += _flag(path.removeprefix("recipe."), value, may_be_unset=plain[path] is None)
    return words


def _flag(path: str, value: Any, *, may_be_unset: bool) -> list[str]:
    *parents, name = path.replace("_", "-").split(".")
    flag = "--" + ".".join([*parents, name])
    if isinstance(value, bool) and not may_be_unset:
        return [flag] if value else ["--" + ".".join([*parents, f"no-{name}"])]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
