"""Every room through every job with its smoke recipe: raw files -> dataset -> members -> champion -> answers, in a Ray of its own."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cad_models.dataset import DatasetFolder
from cad_models.tasks import TASKS

REPOSITORY = Path(__file__).resolve().parents[2]


def run_jobs(*jobs: tuple[str, list[str]]) -> str:
    """Run jobs in one process; their output."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "tests.rayjobs.job_sequence", json.dumps(jobs)]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def source_of(room: str, folder: Path) -> str:
    """Raw files of the room, generated."""
    if room == "alignment":
        from cad_models.alignment.examples_on_disk import write_parts

        write_parts(folder / "raw", 30, 0)
    elif room == "histograms":
        from cad_models.histograms.primitives import write_shapes

        write_shapes(folder / "raw", 30, 0)
    else:
        return "builtin:60"
    return str(folder / "raw")


def queries_of(room: str, folder: Path, dataset: DatasetFolder) -> list[str]:
    """Flags of infer.py for objects of the test split."""
    if room == "alignment":
        from cad_models.alignment.examples_on_disk import write_queries

        write_queries(folder, dataset, folder / "raw")
        return ["--queries", str(folder / "queries"), "--gallery", str(folder / "gallery")]
    queries = folder / "queries"
    queries.mkdir()
    for index, part in enumerate(dataset.manifest().parts):
        if not part["splits"].get("test"):
            continue
        if room == "histograms":
            for source in dataset.read_part("objects", index, ["source"]).column("source").to_pylist():
                (queries / Path(source).name).write_bytes((folder / "raw" / source).read_bytes())
        else:
            views = dataset.read_part("views", index, ["object_id", "image"])
            for object_id, image in zip(views.column("object_id").to_pylist(), views.column("image").to_pylist(), strict=True):
                (queries / f"{object_id.replace('/', '_')}.png").write_bytes(image)
    return ["--queries", str(queries)]


@pytest.mark.ray
@pytest.mark.parametrize("room", sorted(TASKS))
def test_room_goes_from_raw_files_to_answers_of_its_champion(room, tmp_path):
    folder, common = str(tmp_path / "ds"), ["--task", room]
    tracked = ["--tracking.folder", str(tmp_path / "mlflow")]
    made = [*common, "--smoke", "--dataset", folder]
    jobs = [("prepare", [*made, "--source", source_of(room, tmp_path), "--split.val-fraction", "0.2", "--split.test-fraction", "0.2"])]
    if TASKS[room].embed_columns:
        jobs.append(("embed", made))
    here = [*made, *tracked, "--scale.num-workers", "0"]
    jobs.append(("train", [*here, "--output", str(tmp_path / "runs"), "--name", "one", "--seeds", "1", "2", "--register"]))
    jobs.append(("tune", [*here, "--output", str(tmp_path / "searches"), "--search.num-samples", "2", "--ensemble-size", "2"]))
    told = run_jobs(*jobs)
    dataset = DatasetFolder(folder)
    manifest = dataset.manifest()
    assert manifest.num_objects == sum(manifest.splits.values()) > 0 and min(manifest.splits[s] for s in ("train", "val", "test")) > 0, told
    for seed in (1, 2):
        assert (tmp_path / "runs" / "one" / f"seed_{seed}" / "training_history.csv").exists()

    answers = tmp_path / "answers.csv"
    model = ["--model", f"models:/cad-{room}@champion", *tracked]
    run_jobs(("infer", [*common, *model, *queries_of(room, tmp_path, dataset), "--output", str(answers)]))
    rows = list(csv.DictReader(answers.open()))
    assert len(rows) == manifest.splits["test"]
