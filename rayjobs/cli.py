"""From the command line to a job: ``--task`` picks the recipe, dotted flags change it, mistakes end with a hint and exit status 2.

A job is a frozen dataclass with the fields ``task`` and ``recipe``. Its recipe's flags carry no prefix: ``--model.num-experts 8 --optim.lr 3e-4``.
"""

import dataclasses
import difflib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

from cad_models.config import Recipe, replace_all
from cad_models.folder import without_credentials
from cad_models.task import NamedRun
from cad_models.tasks import TASKS

RecipeFlags = Annotated[Recipe, tyro.conf.arg(name="")]
"""Type of a job's ``recipe``: its flags stand at the top level."""

# Exit status of a run that was asked to stop and left a checkpoint: the same command goes on (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75

Job = TypeVar("Job")


class UsageError(ValueError):
    """A flag's value that this task does not know, or flags that exclude each other: exit status 2."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs and registered models go; MLFLOW_TRACKING_URI, when set, wins over ``folder``."""

    folder: str = "outputs/mlflow"
    """Folder of the embedded MLflow: mlflow.db and artifacts/."""
    experiment: str = ""
    """MLflow experiment; empty = cad-<task>."""
    registered_model: str = ""
    """Registered model's name; empty = cad-<task>."""


def parse_job(job_type: type[Job], argv: Sequence[str] | None = None, **defaults: Any) -> Job:
    """The job that a command line asks for.

    Args:
        job_type: Frozen dataclass with ``task: str`` and ``recipe: RecipeFlags``; required fields default to ``tyro.MISSING``.
        argv: Arguments without the program's name; None = the process's own.
        defaults: Field values that replace the dataclass's defaults.

    Exits with status 2 after a hint for an unknown task, an unknown flag or a value of the wrong type or out of its range.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    task_name, smoke = _task_of(arguments)
    task = TASKS[task_name]
    recipe = task.smoke if smoke else task.recipe
    fields = {field.name for field in dataclasses.fields(job_type)}
    try:
        if "run" in fields and (name := _last_value(arguments, "--run")):
            run = named_run(task_name, name)
            recipe = replace_all(recipe, run.changes)
            defaults = {"run": name, "seeds": run.seeds, **defaults}
        if "options" in fields:
            defaults = {"options": task.infer_options(), **defaults}
            arguments = _with_prefix(arguments, {field.name for field in dataclasses.fields(task.infer_options)} - fields)
        if {"dry_run", "list_runs"} <= fields and {"--dry-run", "--list-runs"} & {a.replace("_", "-") for a in arguments}:
            defaults = {"dataset": "", **defaults}  # only told, not read
        default = job_type(task=task_name, recipe=recipe, smoke=smoke, **defaults)
        return tyro.cli(job_type, args=arguments, default=default, description=sys.modules[job_type.__module__].__doc__)
    except ValueError as error:  # a value of the right type out of its range: a config's own check
        print(f"error: {without_credentials(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error


def named_run(task: str, name: str) -> NamedRun:
    """A task's named run. Raises UsageError with a hint for an unknown name."""
    runs = TASKS[task].runs
    if name not in runs:
        raise UsageError(f"--run {name!r} is no named run of --task {task}: {among(name, runs, '--run')}; --list-runs tells what each is")
    return runs[name]


def check_rule(task: str, rule: str, flag: str = "--combine") -> None:
    """Raises UsageError with a hint unless ``rule`` is one of the task's ensemble rules."""
    rules = TASKS[task].combine_rules
    if rule not in rules:
        raise UsageError(f"{flag} {rule!r} is no ensemble rule of --task {task}: {among(rule, rules, flag)}")


def among(value: str, allowed: Iterable[str], flag: str) -> str:
    """As ``it has soft, hard; did you mean --combine soft?``."""
    allowed = list(allowed)
    close = difflib.get_close_matches(value, allowed, n=1)
    return f"it has {', '.join(allowed) or 'none'}" + (f"; did you mean {flag} {close[0]}?" if close else "")


def _with_prefix(arguments: Sequence[str], options: set[str]) -> list[str]:
    """``--gallery-views 24`` as ``--options.gallery-views 24``: a task's own flag is known without its prefix where no flag of the job has its name."""
    words = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        known = flag.startswith("--") and name.removeprefix("no-").replace("-", "_") in options
        words.append(f"--options.{name}{equals}{value}" if known else argument)
    return words


def _last_value(arguments: Sequence[str], flag: str) -> str:
    found = ""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    return found


def _task_of(arguments: list[str]) -> tuple[str, bool]:
    """First stage: only ``--task`` and ``--smoke``, which decide the defaults of all other flags."""
    smoke = False
    named = any(argument.partition("=")[0] == "--task" for argument in arguments)
    name = _last_value(arguments, "--task") if named else next(iter(TASKS))
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in ("--smoke", "--no-smoke"):
            smoke = flag == "--smoke"
    if named and name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean --task {close[0]}?" if close else ""
        print(f"error: --task {name!r} is none of {', '.join(sorted(TASKS))}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return name, smoke


# Native modules that print at the end what of theirs nobody took apart.
_REPORT_WHAT_IS_LEFT = {"cascadio", "manifold3d", "triton"}


def _stop(signum: int, frame: object) -> None:
    print("stopped; the same command goes on from what is finished", file=sys.stderr)
    raise SystemExit(EXIT_STOPPED)


def run_job(job_type: type[Job], main: Callable[[Job], int | None], argv: Sequence[str] | None = None) -> None:
    """Parse, run, and turn a user's mistake into one line and exit status 1 (a `UsageError`: 2, Ctrl-C: 130).

    Exit status 0 is success; `EXIT_STOPPED` means stopped on request, with a checkpoint. CAD_TRACEBACK=1 shows where an error came from.
    """
    # Until a job sets a handler of its own, there is nothing to save: it ends at once, and in order.
    signal.signal(signal.SIGTERM, _stop)
    job = parse_job(job_type, argv)
    try:
        status = main(job)
    except UsageError as error:
        print(f"error: {without_credentials(str(error))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = _reader_gone()
    except (ValueError, OSError) as error:  # OSError: files, disks, object stores
        if os.environ.get("CAD_TRACEBACK") == "1":
            raise
        print(f"error: {without_credentials(str(error))}", file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = _reader_gone()
    sys.stderr.flush()
    _let_go()
    raise SystemExit(status or 0)


def _let_go() -> None:
    """What an orderly end does not need: Ray waits half a second for its workers' output when the interpreter closes it, and the interpreter takes more
    than a second to take apart what the system frees anyway."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    if not sys.modules.keys() & _REPORT_WHAT_IS_LEFT:
        gc.freeze()


def _reader_gone() -> int:
    """Whoever read the output has seen enough (``… | head``): say no more; the status that a shell gives to SIGPIPE."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
