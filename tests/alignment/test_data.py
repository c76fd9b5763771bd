"""The alignment task's data: what a source lists, what an object becomes, what a batch holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_models.alignment.data import cad_points, collate, examples, group_number, inspect_item, list_source, prepare_item, schemas
from cad_models.alignment.recipe import SMOKE
from cad_models.common.meshes import Mesh
from cad_models.config import replace_all
from cad_models.dataset import REASONS, DatasetError, build_table
from cad_models.order import object_rng
from cad_models.task import Inspection, RawItem, Reject, Row
from cad_models.tasks import TASKS

RECIPE = replace_all(
    SMOKE, {"data.num_points": 64, "data.num_views": 3, "data.num_query_views": 2, "data.image_size": 32, "model.num_points": 32}
)
CUBE_VERTICES = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
CUBE_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
)


def write_off(path: Path, scale=(1.0, 2.0, 3.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["OFF", f"{len(CUBE_VERTICES)} {len(CUBE_FACES)} 0"]
    lines += [" ".join(map(str, v)) for v in CUBE_VERTICES * scale] + ["3 " + " ".join(map(str, f)) for f in CUBE_FACES]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_image(path: Path, grey: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    image[4:12, 4:12] = grey
    Image.fromarray(image).save(path)
    return path


def write_pairs(root: Path, views: dict[str, int], *, padded: bool = False) -> Path:
    for name, count in views.items():
        write_off(root / f"models/{name}.off")
        for view in range(count):
            write_image(root / (f"images/{name}_{view:03d}.png" if padded else f"images/{name}_{view}.png"), grey=view * 5)
    return root


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def test_folder_is_listed_recursively_by_relative_names(tmp_path):
    for name in ("a.off", "bolts/m3.off", "bolts/deep/m4.OFF", ".hidden/x.off", "bolts/.x.off"):
        write_off(tmp_path / name)
    (tmp_path / "readme.txt").write_text("no mesh")
    listing = list_source(str(tmp_path))
    assert [(i.object_id, i.source, i.label) for i in listing.items] == [
        ("a", "a.off", ""),
        ("bolts/deep/m4", "bolts/deep/m4.OFF", "bolts"),
        ("bolts/m3", "bolts/m3.off", "bolts"),
    ]
    assert listing.num_ignored == 1 and listing.rejects == [] and Path(listing.items[0].uri) == tmp_path / "a.off"


def test_files_that_differ_in_the_suffix_only_keep_it(tmp_path):
    for name in ("a.off", "a.obj", "b.off", "d/a.off"):
        write_off(tmp_path / name)
    assert [i.object_id for i in list_source(str(tmp_path)).items] == ["a.obj", "a.off", "b", "d/a"]


def test_builtin_sources_are_numbered_and_seeded():
    items = list_source("builtin:3:seed=7").items
    assert [i.object_id for i in items] == ["part-000000", "part-000001", "part-000002"]
    assert [i.uri for i in items] == ["builtin:0:7", "builtin:1:7", "builtin:2:7"]
    assert list_source("builtin:1").items[0].uri == "builtin:0:0"


@pytest.mark.parametrize("source", ["builtin:", "builtin:0", "builtin:-1", "builtin:ten", "builtin:5:seed=x", "builtin:5,seed=1"])
def test_builtin_that_is_misspelt_is_refused_with_an_example(source):
    with pytest.raises(ValueError, match="builtin:600"):
        list_source(source)


def test_source_that_is_not_there_or_empty_or_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        list_source(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="holds no mesh"):
        list_source(str(tmp_path))
    with pytest.raises(ValueError, match="not a folder|holds no mesh"):
        list_source(str(write_off(tmp_path / "x/a.off")))


@pytest.mark.parametrize("padded", [False, True])
def test_models_and_images_are_paired_with_24_and_26_views_in_numeric_order(tmp_path, padded):
    write_pairs(tmp_path, {"bolt": 24, "m3_nut": 26, "plate": 1}, padded=padded)
    (tmp_path / "captions.json").write_text(json.dumps({"bolt": "a bolt", "unknown": "x"}))
    listing = list_source(str(tmp_path))
    assert [(i.object_id, len(i.images), i.caption) for i in listing.items] == [
        ("bolt", 24, "a bolt"),
        ("m3_nut", 26, ""),
        ("plate", 1, ""),
    ]
    numbers = [int(Path(p).stem.rpartition("_")[2]) for p in listing.items[1].images]
    assert numbers == list(range(26))
    assert listing.rejects == [] and listing.num_ignored == 0


def test_images_without_model_and_models_without_image_are_rejected_and_the_rest_stays(tmp_path):
    write_pairs(tmp_path, {"bolt": 2})
    write_off(tmp_path / "models/lonely.off")
    for name in ("stray_0.png", "bolt.png", "bolt_front.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images/notes.txt").write_text("x")
    listing = list_source(str(tmp_path))
    assert [i.object_id for i in listing.items] == ["bolt"] and len(listing.items[0].images) == 2
    assert {name: reject.reason for name, reject in listing.rejects} == {
        "images/stray_0.png": "no_model",
        "images/bolt.png": "no_model",
        "images/bolt_front.png": "no_model",
        "models/lonely.off": "no_views",
    }
    assert listing.num_ignored == 1


def test_captions_of_another_form_are_refused_naming_the_file(tmp_path):
    write_pairs(tmp_path, {"bolt": 1})
    (tmp_path / "captions.json").write_text("[1]")
    with pytest.raises(DatasetError, match="captions.json must hold one JSON object"):
        list_source(str(tmp_path))


# --- one object ---------------------------------------------------------------------------------------------------------------------------
def test_prepared_object_has_the_columns_of_its_schema_and_the_facts_of_its_mesh(tmp_path):
    item = list_source(str(write_off(tmp_path / "box.off").parent)).items[0]
    row = prepare_item(item, RECIPE)
    assert isinstance(row, Row) and row.rejects == []
    kinds = schemas(RECIPE)
    assert set(kinds["objects"].names) <= row.objects.keys() and set(kinds["views"].names) == row.views.keys()
    build_table(kinds["objects"], [row.objects]), build_table(kinds["views"], [row.views])
    facts = row.objects
    assert (facts["num_faces"], facts["num_vertices"], facts["num_bodies"], facts["watertight"]) == (12, 8, 1, True)
    assert facts["volume"] == pytest.approx(6) and facts["area"] == pytest.approx(22)
    assert sorted([facts["extent_x"], facts["extent_y"], facts["extent_z"]]) == pytest.approx([1, 2, 3])
    assert facts["points"].shape == facts["normals"].shape == (64, 3) and facts["points"].dtype == np.float32
    assert np.linalg.norm(facts["points"], axis=1).max() <= 1 + 1e-6
    np.testing.assert_allclose(np.linalg.norm(facts["normals"], axis=1), 1, atol=1e-5)
    assert len(row.views["images"]) == facts["num_views"] == 3 and len(row.views["query_images"]) == facts["num_query_views"] == 2
    assert not {json.dumps(c) for c in json.loads(row.views["query_cameras"])} & {json.dumps(c) for c in json.loads(row.views["cameras"])}


def test_preparing_twice_and_under_another_name_gives_the_same_bytes(tmp_path):
    a, b = write_off(tmp_path / "a.off"), write_off(tmp_path / "sub/b.off")
    rows = [prepare_item(RawItem(object_id="x", source="x", uri=str(path)), RECIPE) for path in (a, a, b)]
    for row in rows[1:]:
        np.testing.assert_array_equal(row.objects["points"], rows[0].objects["points"])
        assert row.views == rows[0].views


def test_first_points_are_spread_over_the_whole_object():
    points, normals = cad_points(Mesh(vertices=CUBE_VERTICES, faces=CUBE_FACES.astype(np.int32), warnings=()), "ab" * 32, 256)
    assert points.dtype == np.float32 and normals.shape == (256, 3)
    # In farthest-point order: the first eight are further apart than any eight in sampling order would be.
    distance = np.linalg.norm(points[:8, None] - points[None, :8], axis=2) + 9 * np.eye(8)
    assert distance.min() > 0.5


@pytest.mark.parametrize("count, num_train, num_query", [(24, 22, 2), (26, 24, 2), (5, 4, 1), (4, 3, 1)])
def test_given_views_hold_out_the_last_for_queries(tmp_path, count, num_train, num_query):
    item = list_source(str(write_pairs(tmp_path, {"bolt": count}))).items[0]
    row = prepare_item(item, RECIPE)
    assert (len(row.views["images"]), len(row.views["query_images"])) == (num_train, num_query)
    assert row.views["images"] + row.views["query_images"] == [Path(p).read_bytes() for p in item.images]


def test_few_given_views_serve_as_queries_too(tmp_path):
    row = prepare_item(list_source(str(write_pairs(tmp_path, {"bolt": 3}))).items[0], RECIPE)
    assert row.views["images"] == row.views["query_images"] and len(row.views["images"]) == 3


def test_broken_given_view_is_rejected_alone_and_all_broken_reject_the_object(tmp_path):
    item = list_source(str(write_pairs(tmp_path, {"bolt": 9}))).items[0]
    Path(item.images[4]).write_bytes(b"no picture")
    row = prepare_item(item, RECIPE)
    assert [(name, reject.reason) for name, reject in row.rejects] == [("images/bolt_4.png", "bad_image")]
    assert row.objects["num_views"] + row.objects["num_query_views"] == 8
    for path in item.images:
        Path(path).write_bytes(b"")
    assert prepare_item(item, RECIPE).reason == "no_views"


def test_broken_or_missing_mesh_is_rejected_with_a_reason(tmp_path):
    (tmp_path / "bad.off").write_text("OFF\n3 1 0\n0 0 0\n")
    item = RawItem(object_id="bad", source="bad.off", uri=str(tmp_path / "bad.off"))
    for found in (inspect_item(item), prepare_item(item, RECIPE)):
        assert isinstance(found, Reject) and found.reason in REASONS
    gone = RawItem(object_id="gone", source="gone.off", uri=str(tmp_path / "gone.off"))
    assert inspect_item(gone).reason == prepare_item(gone, RECIPE).reason == "unreadable"


def test_inspection_finds_scaled_duplicates_and_changed_images(tmp_path):
    sources = [
        write_off(tmp_path / "a.off"),
        write_off(tmp_path / "b.off", (2.0, 4.0, 6.0)),
        write_off(tmp_path / "c.off", (1.0, 2.0, 3.5)),
    ]
    found = [inspect_item(RawItem(object_id=p.stem, source=p.name, uri=str(p))) for p in sources]
    assert all(isinstance(i, Inspection) and (i.size, i.complexity) == (12, 96.0) for i in found)
    assert TASKS["alignment"].duplicates(found) == [0, 0, 2]
    pairs = list_source(str(write_pairs(tmp_path / "pairs", {"bolt": 2}))).items[0]
    before = inspect_item(pairs).inputs
    assert before == inspect_item(pairs).inputs != ""
    write_image(Path(pairs.images[1]), grey=200)
    assert inspect_item(pairs).inputs != before


# --- batches ------------------------------------------------------------------------------------------------------------------------------
def columns_of(counts, *, width=5, num_points=40, channels=6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(counts))
    points = rng.normal(size=(len(counts), num_points, channels)).astype(np.float32)
    points[..., 3:] /= np.linalg.norm(points[..., 3:], axis=2, keepdims=True)
    views = np.zeros((len(counts), max(counts), width), dtype=np.float16)
    for row, count in zip(views, counts, strict=True):
        row[:count] = rng.normal(size=(count, width))
    return {
        "points": points,
        "views": views,
        "num_views": np.array(counts),
        "query_views": views[:, :2],
        "num_query_views": np.minimum(counts, 2),
        "group": np.arange(len(counts)),
        "label": np.zeros(len(counts), dtype=np.int64),
    }


def rngs(*keys: int, epoch: int = 0) -> list[np.random.Generator]:
    return [object_rng(0, epoch, key) for key in keys]


def test_training_batch_masks_the_padding_of_objects_with_fewer_views():
    batch = collate(columns_of([24, 26, 1]), RECIPE, rngs=rngs(0, 1, 2))
    assert batch["view_mask"].sum(1).tolist() == [24, 26, 1] and batch["view_mask"].shape == (3, 26)
    assert not batch["views"][~batch["view_mask"]].any() and batch["views"].dtype.is_floating_point
    assert str(batch["views"].dtype) == str(batch["points"].dtype) == "torch.float32" and str(batch["group"].dtype) == "torch.int64"
    assert set(batch) == {"points", "group", "views", "view_mask"}


def test_evaluation_batch_is_the_stored_points_and_the_query_views():
    columns = columns_of([3, 1])
    batch = collate(columns, RECIPE, rngs=None)
    np.testing.assert_array_equal(batch["points"].numpy(), columns["points"])
    np.testing.assert_array_equal(batch["query_views"].numpy(), columns["query_views"].astype(np.float32))
    assert batch["query_mask"].tolist() == [[True, True], [True, False]]
    assert set(batch) == {"points", "group", "label", "views", "view_mask", "query_views", "query_mask"}


def test_batch_does_not_share_memory_with_the_cache():
    columns = columns_of([2, 2])
    before = {name: column.copy() for name, column in columns.items()}
    for generators in (None, rngs(0, 1)):
        batch = collate(columns, RECIPE, rngs=generators)
        for tensor in batch.values():
            tensor.zero_()
    for name in columns:
        np.testing.assert_array_equal(columns[name], before[name])


def test_views_drawn_for_a_step_are_different_views_of_the_object():
    recipe = replace_all(RECIPE, {"data.views_per_step": 4})
    columns = columns_of([9, 4, 2])
    batch = collate(columns, recipe, rngs=rngs(0, 1, 2))
    assert batch["view_mask"].sum(1).tolist() == [4, 4, 2]
    for i, count in enumerate((9, 4, 2)):
        drawn = batch["views"][i][batch["view_mask"][i]].numpy()
        own = columns["views"][i, :count].astype(np.float32)
        which = [int(np.flatnonzero((own == row).all(1))[0]) for row in drawn]
        assert len(set(which)) == len(which)
    other = collate(columns, recipe, rngs=rngs(0, 1, 2, epoch=1))
    assert not np.array_equal(other["views"][0].numpy(), batch["views"][0].numpy())


@pytest.mark.parametrize("views_per_step", [0, 3])
def test_augmentation_of_an_object_does_not_depend_on_its_neighbours(views_per_step):
    recipe = replace_all(RECIPE, {"data.views_per_step": views_per_step, "data.augment.max_rotation_deg": 20.0})
    columns = columns_of([5, 5, 5, 5])
    whole = collate(columns, recipe, rngs=rngs(7, 8, 9, 10))
    half = collate({name: column[2:] for name, column in columns.items()}, recipe, rngs=rngs(9, 10))
    for name in half:
        np.testing.assert_array_equal(half[name].numpy(), whole[name][2:].numpy())


def test_augmented_normals_stay_perpendicular_to_the_surface():
    """Points on random planes, their tangents measured between augmented points."""
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(6, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    tangents = np.stack([np.cross(normals, rng.normal(size=3)) for _ in range(10)], axis=1)
    columns = columns_of([1] * 6, num_points=11)
    columns["points"][:, 0, :3], columns["points"][:, 1:, :3] = 0, tangents
    columns["points"][..., 3:] = normals[:, None]
    recipe = replace_all(RECIPE, {"data.augment.max_scale": 3.0, "data.augment.max_rotation_deg": 90.0})
    points = collate(columns, recipe, rngs=rngs(*range(6)))["points"].numpy().astype(np.float64)
    moved = points[:, 1:, :3] - points[:, :1, :3]
    cosine = (moved * points[:, 1:, 3:]).sum(-1) / np.linalg.norm(moved, axis=-1)
    assert np.abs(cosine).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(points[..., 3:], axis=2), 1, atol=1e-5)
    assert np.abs(points[..., 3:] - columns["points"][..., 3:]).max() > 0.1


def test_augmentation_stays_within_its_bounds_and_off_changes_nothing():
    columns = columns_of([1] * 50, num_points=2, channels=3)
    columns["points"][:, 0], columns["points"][:, 1] = 0, 1
    recipe = replace_all(RECIPE, {"data.augment.max_scale": 1.5, "data.augment.max_shift": 0.2})
    points = collate(columns, recipe, rngs=rngs(*range(50)))["points"].numpy()
    scale = points[:, 1] - points[:, 0]
    assert np.abs(points[:, 0]).max() <= 0.2 + 1e-6 and scale.min() >= 1 / 1.5 - 1e-6 and scale.max() <= 1.5 + 1e-6
    assert scale.max() > 1.3 and scale.min() < 0.75 and np.abs(points[:, 0]).max() > 0.15
    off = replace_all(RECIPE, {"data.augment.max_scale": 1.0, "data.augment.max_shift": 0.0})
    np.testing.assert_allclose(collate(columns, off, rngs=rngs(*range(50)))["points"].numpy(), columns["points"], atol=1e-7)


def test_group_numbers_are_the_same_on_every_machine():
    # The first 8 bytes of BLAKE2b("bolt") as a signed big-endian number: another value would part caches from checkpoints.
    assert group_number("bolt") != group_number("nut") and -(2**63) <= group_number("bolt") < 2**63
    assert group_number("") == int.from_bytes(bytes.fromhex("e4a6a0577479b2b4"), "big", signed=True)


def test_examples_without_normals_have_three_channels(tmp_path):
    from tests.synthetic import make_dataset

    folder = make_dataset(str(tmp_path / "ds"), 5, recipe=RECIPE)
    tables = {"objects": folder.read_part("objects", 0), "embeddings": folder.read_part("embeddings/hog", 0)}
    with_normals, without = examples(tables, RECIPE), examples(tables, replace_all(RECIPE, {"model.channels": "xyz"}))
    assert with_normals["points"].shape[1:] == with_normals["normals"].shape[1:] == (32, 3) and "normals" not in without
    np.testing.assert_array_equal(collate(without, RECIPE, rngs=None)["points"].numpy(), with_normals["points"])
    joined = np.concatenate([with_normals["points"], with_normals["normals"]], axis=2)
    np.testing.assert_array_equal(collate(with_normals, RECIPE, rngs=None)["points"].numpy(), joined)
