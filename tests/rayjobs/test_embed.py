"""embed.py without Ray: embeddings of a part, resuming, what is refused; and whole runs, one of them killed."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cad_models.common.encoders import build_encoder
from cad_models.common.images import decode_image, encode_png, prepare_image
from cad_models.dataset import DatasetError, DatasetFolder, to_numpy
from cad_models.task import EmbedColumn
from rayjobs.embed import EmbedJob, main
from rayjobs.embedding import embed_part, embedding_key, finished_embeddings
from tests.rayjobs.test_prepare import assert_same_tree, kill_once, run_job_file

COLUMNS = (
    EmbedColumn(source=("views", "images"), name="embeddings", count="num_views"),
    EmbedColumn(source=("views", "query_images"), name="query_embeddings", count="num_query_views"),
)
KIND = "embeddings/mean"


class MeanColor:
    """An encoder by hand: the mean colour and the mean of the left half."""

    name = "mean"
    width = 6
    digest = "mean-1"
    input_size = 32

    def __init__(self) -> None:
        self.largest_batch = 0

    def encode_squares(self, images) -> np.ndarray:
        self.largest_batch = max(self.largest_batch, len(images))
        return np.stack([np.concatenate([image.mean((0, 1)), image[:, :16].mean((0, 1))]) / 255 for image in images]).astype(np.float32)


def picture(seed: int) -> np.ndarray:
    image = np.full((48, 64, 3), 255, dtype=np.uint8)
    rng = np.random.default_rng(seed)
    image[10:30, 10 : 20 + seed % 30] = rng.integers(0, 200, 3)
    return image


def write_views(dataset, index, counts, *, image=None):
    rows, seed = [], 1000 * index
    for i, (num_images, num_queries) in enumerate(counts):
        cells = [[image or encode_png(picture(seed := seed + 1)) for _ in range(n)] for n in (num_images, num_queries)]
        rows.append({"object_id": f"{index}-{i}", "images": cells[0], "query_images": cells[1]})
    binary = pa.list_(pa.binary())
    table = pa.Table.from_pylist(rows, schema=pa.schema([("object_id", pa.string()), ("images", binary), ("query_images", binary)]))
    info = dataset.write_part("views", index, table, key="k")
    return {"key": "k", "num_rows": len(rows), "splits": {}, "objects": "o", "views": info.sha256}


def noisy(image, rng):
    return rng.integers(0, 256, image.shape).astype(np.uint8)


@pytest.fixture
def dataset(tmp_path):
    return DatasetFolder(str(tmp_path / "ds"))


def test_changed_versions_lie_by_image_and_are_seeded_by_its_bytes(dataset):
    same = encode_png(picture(1))
    parts = [write_views(dataset, 0, [(2, 1), (3, 0)]), write_views(dataset, 1, [(2, 2)], image=same)]
    changed = EmbedColumn(source=("views", "images"), name="changed", count="num_changed", change=noisy, copies=3)
    encoder = MeanColor()
    for index, part in enumerate(parts):
        result = embed_part(dataset, KIND, index, part, (*COLUMNS, changed), encoder)
        assert result.part["max_views"] == max(3, 2) - (index == 1)
    assert dataset.read_part(KIND, 0).column("num_changed").to_pylist() == [6, 9]
    views = dataset.read_part("views", 0).column("images").to_pylist()
    for got, images in zip(to_numpy(dataset.read_part(KIND, 0), "changed"), views, strict=True):
        assert got.shape == (3 * len(images), 6) and len(np.unique(got, axis=0)) == len(got)
        seeds = [int(hashlib.sha256(image).hexdigest()[:16], 16) for image in images]
        for row, (image, seed, copy) in zip(got, [(i, s, c) for i, s in zip(images, seeds, strict=True) for c in range(3)], strict=True):
            expected = prepare_image(noisy(decode_image(image), np.random.default_rng([seed, copy])), size=32)
            np.testing.assert_array_equal(row, encoder.encode_squares([expected])[0].astype(np.float16))
    first, second = np.split(to_numpy(dataset.read_part(KIND, 1), "changed")[0], 2)
    np.testing.assert_array_equal(first, second)  # the same picture, changed in the same ways


def test_key_of_plain_columns_does_not_know_of_changes_and_that_of_changes_does():
    part, encoder = {"views": "v"}, MeanColor()
    columns = [dataclasses.replace(COLUMNS[0], change=change, copies=copies) for change in (noisy, picture) for copies in (1, 2)]
    keys = {embedding_key(part, [column], encoder) for column in (COLUMNS[0], *columns)}
    assert len(keys) == 5


def test_embed_part_gives_each_object_the_embeddings_of_its_own_images(dataset):
    part = write_views(dataset, 0, [(24, 3), (26, 0), (1, 1)])
    encoder = MeanColor()
    result = embed_part(dataset, KIND, 0, part, COLUMNS, encoder)
    assert (result.num_images, result.part["max_views"], result.part["num_rows"], result.reused) == (55, 26, 3, False)
    table, views = dataset.read_part(KIND, 0), dataset.read_part("views", 0)
    assert table.column("object_id").to_pylist() == views.column("object_id").to_pylist()
    assert table.column("num_views").to_pylist() == [24, 26, 1]
    assert table.column("num_query_views").to_pylist() == [3, 0, 1]
    for name, source in (("embeddings", "images"), ("query_embeddings", "query_images")):
        for got, images in zip(to_numpy(table, name), views.column(source).to_pylist(), strict=True):
            assert got.dtype == np.float16 and got.shape == (len(images), 6)
            for row, image in zip(got, images, strict=True):  # one image at a time, the obvious way
                np.testing.assert_array_equal(row, encoder.encode_squares([prepare_image(decode_image(image), size=32)])[0].astype(np.float16))


def test_embed_part_equals_encoding_the_decoded_image_as_infer_does(dataset):
    encoder = build_encoder("hog")
    part = write_views(dataset, 0, [(3, 1)])
    embed_part(dataset, KIND, 0, part, COLUMNS, encoder)
    images = dataset.read_part("views", 0).column("images").to_pylist()[0]
    expected = np.concatenate([encoder.encode([decode_image(image)]) for image in images]).astype(np.float16)
    np.testing.assert_array_equal(to_numpy(dataset.read_part(KIND, 0), "embeddings")[0], expected)


def test_embed_part_with_many_images_decodes_a_bounded_number_at_once(dataset):
    part = write_views(dataset, 0, [(130, 2)] * 3)
    encoder = MeanColor()
    embed_part(dataset, KIND, 0, part, COLUMNS, encoder)
    assert encoder.largest_batch == 128


def test_embed_part_does_not_depend_on_the_number_of_threads(dataset):
    part = write_views(dataset, 0, [(70, 2)] * 4)
    first = embed_part(dataset, KIND, 0, part, COLUMNS, MeanColor(), num_threads=1)
    second = embed_part(dataset, "embeddings/other", 0, part, COLUMNS, MeanColor(), num_threads=3)
    assert first.part == second.part


def test_embed_part_of_no_objects_is_an_empty_part(dataset):
    part = write_views(dataset, 0, [])
    result = embed_part(dataset, KIND, 0, part, COLUMNS, MeanColor())
    assert (result.part["num_rows"], result.part["max_views"]) == (0, 0)
    assert to_numpy(dataset.read_part(KIND, 0), "embeddings") == []


def test_finished_embeddings_only_of_the_same_views_and_encoder(dataset):
    part, encoder = write_views(dataset, 0, [(2, 1)]), MeanColor()
    made = embed_part(dataset, KIND, 0, part, COLUMNS, encoder)
    key = embedding_key(part, COLUMNS, encoder)
    expected = dataclasses.replace(made, num_images=0, reused=True)
    assert finished_embeddings(dataset, KIND, 0, key, None) == expected
    assert finished_embeddings(dataset, KIND, 0, key, made.part) == expected
    encoder.digest = "mean-2"
    assert finished_embeddings(dataset, KIND, 0, embedding_key(part, COLUMNS, encoder), made.part) is None
    other_views = embedding_key({**part, "views": "other"}, COLUMNS, MeanColor())
    assert finished_embeddings(dataset, KIND, 0, other_views, made.part) is None


def test_finished_embeddings_with_a_flipped_bit_are_not_taken_after_a_kill(dataset):
    part, encoder = write_views(dataset, 0, [(40, 1)]), MeanColor()
    embed_part(dataset, KIND, 0, part, COLUMNS, encoder)
    path = Path(dataset.folder.path(f"{KIND}/part-00000.parquet"))
    data = bytearray(path.read_bytes())
    data[bytes(data).index(to_numpy(dataset.read_part(KIND, 0), "embeddings")[0].tobytes()) + 5] ^= 1
    path.write_bytes(bytes(data))
    assert finished_embeddings(dataset, KIND, 0, embedding_key(part, COLUMNS, encoder), None) is None


def test_embed_part_of_other_or_missing_or_broken_views_names_file_and_remedy(dataset):
    part = write_views(dataset, 0, [(2, 1)])
    with pytest.raises(DatasetError, match=r"views/part-00000.parquet is not the file that manifest.json names: .*prepare again"):
        embed_part(dataset, KIND, 0, {**part, "views": "other"}, COLUMNS, MeanColor())
    path = Path(dataset.folder.path("views/part-00000.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="views/part-00000.parquet is broken"):
        embed_part(dataset, KIND, 0, part, COLUMNS, MeanColor())
    path.unlink()
    with pytest.raises(DatasetError, match="views/part-00000.parquet is missing"):
        embed_part(dataset, KIND, 0, part, COLUMNS, MeanColor())


def test_embed_part_with_an_unreadable_image_names_object_and_view(dataset):
    part = write_views(dataset, 0, [(2, 1)], image=b"no image")
    with pytest.raises(DatasetError, match="image 0 of 0-0 cannot be read"):
        embed_part(dataset, KIND, 0, part, COLUMNS, MeanColor())


def test_embed_part_beyond_float16_is_refused(dataset):
    class Huge(MeanColor):
        def encode_squares(self, images):
            return np.full((len(images), 6), 1e6, dtype=np.float32)

    with pytest.raises(DatasetError, match="beyond the range of float16"):
        embed_part(dataset, KIND, 0, write_views(dataset, 0, [(1, 1)]), COLUMNS, Huge())


def test_embed_of_no_dataset_says_how_to_make_one(tmp_path):
    from cad_models.tasks import TASKS

    with pytest.raises(DatasetError, match="run `python rayjobs/prepare.py"):
        main(EmbedJob(task="alignment", recipe=TASKS["alignment"].smoke, dataset=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.ray
def test_embed_killed_and_run_again_is_byte_equal_and_reembeds_only_changed_parts(tmp_path):
    ds = tmp_path / "ds"
    arguments = ["--source", "builtin:24", "--dataset", str(ds), "--smoke", "--objects-per-part", "3"]
    assert run_job_file("prepare", arguments, tmp_path).returncode == 0
    embed = ["--dataset", str(ds), "--smoke", "--encoder", "hog"]
    kill_once("embed", embed, tmp_path, until=lambda: len(list(ds.glob("embeddings/*/part-*.parquet"))) >= 2)
    assert not list(ds.glob("embeddings/*/manifest.json"))
    resumed = run_job_file("embed", embed, tmp_path)
    assert resumed.returncode == 0, resumed.stdout
    reused = int(resumed.stdout.split("parts")[-1].split("reused")[0].strip())
    assert 2 <= reused <= 9

    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(ds, undisturbed)
    shutil.rmtree(undisturbed / "embeddings")
    assert run_job_file("embed", ["--dataset", str(undisturbed), "--smoke", "--encoder", "hog", "--scale.num-workers", "1"], tmp_path).returncode == 0
    assert_same_tree(ds, undisturbed)

    # A changed dataset invalidates the embeddings; those of parts that stayed are found again.
    without_test = [*arguments, "--split.test-fraction", "0", "--split.kind", "random"]
    assert run_job_file("prepare", without_test, tmp_path).returncode == 0
    again = run_job_file("embed", embed, tmp_path)
    assert again.returncode == 0, again.stdout
    manifest, embedded = (json.loads((ds / name).read_text()) for name in ("manifest.json", "embeddings/hog/manifest.json"))
    assert [part["num_rows"] for part in embedded["parts"]] == [part["num_rows"] for part in manifest["parts"]]
    assert len(list((ds / "embeddings" / "hog").glob("part-*.parquet"))) == len(manifest["parts"])
