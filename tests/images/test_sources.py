"""Sources of labelled pictures: folders, tables with and without header, zips; every picture and row is used or told of."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_models.config import replace_all
from cad_models.images.data import inspect_item, prepare_item
from cad_models.images.patterns import CLASSES, class_of, generate_picture
from cad_models.images.recipe import SMOKE
from cad_models.images.sources import list_source, parse_table, read_uri
from cad_models.images.task import ImagesTask
from cad_models.task import RawItem, Reject
from tests.shared import shared_path


def picture(seed: int = 0, size: tuple[int, int] = (12, 10)) -> bytes:
    rng = np.random.default_rng(seed)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(sink, format="PNG")
    return sink.getvalue()


def write(folder: Path, **files: bytes | str) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def labels(listing) -> dict[str, str]:
    return {item.object_id: item.label for item in listing.items}


def reasons(listing) -> dict[str, str]:
    return {source: reject.reason for source, reject in listing.rejects}


# --- folders ------------------------------------------------------------------------------------------------------------------------------
def test_folder_per_class_names_the_class_and_tells_of_the_rest(tmp_path):
    write(tmp_path, **{"cat/a.png": b"x", "cat/sub/b.jpg": b"x", "dog/a.png": b"x", "dog/a.jpg": b"x", "loose.png": b"x", "notes.txt": b"x", ".h/c.png": b"x"})
    listing = list_source(str(tmp_path))
    assert labels(listing) == {"cat/a": "cat", "cat/sub/b": "cat", "dog/a.png": "dog", "dog/a.jpg": "dog"}
    assert reasons(listing) == {"loose.png": "no_label"} and listing.num_ignored == 1


def test_top_folder_of_a_zip_is_no_class(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("set/train/cat/1.png", "set/train/dog/2.png", "__MACOSX/set/._1.png"):
            archive.writestr(name, picture())
    listing = list_source(str(path))
    assert sorted(labels(listing).values()) == ["cat", "dog"]
    assert read_uri(listing.items[0].uri) == picture()
    with pytest.raises(OSError, match="nowhere.png cannot be read"):
        read_uri(f"{path}!/nowhere.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no such folder"), ("nowhere.zip", "no such zip"), ("builtin:0", "builtin:<number"), ("builtin:x", "builtin:<number"), ("", "holds no picture")],
)
def test_wrong_source_is_told(tmp_path, source, message):
    with pytest.raises(ValueError, match=f"--source .*{message}"):
        list_source(source if source.startswith("builtin") else str(tmp_path / source))


def test_pictures_without_any_class_are_an_error_with_the_remedy(tmp_path):
    write(tmp_path, **{"a.png": b"x", "b.png": b"x", "c.csv": "id,label\n7,x\n"})
    with pytest.raises(ValueError, match="folder per class, or a CSV.*c.csv: none of its columns names a picture"):
        list_source(str(tmp_path))


# --- tables -------------------------------------------------------------------------------------------------------------------------------
def test_first_row_without_header_is_not_lost(tmp_path):
    count = 500
    rows = "".join(f"{i},{i % 2}\n" for i in range(count))
    write(tmp_path, **{"train_solution.csv": rows, **{f"train_images/{i}.jpg": b"x" for i in range(count)}})
    listing = list_source(str(tmp_path))
    assert len(listing.items) == count and labels(listing)["0"] == "0" and listing.rejects == []


def test_table_of_the_train_folder_leaves_the_test_folder_alone(tmp_path):
    write(tmp_path, **{"train_solution.csv": "0,0\n1,1\n", **{f"{kind}_images/{i}.jpg": b"x" for kind in ("test", "train") for i in range(2)}})
    listing = list_source(str(tmp_path))
    assert {item.source for item in listing.items} == {"train_images/0.jpg", "train_images/1.jpg"}
    assert listing.rejects == [] and listing.num_ignored == 2


@pytest.mark.parametrize(
    ("text", "has_header", "expected"),
    [
        ("0,x\n1,y\n", False, [("0", "x"), ("1", "y")]),
        ("id,label\n0,x\n1,y\n", True, [("0", "x"), ("1", "y")]),
        ("9,x\n0,y\n1,y\n", False, [("9", "x"), ("0", "y"), ("1", "y")]),  # the first row's picture is missing
        ("picture;kind\n0;x\n1;y\n", True, [("0", "x"), ("1", "y")]),
        ("label\timage\nx\ta/1.jpg\ny\t0.jpg\n", True, [("a/1.jpg", "x"), ("0.jpg", "y")]),
        ("\ufeffpath,size,class\n./a/1.jpg,3,x\n", True, [("./a/1.jpg", "x")]),
        ('0,"x, or y"\n1,z\n', False, [("0", "x, or y"), ("1", "z")]),
        ("0,x\n", False, [("0", "x")]),
        ("\n0,x\n\n1,y\n\n", False, [("0", "x"), ("1", "y")]),
    ],
)
def test_header_and_columns_are_found(text, has_header, expected):
    table = parse_table(text.removeprefix("\ufeff"), ["0.jpg", "a/1.jpg"], name="t.csv")
    assert table.has_header is has_header and [(i, label) for _, i, label in table.rows] == expected


def test_label_column_that_is_not_clear_is_asked_for():
    with pytest.raises(ValueError, match="t.csv: which column holds the labels.*id, colour, shape"):
        parse_table("id,colour,shape\n0,red,disc\n", ["0.jpg"], name="t.csv")


def test_missing_pictures_rows_and_labels_are_told_with_their_line(tmp_path):
    table = "id,label\n0,a\n1,b\n7,a\n2,\n,b\n3,a\n3,b\n4,a\n4,a\n"
    write(tmp_path, **{"t.csv": table, **{f"{i}.png": b"x" for i in (0, 1, 2, 3, 4, 5)}})
    listing = list_source(str(tmp_path))
    assert [item.object_id for item in listing.items] == ["0", "1", "4", "4"]  # equal rows: prepare keeps one and tells of the other
    found = reasons(listing)
    assert found == {"t.csv:4": "no_image", "2.png": "no_label", "t.csv:6": "bad_row", "3.png": "bad_row", "5.png": "no_label"}
    assert sum(reject.reason == "bad_row" for _, reject in listing.rejects) == 3
    assert "line 4" in dict(listing.rejects)["t.csv:4"].detail


def test_two_tables_have_to_be_chosen_between(tmp_path):
    write(tmp_path, **{"a.csv": "0,x\n", "b.csv": "0,y\n", "0.png": b"x"})
    with pytest.raises(ValueError, match="2 CSV files.*--source .*a.csv or --source .*b.csv"):
        list_source(str(tmp_path))
    assert labels(list_source(str(tmp_path / "b.csv"))) == {"0": "y"}


def test_real_pictures_are_listed_by_folder_and_by_table_alike():
    root = shared_path("data/pose_images")
    by_table = list_source(str(root / "labels.csv"))
    assert len(by_table.items) == 298 and by_table.rejects == []
    assert {i.source: i.label for i in by_table.items} == {i.source: i.source.split("/")[0] for i in by_table.items}


# --- one picture --------------------------------------------------------------------------------------------------------------------------
def item(tmp_path: Path, data: bytes, name: str = "p.png", label: str = "x") -> RawItem:
    write(tmp_path, **{name: data})
    return RawItem(object_id=name, source=name, uri=str(tmp_path / name), label=label)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1", "CMYK"])
def test_every_kind_of_picture_is_prepared(tmp_path, mode):
    sink = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(sink, format="PNG")
    else:
        Image.new("RGB", (8, 8), (200, 10, 10)).convert(mode).save(sink, format="TIFF" if mode == "CMYK" else "PNG")
    row = prepare_item(item(tmp_path, sink.getvalue()), SMOKE)
    assert row.objects["pixels"].shape == (48, 48, 3) and row.objects["label"] == "x"


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :10] = 255  # left half white
    sink, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise: the left becomes the top
    Image.fromarray(pixels).save(sink, format="PNG", exif=exif)
    row = prepare_item(item(tmp_path, sink.getvalue()), SMOKE)
    assert (row.objects["width"], row.objects["height"]) == (10, 20)
    assert row.objects["pixels"][:16].min() > 200 and row.objects["pixels"][-16:].max() < 50


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty_file"), (b"text", "not_an_image"), (picture()[:60], "_image"), (picture(size=(9, 2)), "unsupported_image")])
def test_broken_picture_is_rejected_with_its_reason(tmp_path, data, reason):
    for verb in (inspect_item, lambda i: prepare_item(i, SMOKE)):
        found = verb(item(tmp_path, data))
        assert isinstance(found, Reject) and found.reason == "bad_image" and reason in found.detail
    missing = inspect_item(RawItem(object_id="n", source="n", uri=str(tmp_path / "nowhere.png")))
    assert isinstance(missing, Reject) and missing.reason == "unreadable"


def test_equal_pixels_are_duplicates_whatever_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    found = []
    for i, suffix in enumerate(("PNG", "BMP", "TIFF")):
        sink = io.BytesIO()
        Image.fromarray(pixels if i < 2 else 255 - pixels).save(sink, format=suffix)
        found.append(inspect_item(item(tmp_path, sink.getvalue(), f"{i}.{suffix.lower()}")))
    assert found[0].sha256 != found[1].sha256 and ImagesTask().duplicates(found) == [0, 0, 2]


def test_stratified_split_divides_every_class_alike():
    from cad_models.images.data import class_number
    from cad_models.splits import SplitConfig, draw_splits

    names = ["a"] * 500 + ["b"] * 100 + ["c"] * 50
    splits = np.array(draw_splits(SplitConfig(), range(len(names)), [class_number(n) for n in names]))
    for name, count in (("a", 500), ("b", 100), ("c", 50)):
        own = splits[np.array(names) == name]
        assert abs((own == "val").sum() - 0.1 * count) <= 3 and abs((own == "test").sum() - 0.1 * count) <= 3


# --- generated pictures -------------------------------------------------------------------------------------------------------------------
def test_generated_pictures_are_seeded_and_of_all_classes():
    items = list_source("builtin:300:seed=5").items
    assert {i.label for i in items} == set(CLASSES) and items[7].label == class_of(7, 5)
    np.testing.assert_array_equal(generate_picture(3, 5), generate_picture(3, 5))
    assert not np.array_equal(generate_picture(3, 5), generate_picture(3, 6))
    noisy = generate_picture(8, 5, max_noise=0.9)
    assert noisy.dtype == np.uint8 and 112 <= min(noisy.shape[:2]) and max(noisy.shape[:2]) <= 192


def test_image_size_above_the_stored_one_is_refused(tmp_path):
    import pyarrow as pa

    from cad_models.dataset import DatasetError, build_table

    row = prepare_item(item(tmp_path, picture()), SMOKE)
    task = ImagesTask()
    table = build_table(task.schemas(SMOKE)["objects"], [row.objects]).append_column("label_index", pa.array([0]))
    assert task.examples({"objects": table}, SMOKE)["size"].tolist() == [[12, 10]]
    with pytest.raises(DatasetError, match="--data.image-size 64 is more than the 48 pixels.*--data.stored-size 64"):
        task.examples({"objects": table}, replace_all(SMOKE, {"data.image_size": 64}))
