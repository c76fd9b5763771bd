"""The command line: the documented commands parse, mistakes end with a hint and status 2, --help is quick."""

import importlib
import os
import pickle
import resource
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import tyro

from cad_models.tasks import TASKS
from rayjobs.cli import RecipeFlags, parse_job, run_job
from tests.shared import REPOSITORY

JOBS = {
    "prepare": ("PrepareJob", ["--source", "parts/", "--dataset", "ds/"]),
    "embed": ("EmbedJob", ["--dataset", "ds/"]),
    "train": ("TrainJob", ["--dataset", "ds/"]),
    "tune": ("TuneJob", ["--dataset", "ds/"]),
    "infer": ("InferJob", ["--queries", "q/"]),
}


@dataclass(frozen=True, kw_only=True)
class EchoJob:
    """A job of its own, so that parsing is tested apart from the jobs."""

    task: str
    recipe: RecipeFlags
    smoke: bool = False
    dataset: str = tyro.MISSING


def job_type(job: str) -> type:
    return getattr(importlib.import_module(f"rayjobs.{job}"), JOBS[job][0])


def refused(capsys, arguments: list[str], kind: type = EchoJob) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_job(kind, arguments)
    assert stopped.value.code == 2
    # The hints stand in boxes: one line again.
    output = capsys.readouterr()
    return " ".join((output.err + output.out).replace("│", " ").split())


def test_commands_of_the_documentation_parse_to_what_they_say():
    task = ["--task", "alignment", "--dataset", "ds/"]
    train = parse_job(job_type("train"), [*task, "--model.num-experts", "8", "--scale.num-workers", "8"])
    assert (train.recipe.model.num_experts, train.scale.num_workers, train.dataset) == (8, 8, "ds/")
    assert parse_job(job_type("tune"), [*task, "--search.num-samples", "64"]).search.num_samples == 64
    assert parse_job(job_type("prepare"), [*task, "--source", "builtin:600"]).source == "builtin:600"
    encoder = "timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"
    embed = parse_job(job_type("embed"), [*task, "--encoder", encoder])
    assert encoder in (getattr(embed, "encoder", None), embed.recipe.data.encoder)
    model = "models:/cad-alignment@champion"
    infer = parse_job(
        job_type("infer"),
        ["--task", "alignment", "--model", model, "--queries", "q/", "--gallery", "g/", "--output", "submission.csv"],
    )
    assert model in infer.model and (infer.queries, infer.gallery, str(infer.output)) == ("q/", "g/", "submission.csv")


@pytest.mark.parametrize("form", [["--task", "alignment"], ["--task=alignment"], []])
@pytest.mark.parametrize("flag", ["--optim.head-lr", "--optim.head_lr"])
def test_flags_change_only_what_they_name(form, flag):
    job = parse_job(EchoJob, [*form, "--dataset", "ds", flag, "0.5"])
    from cad_models.config import differences

    assert differences(TASKS["alignment"].recipe, job.recipe) == ["optim.head_lr: 0.002 -> 0.5"]


@pytest.mark.parametrize("arguments", [["--smoke"], ["--smoke", "--task", "alignment"], ["--no-smoke", "--smoke"]])
def test_smoke_starts_from_the_smoke_recipe_and_flags_still_win(arguments):
    job = parse_job(EchoJob, [*arguments, "--dataset", "ds", "--batch-size", "4"])
    assert job.smoke and job.recipe.batch_size == 4
    assert job.recipe.model == TASKS["alignment"].smoke.model


def test_job_travels_through_pickle():
    job = parse_job(job_type("train"), ["--dataset", "ds", "--model.size", "tiny", "--model.channels", "xyz"])
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize("form", [["--task", "alignmnt"], ["--task=alignmnt"]])
def test_unknown_task_is_refused_with_a_hint(capsys, form):
    assert (
        "'alignmnt' is none of" in (message := refused(capsys, [*form, "--dataset", "ds"])) and "did you mean --task alignment?" in message
    )


