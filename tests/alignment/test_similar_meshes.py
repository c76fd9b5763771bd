"""Mesh -> mesh: ranking against a loop, what counts as an answer, and the whole way from files."""

import ast
from pathlib import Path

import numpy as np
import pytest

from cad_models.alignment.answers import MEASURED_MESH, list_requests
from cad_models.alignment.descriptors import NUM_MEASURES
from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.similar_meshes import fused_scores, rank_meshes, submission
from cad_models.task import Answer, Entry, Reject, Search
from tests.alignment.test_descriptors import box, drawn
from tests.rayjobs.members import TASK, write_tiny_member


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def entries(*named: tuple[str, int]) -> tuple[Entry, ...]:
    return tuple(Entry(entry_id=name, inputs=(position,)) for name, position in named)


# --- ranking ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale_aware", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [1 << 20, 5])
def test_rank_meshes_equals_a_loop_over_members_and_measures(scale_aware, block, monkeypatch):
    monkeypatch.setattr("cad_models.alignment.similar_meshes._BLOCK_ELEMENTS", block)
    weights = [2.0, 1.0]
    measured = drawn(8, NUM_MEASURES)
    outputs = {i: [unit(6, seed=i), unit(4, seed=50 + i), measured[i]] for i in range(8)}
    search = Search(direction="mesh_to_mesh", queries=entries(("p", 0), ("q", 1), ("r", 2)), gallery=entries(("a", 2), *((f"g{i}", i) for i in range(3, 8))))
    found = rank_meshes(search, outputs, rule="concatenate", weights=weights, top_k=4, scale_aware=scale_aware)
    assert found
    for query in search.queries:
        scores = []
        for item in search.gallery:
            (i,), (j,) = query.inputs, item.inputs
            if i == j:
                continue
            cosine = sum(w * float(outputs[i][m].astype(float) @ outputs[j][m]) for m, w in enumerate(weights)) / 3
            parts = np.abs(measured[i].astype(float) - measured[j])
            parts = np.append(parts[:5], parts[5:].mean())
            alike = np.nanmean(1 / (1 + parts / 0.05))
            scores.append((-((1 - scale_aware) * cosine + scale_aware * alike), item.entry_id))
        rows = [a for a in found if a.query == query.entry_id]
        assert [a.answer for a in rows] == [name for _, name in sorted(scores)[:4]]
        np.testing.assert_allclose([a.score for a in rows], [-score for score, _ in sorted(scores)[:4]], atol=1e-6)
        assert [a.rank for a in rows] == [1, 2, 3, 4]


def test_rank_meshes_own_file_is_no_answer_and_a_copy_is_the_first():
    same = [unit(5), drawn(1, NUM_MEASURES, unknown=0.0)[0]]
    outputs = {0: same, 1: same, 2: [unit(5, seed=3), drawn(1, NUM_MEASURES, seed=3, unknown=0.0)[0]]}
    everything = entries(("copy", 1), ("other", 2), ("part", 0))
    found = rank_meshes(Search(direction="mesh_to_mesh", queries=everything, gallery=everything), outputs, rule="concatenate", weights=[1.0], top_k=9, scale_aware=0.5)
    assert {q: [a.answer for a in found if a.query == q] for q in ("part", "copy", "other")} == {
        "part": ["copy", "other"],
        "copy": ["part", "other"],
        "other": ["copy", "part"],  # equal scores: by id
    }
    assert next(a for a in found if a.query == "part").score == pytest.approx(1.0, abs=1e-6)


def test_rank_meshes_unreadable_files_and_a_gallery_of_the_query_alone_give_no_answers():
    outputs = {0: [unit(5)], 1: [unit(5, seed=1)]}
    search = Search(direction="mesh_to_mesh", queries=entries(("a", 0), ("b", 1), ("broken", 7)), gallery=entries(("a", 0), ("gone", 8)))
    found = rank_meshes(search, outputs, rule="mean", weights=[1.0], top_k=3, scale_aware=0.0)
    assert [(a.query, a.answer) for a in found] == [("b", "a")]
    assert rank_meshes(search, {}, rule="mean", weights=[1.0], top_k=3, scale_aware=0.0) == []


def test_fused_scores_without_measures_are_refused_unless_shape_alone_counts():
    bare = (unit(3, 5), np.zeros((3, 0), np.float32))
    np.testing.assert_allclose(np.diag(fused_scores(bare, bare, scale_aware=0.0)), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="scale_aware is 0.5 and the meshes were read without their measures"):
        fused_scores(bare, bare, scale_aware=0.5)


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def test_list_requests_auto_searches_meshes_among_meshes_only_where_there_is_no_image(tmp_path):
    meshes, images = touch(tmp_path / "m", "a.stl", "b.obj", "notes.txt"), touch(tmp_path / "i", "c.png")
    both = touch(tmp_path / "both", "d.stl", "e.png")
    directions = {
        (q, g): [search.direction for search in list_requests(q, g).searches]
        for q, g in ((meshes, meshes), (meshes, both), (both, meshes), (meshes, images), (both, both))
    }
    assert directions == {
        (meshes, meshes): ["mesh_to_mesh"],
        (meshes, both): ["mesh_to_image"],
        (both, meshes): ["image_to_mesh"],
        (meshes, images): ["mesh_to_image"],
        (both, both): ["image_to_mesh", "mesh_to_image"],
    }


