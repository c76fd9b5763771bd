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


def write_queries(room: str, folder: str) -> None:
    """Files of the test split's objects, as a user would have them: ``queries/`` and, where the room has one, ``gallery/``."""
    place = Path(folder)
    dataset = DatasetFolder(str(place / "ds"))
    if room == "alignment":
        from cad_models.alignment.examples_on_disk import write_queries

        write_queries(place, dataset, place / "raw")
        return
    queries = place / "queries"
    queries.mkdir()
    for index, part in enumerate(dataset.manifest().parts):
        if not part["splits"].get("test"):
            continue
        if room == "histograms":
            for source in dataset.read_part("objects", index, ["source"]).column("source").to_pylist():
                (queries / Path(source).name).write_bytes((place / "raw" / source).read_bytes())
        else:
            views = dataset.read_part("views", index, ["object_id", "image"])
            for object_id, image in zip(views.column("object_id").to_pylist(), views.column("image").to_pylist(), strict=True):
                (queries / f"{object_id.replace('/', '_')}.png").write_bytes(image)


@pytest.mark.ray
@pytest.mark.parametrize("room", [pytest.param(room, marks=[pytest.mark.slow] if TASKS[room].embed_columns else []) for room in sorted(TASKS)])
def test_room_goes_from_raw_files_to_answers_of_its_champion(room, tmp_path):
    folder, common = str(tmp_path / "ds"), ["--task", room]
    tracked = ["--tracking.folder", str(tmp_path / "mlflow")]
    made = [*common, "--smoke", "--dataset", folder]
    here = [*made, *tracked, "--scale.num-workers", "0"]
    answers = tmp_path / "answers.csv"
    asked = ["--queries", str(tmp_path / "queries"), *(["--gallery", str(tmp_path / "gallery")] if room == "alignment" else [])]
    told = run_jobs(
        ("prepare", [*made, "--source", source_of(room, tmp_path), "--split.val-fraction", "0.2", "--split.test-fraction", "0.2"]),
        *([("embed", made)] if TASKS[room].embed_columns else []),
        ("train", [*here, "--output", str(tmp_path / "runs"), "--name", "one", "--seeds", "1", "2", "--register"]),
        ("tune", [*here, "--output", str(tmp_path / "searches"), "--search.num-samples", "2", "--ensemble-size", "2"]),
        (f"{__name__}:write_queries", [room, str(tmp_path)]),
        ("infer", [*common, *tracked, "--model", f"models:/cad-{room}@champion", *asked, "--output", str(answers)]),
    )
    manifest = DatasetFolder(folder).manifest()
    assert manifest.num_objects == sum(manifest.splits.values()) and min(manifest.splits[split] for split in ("train", "val", "test")) > 0, told
    for seed in (1, 2):
        assert (tmp_path / "runs" / "one" / f"seed_{seed}" / "training_history.csv").exists()
    assert len(list(csv.DictReader(answers.open()))) == manifest.splits["test"]
