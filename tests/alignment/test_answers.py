"""Listing of requests, ranking and combination of members, the submission's columns."""

import ast
from pathlib import Path

import numpy as np
import pytest

from cad_models.alignment.answers import combine_embeddings, list_requests, rank, submission
from cad_models.task import Answer, Entry, Search


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def named(requests, entry: Entry) -> list[str]:
    return [requests.inputs[i].source for i in entry.inputs]


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def test_list_requests_images_and_meshes_on_both_sides_make_both_directions(tmp_path):
    queries = touch(tmp_path / "q", "a.png", "b.stl", "notes.txt", ".hidden.png")
    gallery = touch(tmp_path / "g", "c.OBJ", "d_0.png", "d_11.png", "d_2.png", "e.jpg")
    requests = list_requests(queries, gallery)
    to_mesh, to_image = requests.searches
    assert (to_mesh.direction, to_image.direction) == ("image_to_mesh", "mesh_to_image")
    assert [e.entry_id for e in to_mesh.queries] == ["a"]
    assert [e.entry_id for e in to_mesh.gallery] == ["c"]
    assert [e.entry_id for e in to_image.queries] == ["b"]
    # Views in the order of their numbers, not of their names; a name without a number is an object of its own.
    assert {e.entry_id: named(requests, e) for e in to_image.gallery} == {"d": ["d_0.png", "d_2.png", "d_11.png"], "e": ["e.jpg"]}
    assert requests.num_ignored == 1


def test_list_requests_one_kind_on_each_side_makes_one_direction_and_counts_the_rest(tmp_path):
    queries = touch(tmp_path / "q", "a.png", "b.stl")
    gallery = touch(tmp_path / "g", "c.stl")
    requests = list_requests(queries, gallery)
    assert [s.direction for s in requests.searches] == ["image_to_mesh"]
    assert requests.num_ignored == 1


def test_list_requests_source_layout_needs_no_gallery_and_keeps_directions_apart(tmp_path):
    root = touch(
        tmp_path / "test",
        "queries_image_to_mesh/0007.png",
        "gallery_mesh_for_image/0003.stl",
        "queries_mesh_to_image/0009.stl",
        "gallery_image_for_mesh/0004_0.png",
        "gallery_image_for_mesh/0004_1.png",
        "gallery_image_for_mesh/0005_0.png",
    )
    requests = list_requests(root, None)
    assert {s.direction: ([e.entry_id for e in s.queries], [e.entry_id for e in s.gallery]) for s in requests.searches} == {
        "image_to_mesh": (["0007"], ["0003"]),
        "mesh_to_image": (["0009"], ["0004", "0005"]),
    }
    only = list_requests(root, None, direction="mesh_to_image")
    assert [s.direction for s in only.searches] == ["mesh_to_image"]


def test_list_requests_numbers_that_tell_objects_apart_are_no_views(tmp_path):
    queries = touch(tmp_path / "q", "a.stl")
    gallery = touch(tmp_path / "g", "part_001.png", "part_002.png", "part_003.png")
    (search,) = list_requests(queries, gallery).searches
    assert [e.entry_id for e in search.gallery] == ["part_001", "part_002", "part_003"]


def test_list_requests_equal_stems_get_as_much_path_as_they_need(tmp_path):
    queries = touch(tmp_path / "q", "x.png")
    gallery = touch(tmp_path / "g", "one/a.stl", "two/a.stl", "b.stl", "b.obj")
    (search,) = list_requests(queries, gallery).searches
    assert [e.entry_id for e in search.gallery] == ["b.obj", "b.stl", "one/a", "two/a"]


def test_list_requests_named_files_are_queries(tmp_path):
    touch(tmp_path, "one/a.png", "g/c.stl")
    requests = list_requests([str(tmp_path / "one/a.png")], str(tmp_path / "g"))
    assert [e.entry_id for e in requests.searches[0].queries] == ["a"]


