"""Meshes with several vectors: the soft maximum, against loops, in losses, ranks, ensembles and answers."""

import numpy as np
import pytest
import torch

from cad_models.alignment import metrics, sides
from cad_models.alignment.answers import combine_embeddings, rank
from cad_models.alignment.metrics import learned_ranks, retrieval_metrics
from cad_models.alignment.similar_meshes import described
from cad_models.task import Entry, Search


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def naive_score(picture: np.ndarray, mesh: np.ndarray) -> float:
    cosines = [float(side.astype(np.float64) @ picture.astype(np.float64)) for side in mesh]
    return float(np.log(np.mean([np.exp(sides.SHARPNESS * c) for c in cosines])) / sides.SHARPNESS)


# --- the score ----------------------------------------------------------------------------------------------------------------------------
def test_soft_maximum_lies_between_mean_and_maximum_and_counts_the_best_side():
    cosines = torch.tensor([[0.9, -0.5, 0.1], [0.3, 0.3, 0.3], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    found = sides.pooled(cosines)
    assert bool((found <= cosines.amax(-1) + 1e-12).all()) and bool((found >= cosines.mean(-1) - 1e-12).all())
    assert found[1].item() == pytest.approx(0.3) and found[3].item() == pytest.approx(-1.0)
    assert found[0].item() == pytest.approx(0.9 - np.log(3) / sides.SHARPNESS, abs=1e-6)


def test_scores_equal_a_loop_and_do_not_depend_on_their_blocks(monkeypatch):
    pictures, meshes = unit(7, 5, seed=1), unit(6, 4, 5, seed=2)
    whole = sides.scores(pictures, meshes)
    np.testing.assert_allclose(whole, [[naive_score(p, m) for m in meshes] for p in pictures], atol=1e-6)
    monkeypatch.setattr(sides, "_BLOCK_ELEMENTS", 24)
    assert np.array_equal(sides.scores(pictures, meshes), whole)
    assert np.array_equal(sides.scores(pictures, meshes[:, :, :][::-1])[:, ::-1], whole)


def test_one_side_is_the_cosine():
    pictures, meshes = unit(3, 5, seed=1), unit(4, 5, seed=2)
    expected = pictures.astype(np.float64) @ meshes.astype(np.float64).T
    np.testing.assert_allclose(sides.scores(pictures, meshes), expected, atol=1e-7)
    np.testing.assert_allclose(sides.scores(pictures, meshes[:, None]), expected, atol=1e-6)


def test_ranks_by_blocks_are_those_of_the_whole_and_of_loops(monkeypatch):
    rng = np.random.default_rng(4)
    predictions = {
        "cad": unit(9, 3, 5, seed=5),
        "query": unit(9, 4, 5, seed=6),
        "num_queries": rng.integers(0, 5, 9),
        "group": np.array([0, 1, 1, 3, 4, 5, 6, 6, 8]),
    }
    predictions["num_queries"][:2] = 4, 0
    # Equal scores: they count against the query, whichever block they are in.
    predictions["cad"][5] = predictions["cad"][2]
    whole = learned_ranks(predictions)
    score = sides.scores(predictions["query"].reshape(-1, 5), predictions["cad"]).reshape(9, 4, 9)
    right = predictions["group"][:, None] == predictions["group"]
    places = [(o, v) for o in range(9) for v in range(int(predictions["num_queries"][o]))]
    expected = [1 + sum(score[o, v, m] >= score[o, v][right[o]].max() for m in range(9) if not right[o, m]) for o, v in places]
    assert whole[""].image_to_mesh.tolist() == expected
    for elements in (1, 10, 25):
        monkeypatch.setattr(metrics, "_SCORE_ELEMENTS", elements)
        for infix, found in learned_ranks(predictions).items():
            np.testing.assert_array_equal(found.image_to_mesh, whole[infix].image_to_mesh)
            np.testing.assert_array_equal(found.mesh_to_image, whole[infix].mesh_to_image)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 9])
def test_images_of_a_gallery_are_rows_of_all_averaged_views(size):
    rng = np.random.default_rng(size)
    views, count = rng.normal(size=(12, 7, 5)).astype(np.float32), rng.integers(0, 8, 12)
    count[3:5] = 0, 1
    runs = []
    for i, n in enumerate(count.tolist()):
        length = min(size, n) if size else n
        runs += [(i, start, start + length) for start in range(0, n - length + 1, length or 1) if n]
    means = [views[i, start:stop].astype(np.float64).mean(0) for i, start, stop in runs]
    expected = np.array([mean / np.linalg.norm(mean) for mean in means], dtype=np.float32)
    whole, owner = metrics.averaged_views(views, count, size)
    assert owner.tolist() == [i for i, _, _ in runs] and metrics._owners(count, size).tolist() == owner.tolist()
    np.testing.assert_array_equal(whole, expected)
    first = np.searchsorted(owner, owner)
    for rows in metrics.one_per_object(owner):
        np.testing.assert_array_equal(metrics._images(views, count, size, owner[rows], rows - first[rows]), whole[rows])


def test_no_pictures_or_meshes_have_no_scores():
    assert sides.scores(unit(0, 5), unit(3, 2, 5)).shape == (0, 3)
    assert sides.scores(unit(3, 5), unit(0, 2, 5)).shape == (3, 0)


