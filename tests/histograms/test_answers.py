"""What infer asks of the room: files in, classes and neighbours out; and the report."""

import numpy as np
import pytest
import torch

from cad_models.checkpoint import load_member, write_member
from cad_models.common.stl_writer import binary_stl
from cad_models.config import replace_all
from cad_models.dataset import build_table, tensor_field
from cad_models.histograms.data import list_source, prepare_item, schemas
from cad_models.histograms.features import feature_width, features
from cad_models.histograms.primitives import SOURCE_CLASSES, generate_shape
from cad_models.histograms.published import write_json
from cad_models.histograms.recipe import SMOKE
from cad_models.histograms.report import confusion_table, principal_plane, report
from cad_models.task import Answer, Input, Reject
from cad_models.tasks import TASKS
from tests.histograms.test_published import some_histograms

TASK = TASKS["histograms"]


def signature_of(recipe):
    return {
        "class_names": list(SOURCE_CLASSES), "inputs": list(recipe.data.inputs), "bins": recipe.data.bins, "encoding": recipe.data.encoding,
        "log2_chords": recipe.data.log2_chords, "feature_width": feature_width(recipe.data),
        "embed_dim": recipe.model.num_networks * recipe.model.embed_dim, "dataset_digest": "d",
    }  # fmt: skip


def member(tmp_path, name, recipe, seed, centres=True):
    torch.manual_seed(seed)
    learner = TASK.learner(recipe, signature_of(recipe)).eval()
    if centres:
        items = list_source("builtin:10:seed=5").items
        table = build_table(schemas()["objects"], [prepare_item(item, recipe).objects for item in items])
        assert table.schema.field("histograms").metadata == tensor_field("histograms", "float32", (2, 4, 248)).metadata
        stored = [prepare_item(item, recipe).objects for item in items]
        rows = features(np.stack([s["histograms"] for s in stored]), np.stack([s["distributions"] for s in stored]), recipe.data)
        with torch.no_grad():
            embedded = learner.embed(torch.from_numpy(rows)).numpy()
        learner.remember({"embedding": embedded, "label": np.array([SOURCE_CLASSES.index(i.label) for i in items])})
    write_member(tmp_path / name, task=TASK, recipe=recipe, signature=signature_of(recipe), metrics={}, artifacts=learner.artifacts())
    return load_member(tmp_path / name)


