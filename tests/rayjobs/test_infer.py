"""Answers: the same whatever else is asked, the same through MLflow, and in spite of broken files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cad_models.alignment.data import cad_points
from cad_models.alignment.options import AlignmentOptions
from cad_models.common.cameras import query_cameras, ring_cameras
from cad_models.common.encoders import build_encoder
from cad_models.common.images import decode_image, encode_png
from cad_models.common.meshes import read_mesh
from cad_models.common.rendering import render_views
from cad_models.ensemble import InputProcessor, answer, load_ensemble, write_ensemble
from tests.rayjobs.members import TASK, write_tiny_member
from tests.shared import REPOSITORY

NUM_PARTS = 4


def write_off(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    rows = [" ".join(map(repr, map(float, row))) for row in vertices] + ["3 " + " ".join(map(str, row)) for row in faces]
    path.write_text(f"OFF\n{len(vertices)} {len(faces)} 0\n" + "\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two members, their ensemble, and folders of queries and gallery with a broken file in each."""
    from cad_models.alignment.parts import generate_part

    root = tmp_path_factory.mktemp("infer")
    encoder = build_encoder("hog")
    members = [write_tiny_member(root / f"m{s}", seed=s, encoder_digest=encoder.digest, image_width=encoder.width) for s in (0, 1)]
    write_ensemble(root / "ensemble", members)
    write_ensemble(root / "single", members[:1])
    for name in ("q", "g"):
        (root / name).mkdir()
    for i in range(NUM_PARTS):
        part = generate_part(i, 0)
        for name in ("q", "g"):
            write_off(root / name / f"{part.object_id}.off", part.vertices, part.faces)
        for k, view in enumerate(render_views(part.vertices, part.faces, ring_cameras(6)[: 1 + i % 3], size=96)):
            (root / "g" / f"{part.object_id}_{k}.png").write_bytes(encode_png(view))
        (root / "q" / f"{part.object_id}.png").write_bytes(encode_png(render_views(part.vertices, part.faces, query_cameras(1, i), size=96)[0]))
    (root / "q" / "broken.png").write_bytes(b"no picture")
    (root / "g" / "broken.off").write_bytes(b"OFF\n3 1 0\n")
    (root / "g" / "notes.txt").write_text("ignored")
    return root


@pytest.fixture(scope="module")
def ensemble(place):
    return load_ensemble(place / "ensemble")


@pytest.fixture(scope="module")
def requests(place):
    return TASK.list_requests(str(place / "q"), str(place / "g"))


@pytest.fixture(scope="module")
def processed(ensemble, requests):
    with InputProcessor(ensemble) as processor:
        return processor.process(requests.inputs)


def test_infer_outputs_equal_the_members_own_embedding_of_points_and_of_the_encoders_vector(ensemble, requests, processed):
    import hashlib

    encoder = build_encoder("hog")
    for item, row in zip(requests.inputs, processed, strict=True):
        if "broken" in item.source:
            continue
        data = Path(item.uri).read_bytes()
        for member, output in zip(ensemble.members, row.outputs, strict=True):
            if item.kind == "mesh":
                points, normals = cad_points(read_mesh(Path(item.uri)), hashlib.sha256(data).hexdigest(), member.recipe.data.num_points)
                cloud = np.concatenate([points, normals], axis=1)[: member.recipe.model.num_points]
                wanted = member.learner.embed_cad(torch.from_numpy(cloud)[None])
            else:
                frozen = encoder.encode([decode_image(data)]).astype(np.float16).astype(np.float32)
                wanted = member.learner.embed_images(torch.from_numpy(frozen))
            np.testing.assert_allclose(output, wanted[0].detach().numpy(), atol=1e-6)
            assert np.linalg.norm(output) == pytest.approx(1, abs=1e-5)


def test_infer_outputs_do_not_depend_on_what_else_is_asked(ensemble, requests, processed):
    order = np.random.default_rng(0).permutation(len(requests.inputs))[:6]
    with InputProcessor(ensemble) as processor:
        again = processor.process([requests.inputs[i] for i in order])
    for i, row in zip(order, again, strict=True):
        for one, other in zip(row.outputs, processed[i].outputs, strict=True):
            assert np.array_equal(one, other)


def test_infer_same_mesh_under_two_names_has_one_embedding(requests, processed):
    by_source = {(item.source, item.uri): row for item, row in zip(requests.inputs, processed, strict=True)}
    rows = [row for (source, _), row in by_source.items() if source == "part-000001.off"]
    assert len(rows) == 2
    assert all(np.array_equal(a, b) for a, b in zip(rows[0].outputs, rows[1].outputs, strict=True))


def test_infer_broken_files_are_rejected_with_reasons_and_stop_nothing(requests, processed):
    rejected = {item.source: row.reject.reason for item, row in zip(requests.inputs, processed, strict=True) if row.reject}
    assert rejected.keys() == {"broken.png", "broken.off"}
    assert rejected["broken.png"] == "bad_image"
    assert all(row.thumbnail[:2] == b"\xff\xd8" for row in processed if row.reject is None)


def test_infer_encoder_of_another_digest_is_refused_naming_both(tmp_path):
    encoder = build_encoder("hog")
    member = write_tiny_member(tmp_path / "m", encoder_digest="another", image_width=encoder.width)
    write_ensemble(tmp_path / "e", [member])
    with pytest.raises(ValueError, match=f"another.*{encoder.digest}"):
        InputProcessor(load_ensemble(tmp_path / "e"))


