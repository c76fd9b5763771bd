"""Sources, duplicates, stored columns, features and batches."""

import dataclasses

import numpy as np
import pytest

from cad_models.common.stl_writer import binary_stl
from cad_models.config import replace_all
from cad_models.dataset import DatasetError, build_table
from cad_models.histograms.data import duplicates, equal_histograms, inspect_item, list_source, prepare_item, schemas
from cad_models.histograms.features import DISTRIBUTION_SHAPE, HISTOGRAM_SHAPE, feature_width, features, stored_histograms
from cad_models.histograms.primitives import CLASSES, generate_shape, write_shapes
from cad_models.histograms.published import write_json
from cad_models.histograms.recipe import SMOKE, HistogramData
from cad_models.histograms.shape_histograms import KINDS
from cad_models.task import Inspection, Reject
from tests.histograms.test_published import some_histograms
from tests.shared import shared_path


def stl(index, seed=0):
    shape = generate_shape(index, seed)
    return binary_stl(shape.vertices, shape.faces)


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def test_generated_sources_name_classes_and_seed():
    items = list_source("builtin:6:seed=4").items
    assert [i.label for i in items] == ["Cone", "Cube", "Cylinder", "Sphere", "Torus", "Cone"]
    assert {i.label for i in list_source("builtin:8:classes=all").items} == set(CLASSES)
    for wrong in ("builtin:0", "builtin:x", "builtin:5:classes=many"):
        with pytest.raises(ValueError, match="builtin:600|classes are source"):
            list_source(wrong)