@pytest.mark.parametrize(
    ("queries", "gallery", "direction", "message"),
    [
        ("missing", "g", "auto", "--queries missing: there is no such folder"),
        ("q", "missing", "auto", "--gallery missing: there is no such folder"),
        ("q", None, "auto", "--gallery is missing"),
        ("q", "q", "auto", "1 images and 0 meshes"),
        ("q", "g", "mesh_to_image", "nothing to search"),
        ("q", "g", "sideways", "'sideways' is none of auto, image_to_mesh, mesh_to_image"),
    ],
)
def test_list_requests_nothing_to_search_says_what_was_found(tmp_path, monkeypatch, queries, gallery, direction, message):
    touch(tmp_path, "q/a.png", "g/c.stl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        list_requests(queries, gallery, direction=direction)


# --- ranking ------------------------------------------------------------------------------------------------------------------------------
def test_combine_concatenate_inner_product_is_the_weighted_mean_of_cosines():
    members = [unit(5, 8, seed=1), unit(5, 3, seed=2)]
    joined = combine_embeddings(members, rule="concatenate", weights=[3.0, 1.0])
    wanted = 0.75 * members[0] @ members[0].T + 0.25 * members[1] @ members[1].T
    np.testing.assert_allclose(joined @ joined.T, wanted, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, atol=1e-6)


def test_combine_mean_is_the_normalised_weighted_mean():
    members = [unit(4, 6, seed=1), unit(4, 6, seed=2)]
    joined = combine_embeddings(members, rule="mean", weights=[1.0, 3.0])
    for row in range(4):
        mean = 0.25 * members[0][row].astype(float) + 0.75 * members[1][row]
        np.testing.assert_allclose(joined[row], mean / np.sqrt((mean**2).sum()), atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "weights", "message"),
    [("mean", [1.0, 1.0], "one width, they have 8, 3"), ("vote", [1.0, 1.0], "'vote'"), ("concatenate", [1.0, 0.0], "positive"), ("concatenate", [1.0], "one a member")],
)
def test_combine_impossible_request_is_refused(rule, weights, message):
    with pytest.raises(ValueError, match=message):
        combine_embeddings([unit(5, 8), unit(5, 3)], rule=rule, weights=weights)


def test_rank_equals_a_loop_over_views_members_and_objects():
    rng = np.random.default_rng(3)
    views_of = [2, 1, 3, 1]
    positions = iter(range(100))
    gallery = tuple(Entry(entry_id=f"g{i}", inputs=tuple(next(positions) for _ in range(n))) for i, n in enumerate(views_of))
    queries = tuple(Entry(entry_id=f"q{i}", inputs=(next(positions),)) for i in range(3))
    outputs = {i: [unit(5, seed=i), unit(7, seed=100 + i)] for i in range(10)}
    weights = rng.uniform(0.5, 2, 2).tolist()
    found = rank(Search(direction="mesh_to_image", queries=queries, gallery=gallery), outputs, rule="concatenate", weights=weights, top_k=3)
    for query in queries:
        scores = []
        for item in gallery:
            score = 0.0
            for member, weight in enumerate(weights):
                mean = sum(outputs[i][member].astype(float) for i in item.inputs)
                cosine = mean @ outputs[query.inputs[0]][member] / np.sqrt(mean @ mean)
                score += weight / sum(weights) * cosine
            scores.append((-score, item.entry_id))
        wanted = sorted(scores)[:3]
        rows = [answer for answer in found if answer.query == query.entry_id]
        assert [row.answer for row in rows] == [name for _, name in wanted]
        assert [row.rank for row in rows] == [1, 2, 3]
        np.testing.assert_allclose([row.score for row in rows], [-score for score, _ in wanted], atol=1e-6)


def test_rank_unreadable_files_leave_out_what_has_no_other():
    gallery = (Entry(entry_id="a", inputs=(0, 1)), Entry(entry_id="b", inputs=(2,)))
    queries = (Entry(entry_id="x", inputs=(3,)), Entry(entry_id="y", inputs=(4,)))
    outputs = {1: [unit(4, seed=1)], 3: [unit(4, seed=3)]}
    found = rank(Search(direction="image_to_mesh", queries=queries, gallery=gallery), outputs, rule="concatenate", weights=[1.0], top_k=5)
    assert [(row.query, row.answer) for row in found] == [("x", "a")]
    assert found[0].score == pytest.approx(float(unit(4, seed=1) @ unit(4, seed=3)), abs=1e-6)


# --- submission ---------------------------------------------------------------------------------------------------------------------------
def test_submission_puts_directions_side_by_side_and_ends_the_shorter_in_empty_cells():
    answers = [
        Answer(direction=direction, query=query, rank=place, answer=answer, score=1 / place)
        for direction, query, best in (
            ("image_to_mesh", "10", ["m3", "m1"]),
            ("image_to_mesh", "2", ["m2", "m'1"]),
            ("mesh_to_image", "part", ["i9"]),
        )
        for place, answer in enumerate(best, start=1)
    ]
    header, *rows = submission(answers)
    assert header == ["id", "image_to_mesh_image", "image_to_mesh_mesh", "mesh_to_image_mesh", "mesh_to_image_image"]
    assert [row[:2] + row[3:4] for row in rows] == [["0", "10", "part"], ["1", "2", ""]]
    assert [ast.literal_eval(row[2]) for row in rows] == [["m3", "m1"], ["m2", "m'1"]]
    assert rows[0][4] == "['i9']"
    assert rows[1][4] == ""