def test_task_without_a_value_is_refused(capsys):
    assert "alignment" in refused(capsys, ["--dataset", "ds", "--task"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--model.num-expert", "8"], "--model.num-experts"),
        (["--optim.learning-rate", "8"], "--optim.learning-rate"),
        (["--batch-size", "many"], "--batch-size"),
        (["--model.size", "huge"], "tiny"),
        (["--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["--optim.ema-decay", "2"], "--optim.ema-decay is 2.0"),
    ],
)
def test_wrong_flag_or_value_is_refused_with_a_hint(capsys, arguments, expected):
    assert expected in refused(capsys, ["--dataset", "ds", *arguments])


def test_missing_required_flag_is_named(capsys):
    assert "--dataset" in refused(capsys, ["--task", "alignment"])


@pytest.mark.parametrize(
    "raised, status, text",
    [
        (ValueError("no such dataset"), 1, "error: no such dataset"),
        (FileNotFoundError("gone"), 1, "error: gone"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_run_job_turns_a_users_mistake_into_one_line(capsys, monkeypatch, raised, status, text):
    monkeypatch.delenv("CAD_TRACEBACK", raising=False)

    def main(job):
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run_job(EchoJob, main, ["--dataset", "ds"])
    captured = capsys.readouterr()
    assert stopped.value.code == status and text in captured.err and "Traceback" not in captured.err


def test_run_job_of_a_programming_error_keeps_its_traceback(monkeypatch):
    def main(job):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_job(EchoJob, main, ["--dataset", "ds"])


def test_run_job_leaves_ray_before_the_interpreter_ends(monkeypatch):
    left = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: left.append(True)))
    with pytest.raises(SystemExit):
        run_job(EchoJob, lambda job: 0, ["--dataset", "ds"])
    assert left == [True]


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (75, 75)])
def test_run_job_exits_with_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as stopped:
        run_job(EchoJob, lambda job: returned, ["--dataset", "ds"])
    assert stopped.value.code == status


@pytest.mark.parametrize(
    "job, flags, told",
    [
        ("train", ["--dataset", "ds", "--seeds", "1", "1"], "--seeds 1 1: seeds must be different numbers"),
        ("train", ["--dataset", "ds", "--seeds", "1", "--combine", "meen"], "did you mean --combine mean?"),
        ("train", ["--dataset", "ds", "--seeds", "1", "--baselines"], "leave --seeds or --baselines out"),
        ("train", ["--dataset", "ds", "--register"], "--register is about the members of --seeds"),
        ("train", ["--run", "ensembel_3", "--dry-run"], "did you mean --run ensemble_3?"),
        ("tune", ["--dataset", "ds", "--combine", "stacked"], "it has concatenate, mean"),
        ("infer", ["--queries", "q", "--combine", "soft"], "it has concatenate, mean"),
    ],
)
def test_flags_that_the_task_does_not_know_end_with_status_2_and_a_hint(job, flags, told, capsys):
    module = importlib.import_module(f"rayjobs.{job}")
    with pytest.raises(SystemExit) as stopped:
        run_job(job_type(job), module.main, ["--task", "alignment", *flags])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.fixture
def labels_only(monkeypatch):
    """A task without embeddings and pictures, with flags of its own for inference."""
    from cad_models.alignment.task import AlignmentTask
    from cad_models.task import InferOptions

    @dataclass(frozen=True, kw_only=True)
    class Options(InferOptions):
        flips: bool = False
        order: str = "numeric"

    class LabelsTask(AlignmentTask):
        name = "labels"
        embed_columns = ()
        infer_options = Options

    monkeypatch.setitem(TASKS, "labels", LabelsTask())
    return Options


def test_embed_and_preview_of_a_task_without_pictures_end_with_status_2(labels_only, capsys):
    for job, flags, told in (
        ("embed", ["--dataset", "ds"], "--task labels reads no frozen embeddings"),
        ("prepare", ["--source", "s", "--dataset", "ds", "--preview", "x.png"], "--preview x.png: the objects of --task labels have no pictures"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_job(job_type(job), importlib.import_module(f"rayjobs.{job}").main, ["--task", "labels", *flags])
        assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_infer_options_of_the_task_are_flags(labels_only, capsys):
    assert parse_job(job_type("infer"), ["--task", "labels", "--queries", "q"]).options == labels_only()
    given = parse_job(job_type("infer"), ["--task", "labels", "--queries", "q", "--options.flips", "--options.order", "file"]).options
    assert given == labels_only(flips=True, order="file")
    assert "--options.flips" in refused(capsys, ["--task", "alignment", "--queries", "q", "--options.flips"], job_type("infer"))


@pytest.mark.parametrize("flag", ["--direction", "--task-direction"])
def test_infer_direction_has_two_names(flag):
    job = parse_job(job_type("infer"), ["--task", "alignment", "--queries", "q", flag, "mesh_to_mesh", "--options.scale-aware", "0"])
    assert job.direction == "mesh_to_mesh" and job.options.scale_aware == 0


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan"])
def test_infer_option_out_of_range_ends_with_status_2_naming_the_flag(value, capsys):
    assert "--options.scale-aware is" in refused(capsys, ["--task", "alignment", "--queries", "q", "--options.scale-aware", value], job_type("infer"))


def test_list_runs_and_dry_run_need_no_dataset(capsys):
    for flags, told in ((["--list-runs"], "ensemble_3: three seeds"), (["--run", "moe", "--dry-run"], "--model.num-experts 8")):
        with pytest.raises(SystemExit) as stopped:
            run_job(job_type("train"), importlib.import_module("rayjobs.train").main, ["--task", "alignment", *flags])
        assert stopped.value.code == 0 and told in capsys.readouterr().out


@pytest.mark.parametrize("job", JOBS)
def test_help_is_quick_and_loads_no_heavy_library(job):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{job}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('rayjobs/{job}.py', run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'timm', 'trimesh', 'numba', 'scipy', 'optuna', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    assert "python rayjobs/" in run.stdout and (job == "infer" or "--optim.lr" in run.stdout)
    # CPU seconds, not time: other processes of the machine do not count.
    assert after.ru_utime - before.ru_utime < 1.5


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def test_output_into_a_reader_that_has_seen_enough_ends_without_a_traceback():
    command = [sys.executable, "rayjobs/train.py", "--task", "alignment", "--dry-run"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert ended.stderr == "" and ended.returncode == 141