def test_folder_per_class_gives_labels_and_files_outside_are_named(tmp_path):
    for name in ("Cube/a.stl", "Cone/deep/b.stl", "loose.stl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(stl(0))
    (tmp_path / "notes.md").write_text("x")
    listing = list_source(str(tmp_path))
    assert [(i.object_id, i.label) for i in listing.items] == [("a", "Cube"), ("b", "Cone")]
    assert [(name, r.reason) for name, r in listing.rejects] == [("loose.stl", "no_label")]


def test_table_beside_models_decides_over_folders(tmp_path):
    (tmp_path / "models").mkdir()
    for name in "abc":
        (tmp_path / "models" / f"{name}.stl").write_bytes(stl(0))
    (tmp_path / "classes.tsv").write_text("a\tTorus.011\nb\tCube\nelsewhere\tCone\n")
    listing = list_source(str(tmp_path))
    assert [(i.object_id, i.label) for i in listing.items] == [("a", "Torus"), ("b", "Cube")]
    assert [(name, r.reason) for name, r in listing.rejects] == [("models/c.stl", "no_label")]


def test_written_shapes_are_listed_with_their_classes(tmp_path):
    write_shapes(tmp_path, 10, 0)
    assert [i.label for i in list_source(str(tmp_path)).items] == [i.label for i in list_source("builtin:10").items]


def test_published_layout_lists_every_histogram_with_its_class():
    listing = list_source(str(shared_path("data/shape_histograms")))
    assert len(listing.items) == 356 and listing.rejects == [] and {i.label for i in listing.items} == {"Cone", "Cube", "Cylinder", "Sphere", "Torus"}


def test_tables_alone_are_a_source(tmp_path):
    for name in ("train.tsv", "valid.tsv", "train.csv"):
        (tmp_path / name).write_bytes(shared_path(f"data/shape_histograms/{name}").read_bytes())
    items = list_source(str(tmp_path)).items
    assert len(items) == 356
    row = prepare_item(items[0], SMOKE)
    stored = row.objects["histograms"]
    assert np.isfinite(stored[0, :, 24:56]).all() and np.isnan(stored[1]).all() and np.isnan(stored[0, :, :24]).all()


def test_source_without_shapes_or_without_a_folder_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no mesh"):
        list_source(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        list_source(str(tmp_path / "gone"))


def test_contradicting_tables_are_reported(tmp_path):
    (tmp_path / "a.json").write_bytes(write_json("a", some_histograms()))
    (tmp_path / "one.tsv").write_text("a\tCube\n")
    (tmp_path / "two.tsv").write_text("a\tCone\n")
    listing = list_source(str(tmp_path))
    assert [i.label for i in listing.items] == ["Cube"] and [r.reason for _, r in listing.rejects] == ["bad_row"]


# --- one object ---------------------------------------------------------------------------------------------------------------------------
def test_broken_files_become_rejects(tmp_path):
    (tmp_path / "Cube").mkdir()
    (tmp_path / "Cube" / "bad.stl").write_bytes(b"nonsense")
    (item,) = list_source(str(tmp_path)).items
    assert isinstance(inspect_item(item), Reject) and prepare_item(item, SMOKE).reason == "not_a_mesh"
    gone = dataclasses.replace(item, uri=str(tmp_path / "gone.stl"))
    assert inspect_item(gone).reason == "unreadable"
    (tmp_path / "x.json").write_text("{}")
    broken = dataclasses.replace(item, uri=str(tmp_path / "x.json"))
    assert prepare_item(broken, SMOKE).reason == "malformed"


def test_prepared_rows_fit_the_schema_and_json_of_a_mesh_gives_its_histograms(tmp_path):
    (item,) = list_source("builtin:1").items
    row = prepare_item(item, SMOKE)
    assert build_table(schemas()["objects"], [row.objects]).num_rows == 1
    assert row.objects["histograms"].shape == HISTOGRAM_SHAPE and row.objects["distributions"].shape == DISTRIBUTION_SHAPE
    assert np.isfinite(row.objects["histograms"]).all() and np.isfinite(row.objects["distributions"]).all()


# --- duplicates ---------------------------------------------------------------------------------------------------------------------------
def test_published_twins_are_found_and_never_cross_classes():
    items = list_source(str(shared_path("data/shape_histograms"))).items
    first = duplicates([inspect_item(item) for item in items])
    assert len(set(first)) == 260
    assert all(items[i].label == items[f].label for i, f in enumerate(first))


def test_equal_histograms_agree_with_comparing_all_pairs():
    rng = np.random.default_rng(0)
    values = rng.dirichlet(np.ones(16), 60)
    values[30] = values[3] + 4e-6
    values[45] = values[3]
    values[50] = values[7] + 3e-5
    slow = [next(j for j in range(i + 1) if np.abs(values[i] - values[j]).max() <= 1e-5) for i in range(60)]
    assert equal_histograms(values) == slow and slow[30] == slow[45] == 3 and slow[50] == 50


def test_meshes_and_histograms_are_never_each_others_duplicates():
    def inspection(size):
        return Inspection(sha256="", size=size, complexity=1.0, signature=np.zeros(145))

    assert duplicates([inspection(0), inspection(4), inspection(0)])[0:3:2] == [0, 0]
    assert duplicates([inspection(0), inspection(4), inspection(0)])[1] == 1


# --- features -----------------------------------------------------------------------------------------------------------------------------
def stored(n=3):
    rows = [some_histograms(i) for i in range(n)]
    distributions = np.random.default_rng(0).dirichlet(np.ones(64), (n, 2, 3)).astype(np.float32)
    return rows, np.stack([stored_histograms(r) for r in rows]), distributions


def test_features_take_the_named_histograms_in_order():
    rows, histograms, distributions = stored()
    data = HistogramData(inputs=("hull", "model"), bins=16, encoding="raw")
    found = features(histograms, distributions, data)
    expected = [np.concatenate([row[part, kind, 16] for part in ("hull", "model") for kind in KINDS]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32 and found.shape[1] == feature_width(data) == 128
    affine = features(histograms, distributions, HistogramData(inputs=("affine",), encoding="raw"))
    np.testing.assert_array_equal(affine, distributions[:, 1].reshape(3, -1))


def test_encodings_are_roots_and_running_sums():
    rows, histograms, distributions = stored()
    root = features(histograms, distributions, HistogramData(inputs=("model",), bins=8))
    np.testing.assert_allclose(root[:, :8], np.sqrt([row["model", "strict_outer", 8] for row in rows]), rtol=1e-6)
    both = HistogramData(inputs=("model",), bins=8, encoding="sqrt+cumulative")
    found = features(histograms, distributions, both)
    assert found.shape[1] == feature_width(both) == 64
    np.testing.assert_allclose(found[:, 40:48], np.cumsum([row["model", "strict_outer_absolute", 8] for row in rows], axis=1), rtol=1e-5)


def test_missing_inputs_say_what_to_use_instead():
    _, histograms, distributions = stored()
    with pytest.raises(DatasetError, match="--data.inputs model hull"):
        features(histograms, np.full_like(distributions, np.nan), HistogramData(inputs=("affine",)))
    histograms[1, 1] = np.nan
    with pytest.raises(DatasetError, match="no hull histograms with 32 bins"):
        features(histograms, distributions, HistogramData(inputs=("hull",)))


def test_recipes_that_cannot_be_meant_are_refused_in_the_flags_words():
    for changes, message in (
        ({"data.inputs": []}, "--data.inputs"),
        ({"data.inputs": ["model", "model"]}, "each input once"),
        ({"data.bins": 33}, "33"),
        ({"model.dropout": 1.0}, "--model.dropout"),
        ({"loss.kind": "supcon", "loss.mixup": 0.2}, "--loss.mixup"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_all(SMOKE, changes)


# --- export -------------------------------------------------------------------------------------------------------------------------------
def test_exported_dataset_is_a_source_with_the_same_histograms(tmp_path):
    import pyarrow as pa

    from cad_models.dataset import DatasetFolder, Manifest
    from cad_models.histograms.data import read_shape
    from cad_models.histograms.export_json import export

    dataset = DatasetFolder(str(tmp_path / "ds"))
    _, histograms, distributions = stored()
    histograms[1, 1] = np.nan  # an object of a table: no hull
    schema = pa.schema([("object_id", pa.string()), ("label", pa.string()), *schemas()["objects"]])
    rows = [
        {"object_id": name, "label": label, "histograms": h, "distributions": d}
        for name, label, h, d in zip(("a", "Cube/b", "c"), ("Cone", "Cube", "Torus"), histograms, distributions, strict=True)
    ]
    dataset.write_part("objects", 0, build_table(schema, rows), key="k")
    manifest = {"settings": {}, "settings_digest": "s", "num_objects": 3, "num_groups": 3, "num_quarantined": 0, "num_ignored": 0, "splits": {"train": 3}}
    dataset.write_manifest(Manifest(task="histograms", parts=[{"name": "part-00000.parquet"}], **manifest))
    assert export(dataset, tmp_path / "json") == 3
    items = list_source(str(tmp_path / "json")).items
    assert [(i.object_id, i.label) for i in items] == [("Cube_b", "Cube"), ("a", "Cone"), ("c", "Torus")]
    for item, row in zip(items, (1, 0, 2), strict=True):
        np.testing.assert_array_equal(stored_histograms(read_shape(item.uri)[0]), histograms[row])
    dataset.write_manifest(Manifest(task="alignment", parts=[], **manifest))
    with pytest.raises(DatasetError, match="--task alignment"):
        export(dataset, tmp_path / "json")
