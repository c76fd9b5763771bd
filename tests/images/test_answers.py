"""From files to predictions.csv: members of different inputs together, test-time versions, orders of ids; named runs; the report."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from cad_models.checkpoint import load_member, write_member
from cad_models.config import replace_all, value_at
from cad_models.images.answers import list_requests, member_probabilities, submission, tta_versions
from cad_models.images.data import squeezed
from cad_models.images.options import ImagesOptions
from cad_models.images.patterns import generate_picture
from cad_models.images.report import build_report
from cad_models.images.task import ImagesTask
from cad_models.task import Answer, Reject

TASK = ImagesTask()
NAMES = ["disc", "ring", "star"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "queries"
    folder.mkdir()
    for i in (2, 10, 1):
        Image.fromarray(generate_picture(i, 0)).save(folder / f"{i}.png")
    (folder / "b.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    return folder


def member(path, seed: int, names=NAMES, **changes):
    recipe = replace_all(TASK.smoke, {key.replace("__", "."): value for key, value in changes.items()})
    torch.manual_seed(seed)
    signature = {
        "class_names": list(names),
        "class_counts": [1] * len(names),
        "image_size": recipe.data.image_size,
        "stored_size": recipe.data.stored_size,
        "num_channels": recipe.model.num_channels,
        "dataset_digest": "d",
    }
    learner = TASK.learner(recipe, signature)
    write_member(path, task=TASK, recipe=recipe, signature=signature, metrics={}, artifacts=learner.artifacts())
    return load_member(path)


def answers(members, folder, *, rule="soft", options=None, top_k=3, fitted=None):
    requests = TASK.list_requests(str(folder), None, options=options)
    predictor = TASK.predictor(members, options=options)
    outputs, rejects = {}, []
    for i, given in enumerate(requests.inputs):
        columns = TASK.read_input(given, predictor.settings)
        if isinstance(columns, Reject):
            rejects.append((given.source, columns.reason))
        else:
            (outputs[i],) = predictor.predict([columns])
    found = TASK.rank(
        requests.searches[0], outputs, rule=rule, weights=[1.0] * len(members), top_k=top_k, fitted=fitted, signatures=[m.signature for m in members]
    )
    return found, rejects


def test_members_of_other_models_channels_and_sizes_answer_together(tmp_path, pictures):
    members = [
        member(tmp_path / "a", 0, model__name="simple_cnn"),
        member(tmp_path / "b", 1, model__name="simple_cnn_v2", data__stored_size=64, data__image_size=56),
        member(tmp_path / "c", 2, model__name="timm:test_resnet"),
        member(tmp_path / "d", 3, model__name="hog", data__image_size=32),
    ]
    found, rejects = answers(members, pictures)
    assert rejects == [("b.jpg", "bad_image")]
    assert {a.query for a in found} == {"1", "2", "10"} and all(sum(a.score for a in found if a.query == q) == pytest.approx(1) for q in ("1", "2", "10"))
    # By hand, for one picture.
    pixels = generate_picture(2, 0)
    rows = [member_probabilities(m, squeezed(pixels, m.signature["stored_size"])[None], tta="none", device="cpu")[0] for m in members]
    expected = dict(zip(NAMES, np.mean(rows, axis=0), strict=True))
    assert {a.answer: a.score for a in found if a.query == "2"} == pytest.approx(expected, abs=1e-6)
    assert [a.rank for a in found if a.query == "2"] == [1, 2, 3]


def test_tta_is_the_mean_over_versions_and_flip_answers_for_a_mirrored_picture_alike(tmp_path):
    own = member(tmp_path / "a", 0)
    pixels = squeezed(generate_picture(4, 0), 48)[None]
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    plain, flip, crops = (member_probabilities(own, pixels, tta=tta, device="cpu") for tta in ("none", "flip", "crops"))
    other = member_probabilities(own, mirrored, tta="none", device="cpu")
    np.testing.assert_allclose(flip, (plain + other) / 2, atol=1e-6)
    np.testing.assert_allclose(flip, member_probabilities(own, mirrored, tta="flip", device="cpu"), atol=1e-6)
    assert len(tta_versions(pixels, 40, "crops")) == 12 and not np.allclose(crops, flip)


def test_members_of_other_classes_are_refused(tmp_path):
    members = [member(tmp_path / "a", 0), member(tmp_path / "b", 1, names=["disc", "ring", "tower"])]
    with pytest.raises(ValueError, match="members 1 and 2 were trained on other classes .star, tower"):
        TASK.predictor(members)


def test_rule_with_fitted_state_changes_the_answers(tmp_path, pictures):
    members = [member(tmp_path / "a", 0)]
    found, _ = answers(members, pictures, rule="tuned", fitted={"log_factors": [0.0, 0.0, 50.0]}, top_k=1)
    assert [a.answer for a in found] == ["star"] * 3
    with pytest.raises(ValueError, match="--combine tuned needs what is fitted"):
        answers(members, pictures, rule="tuned")


def test_submission_orders_ids_by_number_or_as_listed():
    given = [Answer(direction="classify", query=q, rank=r, answer=a, score=s) for q in ("0", "10", "2", "b") for r, a, s in ((1, "x", 0.7), (2, "y", 0.3))]
    assert [row[0] for row in submission(given, ImagesOptions())] == ["id", "0", "2", "10", "b"]
    assert [row[0] for row in submission(given, ImagesOptions(order="file"))] == ["id", "0", "10", "2", "b"]
    assert submission(given, ImagesOptions())[:2] == [["id", "label"], ["0", "x"]]
    assert submission(given[:1], ImagesOptions(probabilities=True)) == [["id", "label", "p_x"], ["0", "x", "0.700000"]]


def test_requests_name_pictures_by_stem_and_by_path_where_needed(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.jpg", "b/2.png", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    requests = list_requests(str(tmp_path))
    assert [e.entry_id for e in requests.searches[0].queries] == ["3", "a/1", "b/1", "b/2.jpg", "b/2.png"]
    assert list_requests([str(tmp_path / "3.png")]).searches[0].queries[0].entry_id == "3"
    with pytest.raises(ValueError, match="--queries .*nowhere.*no such folder"):
        list_requests(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no gallery; leave the flag out"):
        TASK.list_requests(str(tmp_path), "gallery")
    with pytest.raises(ValueError, match="--direction 'x' is none of auto, classify"):
        list_requests(str(tmp_path), direction="x")


# --- named runs ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "model", "preset", "patience", "seeds"),
    [
        ("simple_cnn_seed_105", "simple_cnn", "baseline", 20, (105,)),
        ("ensemble_1", "simple_cnn", "ensemble_1", 15, (76, 100, 123)),
        ("ensemble_2", "simple_cnn", "ensemble_2", 50, (76, 100, 123)),
        ("ensemble_3", "simple_cnn", "ensemble_2", 50, (76, 100, 101, 102, 103, 123)),
        ("simple_cnn_v2", "simple_cnn_v2", "ensemble_2", 50, (100, 101, 102, 103, 104)),
    ],
)
def test_named_runs_have_the_published_hyper_parameters(name, model, preset, patience, seeds):
    run = TASK.runs[name]
    recipe = replace_all(TASK.recipe, run.changes)
    expected = {
        "model.name": model, "data.augment.preset": preset, "schedule.patience_evals": patience, "optim.lr": 1e-3, "batch_size": 64,
        "data.image_size": 128, "schedule.num_epochs": 300, "loss.class_weights": "none", "optim.weight_decay": 0.0, "schedule.min_lr_ratio": 1.0,
    }  # fmt: skip
    assert {path: value_at(recipe, path) for path in expected} == expected and run.seeds == seeds


# --- report -------------------------------------------------------------------------------------------------------------------------------
def test_report_has_pictures_tables_and_a_page_that_stands_alone():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 60)
    probabilities = rng.dirichlet((1, 1, 1), 60) * 0.5 + 0.5 * np.eye(3)[label]
    names = ["a", "<b>", "c"]
    predictions = {"val": {"probabilities": probabilities, "label": label}, "test": {"probabilities": probabilities[:1], "label": label[:1]}}
    files = build_report(predictions, names, {"val/macro_f1": 0.5})
    page = files["index.html"].decode()
    assert "&lt;b&gt;" in page and "<b>" not in page and "http" not in page and page.count("data:image/png;base64,") == 6
    table = list(csv.DictReader(io.StringIO(files["classes_val.csv"].decode())))
    answer = probabilities.argmax(1)
    assert float(table[1]["precision"]) == pytest.approx((label[answer == 1] == 1).mean(), abs=1e-3)
    assert sum(int(row["pictures"]) for row in table) == 60
    assert build_report(predictions, names, {}) == build_report(predictions, names, {})
    for name in ("confusion_val.png", "roc_val.png", "calibration_test.png"):
        assert np.asarray(Image.open(io.BytesIO(files[name]))).std() > 5