# --- MLflow -------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mlflow_model(place):
    from rayjobs.registry import save_model

    save_model(place / "single", place / "mlflow_model")
    return place / "mlflow_model"


@pytest.fixture(scope="module")
def wanted_rows(place):
    """What infer answers for the single member, image queries only."""
    queries = sorted(str(path) for path in (place / "q").glob("part-*.png"))
    single = load_ensemble(place / "single")
    with InputProcessor(single) as processor:
        found, _ = answer(single, TASK.list_requests(queries, str(place / "g")), processor, top_k=2)
    return queries, [(a.query, a.rank, a.answer, a.score, a.direction) for a in found]


@pytest.mark.slow
def test_mlflow_model_without_pickle_gives_infers_answers(place, mlflow_model, wanted_rows, monkeypatch):
    import mlflow
    import pandas as pd

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    assert not [path for path in mlflow_model.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    queries, wanted = wanted_rows
    model = mlflow.pyfunc.load_model(str(mlflow_model))
    frame = model.predict(pd.DataFrame({"query": queries, "gallery": str(place / "g")}), params={"top_k": 2})
    assert list(frame.itertuples(index=False, name=None)) == wanted
    # The task's options reach it too.
    options = AlignmentOptions(gallery_views=2)
    with InputProcessor(load_ensemble(place / "single"), options=options) as processor:
        requests = TASK.list_requests(queries, str(place / "g"), options=options)
        rendered = [(a.query, a.rank, a.answer, a.score, a.direction) for a in answer(load_ensemble(place / "single"), requests, processor, top_k=2)[0]]
    frame = model.predict(pd.DataFrame({"query": queries, "gallery": str(place / "g")}), params={"top_k": 2, "options": '{"gallery_views": 2}'})
    assert list(frame.itertuples(index=False, name=None)) == rendered != wanted
    with pytest.raises(Exception, match="no field 'gallery_view'; did you mean gallery_views"):
        model.predict(pd.DataFrame({"query": queries, "gallery": str(place / "g")}), params={"options": '{"gallery_view": 2}'})


@pytest.mark.slow
def test_mlflow_models_predict_gives_infers_answers(place, mlflow_model, wanted_rows, tmp_path):
    queries, wanted = wanted_rows
    rows = {"columns": ["query", "gallery"], "data": [[query, str(place / "g")] for query in queries]}
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_split": rows, "params": {"top_k": 2}}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", str(mlflow_model), "-i", "in.json", "-o", "out.json"]
    # No checkout on the path: the model brings its own code.
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "--env-manager", "local"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [(r["query"], r["rank"], r["answer"], r["direction"]) for r in found] == [(q, k, a, d) for q, k, a, _, d in wanted]
    np.testing.assert_allclose([r["score"] for r in found], [row[3] for row in wanted], atol=1e-6)


# --- the job ------------------------------------------------------------------------------------------------------------------------------
def run_infer(place: Path, output: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "rayjobs" / "infer.py"), "--task", "alignment", "--output", output, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_infer_missing_folder_ends_with_one_line_and_status_1(place):
    done = run_infer(place, "none.csv", "--model", "m0", "--queries", "nowhere", "--gallery", "g")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: --queries nowhere: there is no such folder"]


@pytest.mark.slow
@pytest.mark.ray
def test_infer_job_files_do_not_depend_on_the_number_of_workers_and_equal_the_answers_in_process(place, ensemble, requests, processed):
    from cad_models.ensemble import ranked

    folders = ("--queries", "q", "--gallery", "g")
    one = run_infer(place, "one/s.csv", "--model", "m0", "--model", "m1", *folders, "--scale.num-workers", "1", "--max-bad-fraction", "0")
    assert one.returncode == 1, one.stderr[-2000:]
    assert "2 of" in one.stderr
    assert "--max-bad-fraction" in one.stderr
    two = run_infer(place, "two/s.csv", "--model", "ensemble", *folders, "--scale.num-workers", "2", "--max-bad-fraction", "0.5")
    assert two.returncode == 0, two.stderr[-2000:]
    for name in ("s.csv", "s.quarantine.parquet"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()

    outputs = {i: row.outputs for i, row in enumerate(processed) if row.reject is None}
    wanted = [(a.direction, a.query, a.rank, a.answer, a.score) for a in ranked(ensemble, requests, outputs, top_k=3)]
    for folder in ("one", "two"):
        table = pq.read_table(place / folder / "s.ranks.parquet")
        assert [tuple(row.values()) for row in table.to_pylist()] == wanted
    with (place / "two" / "s.csv").open() as stream:
        header, *rows = list(csv.reader(stream))
    assert header == ["id", "image_to_mesh_image", "image_to_mesh_mesh", "mesh_to_image_mesh", "mesh_to_image_image"]
    assert [row[1] for row in rows] == [row[3] for row in rows] == [f"part-{i:06d}" for i in range(NUM_PARTS)]
    quarantine = pq.read_table(place / "two" / "s.quarantine.parquet").to_pylist()
    assert [row["source"] for row in quarantine] == ["broken.off", "broken.png"]
    assert (place / "two" / "s.html").stat().st_size > 10_000
