"""The source system's files, read and written."""

import json

import numpy as np
import pytest

from cad_models.histograms.published import BadHistograms, class_of, parse_tensor, read_json, read_table, table_histograms, write_json
from cad_models.histograms.shape_histograms import BINS, KINDS, PARTS
from tests.shared import shared_path


def some_histograms(seed=0):
    rng = np.random.default_rng(seed)
    return {(part, kind, bins): rng.dirichlet(np.ones(bins)) for part in PARTS for bins in BINS for kind in KINDS}


def test_written_json_gives_back_the_same_numbers_in_the_published_order():
    histograms = some_histograms()
    data = write_json("a1", histograms)
    again = read_json(data)
    assert list(again) == list(histograms) and all(np.array_equal(again[key], histograms[key]) for key in histograms)
    value = json.loads(data)
    assert value["file"] == "a1.stl" and value["status"] == "COMPLETED" and len(value["histogram_data"]) == 40
    assert [e["type"] for e in value["histogram_data"][:4]] == [f"model_bounding_sphere_{kind}" for kind in KINDS]


def test_published_json_tables_and_their_histograms_agree():
    folder = shared_path("data/shape_histograms")
    total = 0
    for name in ("train", "valid"):
        table = read_table((folder / f"{name}.tsv").read_text(), delimiter="\t")
        other = read_table((folder / f"{name}.csv").read_text(), delimiter=",")
        assert len(table.labels) == len(table.histograms) == 178 and table.bad_rows == [] and table.labels == other.labels
        for object_id, values in table.histograms.items():
            np.testing.assert_array_equal(values, other.histograms[object_id])
            data = (folder / "json" / f"{object_id}.json").read_bytes()
            given = read_json(data)
            assert len(given) == 40
            for key, printed in table_histograms(values).items():
                np.testing.assert_allclose(given[key], printed, atol=6e-6)
            # The service's own file has the same keys in the same order as ours.
            assert list(json.loads(write_json(object_id, given))) == list(json.loads(data))
            total += 1
    assert total == 356


def test_published_histograms_keep_the_invariants_of_the_definitions():
    folder = shared_path("data/shape_histograms/json")
    for path in sorted(folder.iterdir())[::20]:
        given = read_json(path.read_bytes())
        for part in PARTS:
            for bins in BINS:
                outer, absolute = given[part, "strict_outer", bins], given[part, "strict_outer_absolute", bins]
                assert absolute == pytest.approx(outer * absolute.sum(), abs=1e-9)
                assert [given[part, kind, bins].sum() for kind in ("strict_outer", "missed", "concentric_sphere")] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: "not json", "no JSON"),
        (lambda v: {"a": 1}, "histogram_data"),
        (lambda v: {**v, "status": "FAILED", "error_message": "no mesh"}, "no mesh"),
        (lambda v: {**v, "histogram_data": [{"type": "x"}]}, "lacks"),
        (lambda v: {**v, "histogram_data": [{"type": "new_kind", "intervals": 8, "data": [1]}]}, "known type"),
        (lambda v: {**v, "histogram_data": [{**v["histogram_data"][0], "data": [1.0]}]}, "1 values instead of 8"),
        (lambda v: {**v, "histogram_data": [{**v["histogram_data"][0], "data": [-1.0] * 8}]}, "negative"),
        (lambda v: {**v, "histogram_data": [{**v["histogram_data"][0], "data": ["x"] * 8}]}, "not numbers"),
    ],
)
def test_broken_json_says_what_is_wrong(change, message):
    changed = change(json.loads(write_json("a", some_histograms())))
    with pytest.raises(BadHistograms, match=message):
        read_json(changed.encode() if isinstance(changed, str) else json.dumps(changed).encode())


def test_blender_names_lose_their_number():
    assert [class_of(n) for n in ("Torus.011", "Cube", " Cone.1 ", "V.2.x")] == ["Torus", "Cube", "Cone", "V.2.x"]


def test_tensor_printed_in_short_is_refused():
    with pytest.raises(BadHistograms, match="lost"):
        parse_tensor("tensor([1.0, 2.0,  ..., 3.0])", 128)
    with pytest.raises(BadHistograms, match="2 values instead of 3"):
        parse_tensor("tensor([1.0,\n 2.0])", 3)
    with pytest.raises(BadHistograms, match="no printed tensor"):
        parse_tensor("[1.0, 2.0]", 2)
    assert parse_tensor("tensor([1.0000, 2.5000], dtype=torch.float64)", 2).tolist() == [1.0, 2.5]


def test_table_keeps_good_rows_and_names_bad_ones():
    row = ",".join(["0.25"] * 128)
    header = "uuid,obj_name," + ",".join(f"h{i}" for i in range(128))
    table = read_table(f"{header}\na,Cube.001,{row}\nb,Cone,1,2\na,Cone,{row}\nc,Cone,{row.replace('0.25', 'x', 1)}\n", delimiter=",")
    assert table.labels == {"a": "Cube", "c": "Cone"} and list(table.histograms) == ["a"]
    assert [name for name, _ in table.bad_rows] == ["row 2", "a", "c"]


def test_other_tables_are_none_of_ours():
    assert read_table("x,y,z\n1,2,3\n", delimiter=",") is None
    assert read_table("", delimiter=",") is None
    assert read_table("a1\tTorus.011\nb2\tCube\n", delimiter="\t").labels == {"a1": "Torus", "b2": "Cube"}


def test_published_split_becomes_a_csv_that_prepare_reads(tmp_path, monkeypatch):
    from cad_models.histograms import published
    from cad_models.splits import read_split_csv

    (tmp_path / "train.tsv").write_text("a\tTorus.011\nb\tCube\n")
    (tmp_path / "valid.tsv").write_text("c\tCone\n")
    flags = ["--train", str(tmp_path / "train.tsv"), "--val", str(tmp_path / "valid.tsv"), "--out", str(tmp_path / "split.csv")]
    monkeypatch.setattr("sys.argv", ["published", *flags])
    published.main()
    assert read_split_csv((tmp_path / "split.csv").read_text()) == {"a": "train", "b": "train", "c": "val"}
    monkeypatch.setattr("sys.argv", ["published", "--train", str(tmp_path / "gone.tsv"), "--out", "x"])
    with pytest.raises(SystemExit) as stopped:
        published.main()
    assert stopped.value.code == 2
