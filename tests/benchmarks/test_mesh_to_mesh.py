"""Figures of mesh -> mesh by hand, the CSV of families, the split by families, and the whole benchmark on a few boxes."""

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.mesh_files import duplicate_groups, read_families, read_pairs
from benchmarks.mesh_to_mesh import family_figures, measure, table
from benchmarks.tables import with_intervals
from cad_models.common.meshes import Mesh
from tests.alignment.test_descriptors import box
from tests.rayjobs.members import write_tiny_member


def write_mesh(path: Path, mesh: Mesh) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(map(repr, row)) for row in mesh.vertices.tolist()] + ["3 " + " ".join(map(str, row)) for row in mesh.faces.tolist()]
    path.write_text(f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n" + "\n".join(lines) + "\n")
    return path


def tiny_member(folder: Path, **changes: object) -> Path:
    from cad_models.common.encoders import build_encoder

    encoder = build_encoder("hog")
    return write_tiny_member(folder, encoder_digest=encoder.digest, image_width=encoder.width, **changes)


# --- figures ------------------------------------------------------------------------------------------------------------------------------
def test_with_intervals_are_means_over_queries_and_narrow_with_equal_clusters():
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    found = with_intervals({"hit": hits, "constant": np.full(4, 0.25)}, [7, 7, 9, 9])
    assert found["hit"][0] == 0.75 and found["constant"] == (0.25, 0.25, 0.25)
    # Two clusters: the resamples are (0.5, 0.5), (0.5, 1) and (1, 1).
    assert found["hit"][1:] == (0.5, 1.0)


def test_family_figures_leave_out_exact_duplicates_and_those_without_a_right_answer():
    family = ["a", "a", "a", "b", "b", ""]
    duplicate = [0, 0, 2, 3, 3, 5]  # 1 is a copy of 0, 4 one of 3: b has no answer then
    scores = np.array(
        [
            [1.0, 0.99, 0.5, 0.7, 0.1, 0.0],
            [0.99, 1.0, 0.5, 0.1, 0.1, 0.0],
            [0.9, 0.3, 1.0, 0.4, 0.1, 0.95],
            [0.0] * 6,
            [0.0] * 6,
            [0.0] * 6,
        ]
    )
    figures, num_queries, num_families = family_figures({"x": scores, "y": scores}, family, duplicate, np.ones(6, dtype=bool))
    assert (num_queries, num_families) == (3, 1)
    # 0: the copy is passed over, 3 stands before 2. 1: right at once. 2: 5 stands before 0, 3 and 5 before 1.
    assert figures["x"]["recall@1"][0] == pytest.approx(1 / 3)
    assert figures["x"]["map"][0] == pytest.approx((1 / 2 + 1 + (1 / 2 + 2 / 4) / 2) / 3)


def test_family_figures_differences_are_paired():
    rng = np.random.default_rng(0)
    family, duplicate = [f"f{i // 3}" for i in range(30)], list(range(30))
    scores = {name: rng.uniform(size=(30, 30)) for name in ("a", "b")}
    figures, _, _ = family_figures({**scores, "both": scores["a"]}, family, duplicate, np.ones(30, dtype=bool))
    assert figures["both"]["map - a"] == (0.0, 0.0, 0.0)
    assert figures["both"]["map - b"][0] == pytest.approx(figures["a"]["map"][0] - figures["b"]["map"][0])


# --- files --------------------------------------------------------------------------------------------------------------------------------
def test_read_families_paths_are_relative_to_the_csv_or_to_the_folder(tmp_path):
    one, two = write_mesh(tmp_path / "m/one.off", box(1.0, 2.0, 3.0)), write_mesh(tmp_path / "m/sub/two.off", box(1.0, 1.0, 1.0))
    (tmp_path / "f.csv").write_text("path,family,dup_of\nm/one.off,x,\nsub/two.off,y,m/one.off\ngone.off,z,\n")
    found = read_families(tmp_path / "f.csv", tmp_path / "m")
    assert {path: row.family for path, row in found.items()} == {one: "x", two: "y"}
    assert found[two].duplicate_of == one and found[one].duplicate_of is None


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        ("families", "path\nx.stl\n", "has no column family; it has path"),
        ("families", "path,family\nx.stl,a\n", "none of its paths is a file"),
        ("families", "path,family\n", "has no rows"),
        ("pairs", "image\nx.png\n", "has no column cad; it has image"),
        ("pairs", "image,cad\nx.png,x.stl\n", "image x.png is no file beside it"),
    ],
)
def test_read_csv_broken_ones_are_refused_with_what_is_wrong(tmp_path, reader, text, message):
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_families(tmp_path / "f.csv", tmp_path) if reader == "families" else read_pairs(tmp_path / "f.csv")


def test_duplicate_groups_copies_under_other_names_and_sizes_are_one_and_broken_files_alone(tmp_path):
    paths = [write_mesh(tmp_path / f"{i}.off", mesh) for i, mesh in enumerate((box(1.0, 2.0, 3.0), box(1.0, 2.0, 4.0), box(10.0, 20.0, 30.0, shift=5.0)))]
    for name in ("broken", "broken_too"):
        paths.append(tmp_path / f"{name}.off")
        paths[-1].write_text("OFF\n")
    assert duplicate_groups(paths).tolist() == [0, 1, 0, 3, 4]


def test_measure_scale_tells_families_of_one_shape_apart_for_the_measures_only(tmp_path):
    meshes = {}
    for scale in (1, 40):
        for i, side in enumerate((3.0, 3.05, 3.1)):
            meshes[f"s{scale}/{i}.off"] = (f"family {scale}", box(1.0 * scale, 2.0 * scale, side * scale))
    for name, (_, mesh) in meshes.items():
        write_mesh(tmp_path / "m" / name, mesh)
    with (tmp_path / "f.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "family"), *((f"m/{name}", family) for name, (family, _) in meshes.items())])
    result = measure([str(tiny_member(tmp_path / "member"))], tmp_path / "m", tmp_path / "f.csv", "", [0.5])
    told = result["scopes"]["all"]
    assert (result["num_meshes"], told["num_queries"], told["num_families"]) == (6, 6, 2)
    assert told["figures"]["measures"]["recall@1"][0] == told["figures"]["measures"]["map"][0] == 1.0
    # The same shapes at another size: an embedding of normalised points cannot tell the families apart.
    assert told["figures"]["point embedding"]["map"][0] < 0.9
    assert len(table(result).splitlines()) == 2 + 3