def test_similarity_in_parts_has_the_values_and_gradients_of_the_whole(monkeypatch):
    def run():
        meshes, pictures = (torch.from_numpy(unit(*shape, seed=3)).double().requires_grad_() for shape in ((5, 3, 4), (6, 4)))
        found = sides.similarity(meshes, pictures)
        (found * torch.arange(30.0).view(5, 6)).sum().backward()
        return found.detach(), meshes.grad, pictures.grad

    whole = run()
    np.testing.assert_allclose(whole[0].numpy().T, sides.scores(unit(6, 4, seed=3), unit(5, 3, 4, seed=3)), atol=1e-6)
    monkeypatch.setattr(sides, "_TRAINING_BLOCK_ELEMENTS", 36)
    for part, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-12, rtol=0)


# --- figures ------------------------------------------------------------------------------------------------------------------------------
def test_metrics_of_sides_equal_those_of_a_single_vector_that_all_sides_share():
    n, queries = 9, 4
    predictions = {
        "query": unit(n, queries, 6, seed=5),
        "num_queries": np.array([4, 4, 3, 4, 1, 4, 2, 4, 4]),
        "group": np.array([0, 1, 2, 3, 4, 5, 6, 1, 8]),
        "cad": unit(n, 6, seed=6),
    }
    repeated = {**predictions, "cad": np.repeat(predictions["cad"][:, None], 5, axis=1)}
    assert retrieval_metrics(repeated) == retrieval_metrics(predictions)


def test_metrics_count_the_side_that_a_picture_shows():
    cad = unit(8, 3, 16, seed=7)
    predictions = {"query": cad[:, 1:2], "num_queries": np.ones(8, dtype=np.int64), "group": np.arange(8), "cad": cad.astype(np.float16)}
    found = retrieval_metrics(predictions)
    assert found["image_to_mesh/recall@1"] == found["mesh_to_image/recall@1"] == 1.0


# --- ensembles and answers ----------------------------------------------------------------------------------------------------------------
def test_members_agree_in_the_side_and_one_vector_stands_for_every_side():
    many, one, picture = unit(3, 4, 5, seed=1), unit(3, 7, seed=2), [unit(2, 5, seed=3), unit(2, 7, seed=4)]
    meshes = combine_embeddings([many, one], weights=[3.0, 1.0])
    pictures = combine_embeddings(picture, weights=[3.0, 1.0])
    assert meshes.shape == (3, 4, 12)
    for p in range(2):
        for m in range(3):
            cosines = [0.75 * float(many[m, s] @ picture[0][p]) + 0.25 * float(one[m] @ picture[1][p]) for s in range(4)]
            np.testing.assert_allclose(np.einsum("sd,d->s", meshes[m], pictures[p]), cosines, atol=1e-6)


@pytest.mark.parametrize("direction", ["image_to_mesh", "mesh_to_image"])
def test_answers_equal_a_loop_over_members_and_sides(direction):
    pictures = tuple(Entry(entry_id=f"p{i}", inputs=inputs) for i, inputs in enumerate(((0, 1), (2,), (3,))))
    meshes = tuple(Entry(entry_id=f"m{i}", inputs=(4 + i,)) for i in range(4))
    outputs = {i: [unit(5, seed=i), unit(7, seed=50 + i)] for i in range(4)}
    outputs |= {4 + i: [unit(3, 5, seed=100 + i).astype(np.float16), unit(3, 7, seed=200 + i).astype(np.float16)] for i in range(4)}
    to_mesh = direction == "image_to_mesh"
    search = Search(direction=direction, queries=pictures if to_mesh else meshes, gallery=meshes if to_mesh else pictures)
    found = rank(search, outputs, rule="concatenate", weights=[2.0, 1.0], top_k=2, signatures=[{"encoder_digest": "a"}] * 2)

    def score(picture: Entry, mesh: Entry) -> float:
        means = [np.mean([outputs[i][m].astype(np.float64) for i in picture.inputs], axis=0) for m in range(2)]
        means = [mean / np.linalg.norm(mean) for mean in means]
        cosines = [sum(w * outputs[mesh.inputs[0]][m][s].astype(np.float64) @ means[m] for m, w in ((0, 2 / 3), (1, 1 / 3))) for s in range(3)]
        return float(np.log(np.mean(np.exp(sides.SHARPNESS * np.array(cosines)))) / sides.SHARPNESS)

    for query in search.queries:
        scores = sorted((-(score(query, item) if to_mesh else score(item, query)), item.entry_id) for item in search.gallery)[:2]
        rows = [answer for answer in found if answer.query == query.entry_id]
        assert [row.answer for row in rows] == [name for _, name in scores]
        np.testing.assert_allclose([row.score for row in rows], [-value for value, _ in scores], atol=1e-6)


def test_turned_picture_has_the_score_of_its_best_position_among_meshes_with_sides():
    outputs = {0: [unit(4, 5, seed=1)], **{1 + i: [unit(3, 5, seed=10 + i)] for i in range(3)}}
    search = Search(
        direction="image_to_mesh",
        queries=(Entry(entry_id="q", inputs=(0,)),),
        gallery=tuple(Entry(entry_id=f"m{i}", inputs=(1 + i,)) for i in range(3)),
    )
    found = rank(search, outputs, rule="concatenate", weights=[1.0], top_k=3, signatures=[{"encoder_digest": "a"}])
    expected = {f"m{i}": max(naive_score(position, outputs[1 + i][0]) for position in outputs[0][0]) for i in range(3)}
    assert {row.answer: row.score for row in found} == pytest.approx(expected, abs=1e-6)


def test_mesh_to_mesh_compares_the_means_of_the_sides():
    outputs = {i: [unit(3, 5, seed=i)] for i in range(2)}
    found = described([Entry(entry_id=str(i), inputs=(i,)) for i in range(2)], outputs, rule="concatenate", weights=[1.0])
    means = np.stack([outputs[i][0].mean(axis=0) for i in range(2)])
    np.testing.assert_allclose(found.embeddings, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