def test_list_requests_mesh_to_mesh_reads_a_file_of_both_sides_once_and_measures_it_if_wanted(tmp_path):
    folder = touch(tmp_path / "m", "a.stl", "sub/b.obj", "c.png")
    for measured, kind in ((True, MEASURED_MESH), (False, "mesh")):
        requests = list_requests(folder, folder, direction="mesh_to_mesh", measured=measured)
        (search,) = requests.searches
        assert [item.kind for item in requests.inputs] == [kind, kind] and requests.num_ignored == 1
        assert search.queries == search.gallery == entries(("a", 0), ("b", 1))


def test_list_requests_mesh_to_mesh_takes_a_folder_in_the_source_systems_layout_as_any_other(tmp_path):
    folder = touch(tmp_path / "t", "queries_mesh_to_image/a.stl", "gallery_mesh_for_image/b.stl", "gallery_image_for_mesh/c.png", "queries_image_to_mesh/d.png")
    (search,) = list_requests(folder, folder, direction="mesh_to_mesh").searches
    assert [entry.entry_id for entry in search.gallery] == ["a", "b"]
    with pytest.raises(ValueError, match="--gallery is missing"):
        list_requests(folder, None, direction="mesh_to_mesh")


def test_list_requests_mesh_to_mesh_without_meshes_says_what_was_found(tmp_path):
    images, meshes = touch(tmp_path / "i", "a.png"), touch(tmp_path / "m", "a.stl")
    with pytest.raises(ValueError, match="holds 1 images and 0 meshes, --gallery 0 images and 1 meshes; mesh_to_mesh needs meshes on each side"):
        list_requests(images, meshes, direction="mesh_to_mesh")


# --- from files ---------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A member, and a folder with a box, the box at 10 times the size, and a box of nearly the first one's size."""
    from cad_models.checkpoint import load_member
    from cad_models.common.encoders import build_encoder

    root = tmp_path_factory.mktemp("parts")
    encoder = build_encoder("hog")
    member = load_member(write_tiny_member(root / "member", encoder_digest=encoder.digest, image_width=encoder.width))
    (root / "g").mkdir()
    for name, sides in {"small": (1.0, 2.0, 3.0), "large": (10.0, 20.0, 30.0), "near": (1.2, 2.3, 3.05)}.items():
        mesh = box(*sides)
        lines = [" ".join(map(repr, row)) for row in mesh.vertices.tolist()] + ["3 " + " ".join(map(str, row)) for row in mesh.faces.tolist()]
        (root / "g" / f"{name}.off").write_text(f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n" + "\n".join(lines) + "\n")
    return member, str(root / "g")


def answers_to(member, folder: str, options: AlignmentOptions) -> list[Answer]:
    requests = TASK.list_requests(folder, folder, direction="mesh_to_mesh", options=options)
    predictor = TASK.predictor([member], options=options)
    outputs = {}
    for i, item in enumerate(requests.inputs):
        columns = TASK.read_input(item, predictor.settings)
        assert not isinstance(columns, Reject)
        (outputs[i],) = predictor.predict([columns])
        assert len(outputs[i]) == (2 if options.scale_aware else 1)
    return TASK.rank(requests.searches[0], outputs, rule="concatenate", weights=[1.0], top_k=2, options=options)


def test_mesh_to_mesh_scaled_copy_is_found_by_shape_and_passed_over_by_size(parts):
    for scale_aware, wanted in ((0.0, "large"), (1.0, "near")):
        found = answers_to(*parts, AlignmentOptions(scale_aware=scale_aware))
        best = {a.query: a.answer for a in found if a.rank == 1}
        assert best["small"] == wanted
        assert len(found) == 6 and all(a.query != a.answer for a in found)


def test_submission_of_mesh_to_mesh_is_a_table_of_its_own(parts):
    found = answers_to(*parts, AlignmentOptions())
    header, *rows = TASK.submission(found)
    assert header == ["id", "mesh_to_mesh_query", "mesh_to_mesh_answers"]
    assert [row[:2] for row in rows] == [["0", "large"], ["1", "near"], ["2", "small"]]
    assert [ast.literal_eval(row[2]) for row in rows] == [[a.answer for a in found if a.query == q] for _, q, _ in rows]
    assert rows == submission(found[::-1])[1:]


def test_options_scale_aware_out_of_range_is_refused():
    with pytest.raises(ValueError, match="--options.scale-aware is 1.5: it must be in .0, 1."):
        AlignmentOptions(scale_aware=1.5)