def write_stl(path, index, seed=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = generate_shape(index, seed)
    path.write_bytes(binary_stl(shape.vertices, shape.faces))


def answered(members, requests, top_k=3):
    predictor = TASK.predictor(members)
    outputs = {}
    for position, item in enumerate(requests.inputs):
        columns = TASK.read_input(item, predictor.settings)
        if not isinstance(columns, Reject):
            outputs[position] = predictor.predict([columns])[0]
    signatures = [m.signature for m in members]
    return [
        a
        for search in requests.searches
        for a in TASK.rank(search, outputs, rule="concatenate", weights=[1.0] * len(members), top_k=top_k, signatures=signatures)
    ]


def test_a_gallery_shape_is_its_own_nearest_and_broken_files_are_left_out(tmp_path):
    for index in range(4):
        write_stl(tmp_path / "gallery" / f"g{index}.stl", index)
    write_stl(tmp_path / "queries" / "q.stl", 2)
    (tmp_path / "queries" / "broken.stl").write_bytes(b"x")
    other = replace_all(SMOKE, {"model.embed_dim": 6, "data.inputs": ["model", "affine"]})
    members = [member(tmp_path, "a", SMOKE, 0), member(tmp_path, "b", other, 1)]
    requests = TASK.list_requests(str(tmp_path / "queries"), str(tmp_path / "gallery"))
    answers = answered(members, requests)
    shapes = [a for a in answers if a.direction == "shape_to_shape"]
    assert [a.query for a in shapes] == ["q"] * 3 and shapes[0].answer == "g2" and shapes[0].score == pytest.approx(1, abs=1e-5)
    classes = [a for a in answers if a.direction == "shape_to_class"]
    assert len(classes) == 3 and {a.answer for a in classes} <= set(SOURCE_CLASSES)
    # The score of a class is the mean of the members' cosines with its centre.
    columns = [TASK.predictor([m]) for m in members]
    item = next(i for i in requests.inputs if i.source == "q.stl")
    cosines = [p.predict([TASK.read_input(item, p.settings)])[0][0][-5:] for p in columns]
    assert classes[0].score == pytest.approx(float(np.mean(cosines, axis=0).max()), abs=1e-6)
    rows = TASK.submission(answers)
    assert rows[0] == ["id", "class", "cosine", "most_similar"] and rows[1][0] == "q" and rows[1][3].split()[0] == "g2"


def test_histogram_files_are_queries_of_members_that_need_no_mesh(tmp_path):
    recipe = replace_all(SMOKE, {"data.inputs": ["model", "hull"]})
    (tmp_path / "a.json").write_bytes(write_json("a", some_histograms()))
    requests = TASK.list_requests([str(tmp_path / "a.json")], None)
    assert [s.direction for s in requests.searches] == ["shape_to_class"]
    assert len(answered([member(tmp_path, "m", recipe, 0)], requests, top_k=9)) == 5
    wants_meshes = TASK.read_input(requests.inputs[0], TASK.predictor([member(tmp_path, "n", SMOKE, 0)]).settings)
    assert isinstance(wants_meshes, Reject) and "needs meshes" in wants_meshes.detail
    gone = TASK.read_input(Input(kind="mesh", source="x.stl", uri=str(tmp_path / "x.stl")), TASK.predictor([member(tmp_path, "o", SMOKE, 0)]).settings)
    assert gone.reason == "unreadable"


def test_members_that_do_not_go_together_or_know_no_centres_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no class centres"):
        TASK.predictor([member(tmp_path, "a", SMOKE, 0, centres=False)])
    one, two = member(tmp_path, "b", SMOKE, 0), member(tmp_path, "c", SMOKE, 1)
    two.signature["class_names"] = ["Cone", "Bolt"]
    with pytest.raises(ValueError, match="Bolt"):
        TASK.predictor([one, two])


def test_requests_that_cannot_be_met_say_why(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no shape"):
        TASK.list_requests(str(tmp_path), None)
    with pytest.raises(ValueError, match="no such folder"):
        TASK.list_requests(str(tmp_path / "gone"), None)
    with pytest.raises(ValueError, match="--gallery"):
        TASK.list_requests(str(tmp_path), None, direction="shape_to_shape")
    with pytest.raises(ValueError, match="upwards"):
        TASK.list_requests(str(tmp_path), None, direction="upwards")


def test_submission_of_classes_alone_has_empty_cells_for_shapes():
    answers = [Answer(direction="shape_to_class", query="a", rank=1, answer="Cone", score=0.5), Answer(direction="shape_to_class", query="a", rank=2, answer="Cube", score=0.1)]
    assert TASK.submission(answers)[1:] == [["a", "Cone", "0.500000", ""]]


# --- the report ---------------------------------------------------------------------------------------------------------------------------
def predictions(n=30, seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    rows = np.eye(5)[labels] + noise * rng.standard_normal((n, 5))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return {"embedding": rows, "label": labels, "group": np.arange(n), "num_clusters": np.zeros(n, dtype=np.int64)}


def test_confusion_table_counts_by_nearest_centre():
    train = predictions(noise=0.0)
    test = {**train, "label": np.where(np.arange(30) == 0, 2, train["label"])}
    assert confusion_table(test, train, 4).tolist() == [[9, 0, 0, 0], [0, 10, 0, 0], [1, 0, 10, 0], [0, 0, 0, 0]]


def test_principal_plane_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    rows = predictions()["embedding"]
    plane, share = principal_plane(rows)
    pca = PCA(2).fit(rows.astype(np.float64))
    np.testing.assert_allclose(np.abs(plane), np.abs(pca.transform(rows.astype(np.float64))), atol=1e-9)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_, atol=1e-9)
    assert principal_plane(np.ones((1, 3), dtype=np.float32))[0].tolist() == [[0.0, 0.0]]


def test_report_holds_every_picture_and_is_the_same_again():
    given = {"test": predictions(seed=1), "train": predictions()}
    arguments = {"reference_split": "train", "class_names": ["A", "B<i>", "C"], "num_clusters": 4, "metrics": {"test/knn_accuracy": 0.5}}
    files = report(given, **arguments)
    assert sorted(files) == ["index.html", "test_clusters.png", "test_confusion.png", "test_dendrogram.png", "test_scatter.png"]
    page = files["index.html"].decode()
    assert page.count("data:image/png") == 4 and "0.5000" in page and "B&lt;i&gt;" in page and "http" not in page
    assert report(given, **arguments) == files
    assert all(files[name].startswith(b"\x89PNG") for name in files if name.endswith(".png"))


def test_report_of_one_shape_does_not_fail():
    assert len(report({"val": predictions(1), "train": predictions()}, reference_split="train", class_names=["A", "B", "C"], num_clusters=0, metrics={})) == 5
