"""Best views, turned pictures and recalls by hand, and the whole benchmark on a few boxes."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import image_cad_pairs
from benchmarks.image_cad_pairs import FUSED, RIVAL, ROLLED, best_views, pair_figures, rolled, trained_on, unique_meshes
from benchmarks.mesh_files import read_pairs
from cad_models.common.cameras import Camera
from cad_models.common.images import encode_png, prepare_image
from cad_models.common.rendering import render_views
from tests.alignment.test_descriptors import box
from tests.benchmarks.test_mesh_to_mesh import tiny_member, write_mesh


def test_best_views_equal_a_loop():
    rng = np.random.default_rng(0)
    queries, views = [rng.normal(size=(n, 5)) for n in (1, 3)], [rng.normal(size=(n, 5)) for n in (2, 1, 4)]
    wanted = [[max(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a in q for b in v) for v in views] for q in queries]
    np.testing.assert_allclose(best_views(queries, views), wanted, atol=1e-12)


def test_rolled_four_times_is_a_quarter_turn_each_and_nothing_is_cut():
    picture = np.full((90, 160, 3), 255, dtype=np.uint8)
    picture[20:70, 30:130] = 40
    picture[20:40, 30:50] = 200  # one corner of another shade: the turns differ
    original, *turned = rolled(picture, 4)
    assert original is picture and len(turned) == 3
    straight = prepare_image(picture, size=96).astype(float)
    for k, version in enumerate(turned, start=1):
        again = prepare_image(version, size=96).astype(float)
        assert np.abs(again - np.rot90(straight, k)).mean() < 3
    # At 45 degrees the part's corners are still inside the square.
    slanted = rolled(picture, 8)[1]
    rim = np.concatenate([slanted[0], slanted[-1], slanted[:, 0], slanted[:, -1]])
    assert (rim == 255).all()


def test_pair_figures_recalls_by_kind_and_direction_equal_counting():
    # Meshes 0 and 1 are shown, by a thumbnail each and mesh 0 by a photo as well; mesh 2 is only in the gallery.
    cad, kind = [0, 1, 0], ["thumbnail", "thumbnail", "photo"]
    learned = np.array([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.5, 0.3]])
    rival = np.array([[0.1, 0.2, 0.3], [0.1, 0.9, 0.3], [0.9, 0.1, 0.3]])
    told = pair_figures({"member 1": learned, RIVAL: rival}, cad, kind)

    def figure(scope, method="member 1", name="recall@1"):
        return told[scope]["figures"][method][name][0]

    assert figure("image_to_mesh/all") == pytest.approx(1 / 3) and figure("image_to_mesh/all", RIVAL) == pytest.approx(2 / 3)
    assert figure("image_to_mesh/thumbnail") == 0.5 and figure("image_to_mesh/photo") == 0.0
    assert figure("image_to_mesh/all", name="recall@1 - rival") == pytest.approx(-1 / 3)
    # Mesh 0 finds its thumbnail; of mesh 1's column the photo stands first.
    assert figure("mesh_to_image/all") == 0.5 and figure("mesh_to_image/all", RIVAL) == 1.0
    # Among the photos alone mesh 0's thumbnail neither helps nor hurts: 0.3 of mesh 1's thumbnail stands before 0.1.
    assert told["mesh_to_image/photo"]["num_queries"] == 1 and figure("mesh_to_image/photo") == 0.0
    assert figure("mesh_to_image/photo", name="recall@3") == 1.0


def test_pair_figures_differences_are_from_the_rival_with_as_many_rolls():
    right, wrong = np.eye(2), 1 - np.eye(2)
    told = pair_figures({"ensemble": right, "ensemble" + ROLLED: right, RIVAL: right, RIVAL + ROLLED: wrong}, [0, 1], ["a", "a"])
    figures = told["image_to_mesh/all"]["figures"]
    assert figures["ensemble"]["recall@1 - rival"][0] == 0.0 and figures["ensemble" + ROLLED]["recall@1 - rival"][0] == 1.0
    assert "recall@1 - rival" not in figures[RIVAL]


@pytest.fixture
def few(tmp_path) -> Path:
    """Two boxes with pictures, a gallery with a copy of the first one, another box and a broken file."""
    shapes = {"flat": box(4.0, 4.0, 0.5), "long": box(1.0, 1.0, 6.0)}
    rows = ["image,cad,kind"]
    for name, mesh in shapes.items():
        write_mesh(tmp_path / f"cad/{name}.off", mesh)
        view = render_views(mesh.vertices, mesh.faces, [Camera(azimuth_deg=40.0, elevation_deg=20.0)], size=128)[0]
        (tmp_path / f"{name}.png").write_bytes(encode_png(view))
        rows.append(f"{name}.png,cad/{name}.off,render")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    write_mesh(tmp_path / "g/copy.off", box(8.0, 8.0, 1.0))
    write_mesh(tmp_path / "g/cube.off", box(1.0, 1.0, 1.1))
    (tmp_path / "g/broken.off").write_text("OFF\n")
    return tmp_path


def test_unique_meshes_have_each_geometry_once_and_leave_broken_files_out(few):
    pairs = read_pairs(few / "pairs.csv")
    meshes, position, files = unique_meshes(pairs, few / "g")
    assert [path.name for path in meshes] == ["flat.off", "long.off", "cube.off"]
    assert {path.name: i for path, i in position.items()} == {"flat.off": 0, "long.off": 1}
    assert [path.name for path in files[0]] == ["flat.off", "copy.off"]


def test_trained_on_tells_copies_and_near_duplicates_of_the_pairs(few, monkeypatch):
    digests = {}
    for name, split in (("g/copy.off", "val"), ("g/cube.off", "test"), ("g/longer.off", "train")):
        if name == "g/longer.off":
            write_mesh(few / name, box(1.0, 1.0, 6.05))
        digests[hashlib.sha256((few / name).read_bytes()).hexdigest()] = split
    monkeypatch.setattr(image_cad_pairs, "splits_by_digest", lambda dataset: digests)
    meshes, position, files = unique_meshes(read_pairs(few / "pairs.csv"), few / "g")
    assert trained_on(position, meshes, files, "ds") == {"val": ["flat.off"], "not in the dataset": ["long.off"], "nearly train": ["long.off"]}


@pytest.mark.slow
def test_main_tells_members_ensemble_and_rival_and_writes_them(few, capsys, monkeypatch):
    # The second with a vector for each side of a mesh.
    sided = {"model__size": "projection", "model__side_vectors": True}
    members = [str(tiny_member(few / name, **changes)) for name, changes in (("m0", {}), ("m1", sided))]
    flags = ["--model", members[0], "--model", members[1], "--pairs", str(few / "pairs.csv"), "--gallery", str(few / "g"), "--output", str(few / "o/r.json")]
    monkeypatch.setattr(sys, "argv", ["image_cad_pairs", *flags])
    image_cad_pairs.main()
    printed = capsys.readouterr().out
    result = json.loads((few / "o/r.json").read_text())
    assert result["num_meshes"] == 3
    scope = result["figures"]["image_to_mesh/all"]
    methods = ("member 1", "member 2", "ensemble", FUSED, RIVAL)
    assert list(scope["figures"]) == [name + rolls for name in methods for rolls in ("", ROLLED)]
    # Untrained members, but by the default weights most of the fused score is the views'.
    assert scope["figures"][FUSED]["recall@1"][0] == 1.0
    # A plate, a bar and a cube: their views tell them apart, and two of three answers are in the first three.
    assert scope["figures"][RIVAL]["recall@1"][0] == 1.0 and scope["figures"]["ensemble"]["recall@3"][0] == 1.0
    assert "2 pictures of 2 meshes; 3 meshes to search in" in printed and "| image → mesh | render (2) | ensemble, 24 rolls |" in printed


def test_main_missing_file_ends_with_one_line(few, monkeypatch):
    (few / "flat.png").unlink()
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m", "--pairs", str(few / "pairs.csv"), "--gallery", str(few / "g")])
    with pytest.raises(SystemExit, match="error: .*image flat.png is no file beside it"):
        image_cad_pairs.main()
