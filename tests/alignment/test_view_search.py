"""Answers by rendered views and turned pictures, the cache of views, and the flags, on tiny members and small parts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cad_models.alignment import fusion, view_search
from cad_models.alignment.answers import rank, read_input
from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.view_cache import ViewCache
from cad_models.common.encoders import build_encoder
from cad_models.common.images import decode_image, encode_png
from cad_models.common.meshes import read_mesh
from cad_models.common.rendering import query_cameras, render_views, ring_cameras
from cad_models.ensemble import InputProcessor, answer, load_ensemble, write_ensemble
from cad_models.task import Entry, Input, Search
from rayjobs.cli import parse_job
from rayjobs.infer import InferJob
from tests.rayjobs.members import TASK, write_tiny_member

VIEWS, NUM_PARTS = 3, 3
WEIGHTS = {"fusion": {"point": 0.2, "view": 0.5, "frozen": 0.3}}


def unit(*shape: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


# --- ranking ------------------------------------------------------------------------------------------------------------------------------
def outputs_of(seed: int, *, mesh: bool, rolls: int = 1, encoders: int = 1, dims: tuple[int, ...] = (5, 7)) -> list[np.ndarray]:
    """What a predictor gives for one input: two members' embeddings, of a mesh those of its views, and the encoders'."""
    heads = [unit(*(() if mesh or rolls == 1 else (rolls,)), dim, seed=100 * seed + m) for m, dim in enumerate(dims)]
    views = [unit(VIEWS, dim, seed=100 * seed + 10 + m).astype(np.float16) for m, dim in enumerate(dims)] if mesh else []
    raws = [(3 * unit(VIEWS if mesh else rolls, 9, seed=100 * seed + 20 + e)).astype(np.float16) for e in range(encoders)]
    return [*heads, *views, *raws]


def entries(prefix: str, counts: list[int], start: int) -> tuple[Entry, ...]:
    ends = start + np.cumsum([0, *counts])
    return tuple(Entry(entry_id=f"{prefix}{i}", inputs=tuple(range(ends[i], ends[i + 1]))) for i in range(len(counts)))


def naive_scores(picture: list[list[np.ndarray]], mesh: list[np.ndarray], weights: list[float], encoders: int) -> float:
    """One object of several upright pictures and one mesh, two members."""
    share = np.array(weights) / sum(weights)
    point = view = frozen = 0.0
    for m in range(2):
        mean = sum(outputs[m].astype(float) for outputs in picture) / len(picture)
        point += share[m] * cosine(mean if len(picture) > 1 else picture[0][m], mesh[m])
    for outputs in picture:
        view += max(sum(share[m] * cosine(outputs[m], mesh[2 + m][v]) for m in range(2)) for v in range(VIEWS)) / len(picture)
        by_encoder = share if encoders == 2 else [1.0]
        frozen += max(sum(s * cosine(outputs[2 + e][0], mesh[4 + e][v]) for e, s in enumerate(by_encoder)) for v in range(VIEWS)) / len(picture)
    w = WEIGHTS["fusion"]
    return w["point"] * point + w["view"] * view + w["frozen"] * frozen


@pytest.mark.parametrize("encoders", [1, 2])
@pytest.mark.parametrize("direction", ["image_to_mesh", "mesh_to_image"])
def test_rank_by_views_equals_a_loop_over_members_pictures_and_views(direction, encoders):
    counts = [1, 1, 1, 1] if direction == "image_to_mesh" else [1, 3, 2, 1]
    pictures, meshes = entries("p", counts, 0), entries("m", [1] * 5, sum(counts))
    outputs = {i: outputs_of(i, mesh=i >= sum(counts), encoders=encoders) for i in range(sum(counts) + 5)}
    asked, among = (pictures, meshes) if direction == "image_to_mesh" else (meshes, pictures)
    weights, signatures = [3.0, 1.0], [{"encoder_digest": "a"}, {"encoder_digest": "b" if encoders == 2 else "a"}]
    found = rank(
        Search(direction=direction, queries=asked, gallery=among), outputs, rule="concatenate", weights=weights, top_k=3, fitted=WEIGHTS, signatures=signatures
    )
    for query in asked:
        scores = []
        for item in among:
            picture, mesh = (query, item) if direction == "image_to_mesh" else (item, query)
            scores.append((naive_scores([outputs[i] for i in picture.inputs], outputs[mesh.inputs[0]], weights, encoders), item.entry_id))
        answers = [a for a in found if a.query == query.entry_id]
        assert [a.answer for a in answers] == [name for _, name in sorted(scores, key=lambda s: -s[0])[:3]]
        assert [a.rank for a in answers] == [1, 2, 3]
        np.testing.assert_allclose([a.score for a in answers], sorted((s for s, _ in scores), reverse=True)[:3], atol=2e-3)


@pytest.mark.parametrize("rendered", [True, False])
def test_turned_query_has_the_score_of_its_best_position(rendered):
    rolls, signatures = 4, [{"encoder_digest": "a"}, {"encoder_digest": "a"}]
    outputs = {0: outputs_of(0, mesh=False, rolls=rolls), **{i: outputs_of(i, mesh=True) for i in (1, 2, 3)}}
    if not rendered:
        outputs = {i: found[:2] for i, found in outputs.items()}
    search = Search(direction="image_to_mesh", queries=entries("p", [1], 0), gallery=entries("m", [1, 1, 1], 1))
    together = rank(search, outputs, rule="concatenate", weights=[1.0, 1.0], top_k=3, fitted=WEIGHTS, signatures=signatures)
    best: dict[str, float] = {}
    for roll in range(rolls):
        upright = [found[roll] for found in outputs[0][:2]] + [found[roll : roll + 1] for found in outputs[0][2:]]
        for a in rank(search, {**outputs, 0: upright}, rule="concatenate", weights=[1.0, 1.0], top_k=3, fitted=WEIGHTS, signatures=signatures):
            best[a.answer] = max(best.get(a.answer, -1.0), a.score)
    assert {a.answer: a.score for a in together} == pytest.approx(best, abs=1e-6)
    assert [a.answer for a in together] == sorted(best, key=lambda name: -best[name])


def test_rank_by_views_equal_objects_are_ordered_by_id_and_unread_files_left_out():
    outputs = {0: outputs_of(0, mesh=False), 2: outputs_of(5, mesh=True), 3: outputs_of(5, mesh=True)}
    search = Search(direction="image_to_mesh", queries=entries("p", [1], 0), gallery=entries("m", [1, 1, 1], 1))
    signatures = [{"encoder_digest": "a"}] * 2
    found = rank(search, outputs, rule="concatenate", weights=[1.0, 1.0], top_k=5, fitted=WEIGHTS, signatures=signatures)
    assert [a.answer for a in found] == ["m1", "m2"] and found[0].score == found[1].score
    assert rank(search, {0: outputs[0]}, rule="concatenate", weights=[1.0, 1.0], top_k=5, signatures=signatures) == []


def test_rank_by_views_does_not_depend_on_its_blocks(monkeypatch):
    outputs = {i: outputs_of(i, mesh=i >= 6) for i in range(11)}
    search = Search(direction="mesh_to_image", queries=entries("m", [1] * 5, 6), gallery=entries("p", [2, 1, 3], 0))
    arguments = {"rule": "concatenate", "weights": [1.0, 2.0], "top_k": 3, "fitted": WEIGHTS, "signatures": [{"encoder_digest": "a"}] * 2}
    whole = rank(search, outputs, **arguments)
    monkeypatch.setattr(view_search, "_BLOCK_PAIRS", 1)
    monkeypatch.setattr(fusion, "_BLOCK_ELEMENTS", 1)
    assert rank(search, outputs, **arguments) == whole


# --- files --------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two members with fitted weights, pictures and meshes."""
    from cad_models.alignment.parts import generate_part
    from tests.rayjobs.test_infer import write_off

    root = tmp_path_factory.mktemp("views")
    encoder = build_encoder("hog")
    members = [write_tiny_member(root / f"m{s}", seed=s, encoder_digest=encoder.digest, image_width=encoder.width) for s in (0, 1)]
    write_ensemble(root / "ensemble", members, fitted=WEIGHTS)
    for name in ("q", "g"):
        (root / name).mkdir()
    for i in range(NUM_PARTS):
        part = generate_part(i, 0)
        write_off(root / "g" / f"{part.object_id}.off", part.vertices, part.faces)
        write_off(root / "q" / f"{part.object_id}.off", part.vertices, part.faces)
        pictures = render_views(part.vertices, part.faces, query_cameras(2, i), size=96)
        (root / "q" / f"{part.object_id}.png").write_bytes(encode_png(pictures[0]))
        (root / "g" / f"{part.object_id}_0.png").write_bytes(encode_png(pictures[1]))
    return root


@pytest.fixture(scope="module")
def ensemble(place):
    return load_ensemble(place / "ensemble")


def answers_of(place, ensemble, options: AlignmentOptions):
    requests = TASK.list_requests(str(place / "q"), str(place / "g"), options=options)
    with InputProcessor(ensemble, options=options) as processor:
        found, rejects = answer(ensemble, requests, processor, top_k=NUM_PARTS)
        return found, rejects, processor.seconds


def test_infer_with_views_equals_scores_made_by_hand(place, ensemble):
    options = AlignmentOptions(gallery_views=VIEWS)
    found, rejects, _ = answers_of(place, ensemble, options)
    assert rejects == [] and {a.direction for a in found} == {"image_to_mesh", "mesh_to_image"}
    encoder, scores = build_encoder("hog"), {(a.direction, a.query, a.answer): a.score for a in found}
    plain = {(a.direction, a.query, a.answer): a.score for a in answers_of(place, ensemble, AlignmentOptions())[0]}
    picture = encoder.encode([decode_image((place / "q" / "part-000001.png").read_bytes())])[0].astype(np.float16)
    for i in range(NUM_PARTS):
        mesh = read_mesh(place / "g" / f"part-00000{i}.off")
        size = ensemble.members[0].recipe.data.image_size
        views = encoder.encode(list(render_views(mesh.vertices, mesh.faces, ring_cameras(VIEWS), size=size))).astype(np.float16)
        by_view = []
        for view in views:
            pairs = [m.learner.embed_images(torch.from_numpy(np.stack([picture, view]).astype(np.float32))).detach().numpy() for m in ensemble.members]
            by_view.append(np.mean([cosine(a, b) for a, b in pairs]))
        key = ("image_to_mesh", "part-000001", f"part-00000{i}")
        wanted = 0.2 * plain[key] + 0.5 * max(by_view) + 0.3 * max(cosine(picture, view) for view in views)
        assert scores[key] == pytest.approx(wanted, abs=1e-3)


def test_infer_default_options_render_nothing(place, ensemble):
    item = TASK.list_requests(str(place / "q"), str(place / "g")).inputs[-1]
    predictor = TASK.predictor(ensemble.members)
    columns = read_input(Input(kind="mesh", source="m", uri=str(place / "g" / "part-000000.off")), predictor.settings)
    assert "views" not in columns and item.kind in ("image", "mesh")
    del columns["thumbnail"]
    assert [output.shape for output in predictor.predict([columns])[0]] == [(64,), (64,)]


def test_second_question_renders_nothing_and_gives_the_same_answers(place, ensemble, tmp_path):
    options = AlignmentOptions(gallery_views=VIEWS, cache=str(tmp_path / "cache"))
    first, _, _ = answers_of(place, ensemble, options)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == NUM_PARTS  # the same mesh among queries and gallery is one file
    reads = [
        read_input(Input(kind="mesh", source="m", uri=str(place / "g" / "part-000001.off")), TASK.predictor(ensemble.members, options=chosen).settings)
        for chosen in (options, dataclasses.replace(options, gallery_views=VIEWS + 1), dataclasses.replace(options, cache=""))
    ]
    assert ["views" in columns for columns in reads] == [False, True, True]
    second, _, seconds = answers_of(place, ensemble, options)
    assert second == first == answers_of(place, ensemble, AlignmentOptions(gallery_views=VIEWS))[0]
    assert seconds["write cache"] == 0.0
    files[0].write_bytes(files[0].read_bytes()[:-10])  # a broken file is made anew
    assert answers_of(place, ensemble, options)[0] == first
    assert answers_of(place, ensemble, options)[2]["write cache"] == 0.0


def test_view_cache_knows_what_its_numbers_depend_on(tmp_path):
    views = unit(3, 4, seed=0).astype(np.float16)
    cache = ViewCache(str(tmp_path / "c"), num_views=3, view_size=96)
    assert cache.read("mesh", "encoder") is None
    cache.write("mesh", "encoder", views)
    assert np.array_equal(cache.read("mesh", "encoder"), views)
    assert cache.read("other", "encoder") is None and cache.read("mesh", "other") is None
    assert ViewCache(str(tmp_path / "c"), num_views=3, view_size=97).read("mesh", "encoder") is None
    assert ViewCache(str(tmp_path / "c"), num_views=4, view_size=96).read("mesh", "encoder") is None


def test_turned_pictures_are_queries_alone_and_score_no_worse(place, ensemble):
    options = AlignmentOptions(query_rolls=3)
    requests = TASK.list_requests(str(place / "q"), str(place / "g"), options=options)
    kinds = {search.direction: {requests.inputs[i].kind for e in search.queries + search.gallery for i in e.inputs} for search in requests.searches}
    assert kinds == {"image_to_mesh": {"turned_image", "mesh"}, "mesh_to_image": {"image", "mesh"}}
    turned, upright = answers_of(place, ensemble, options)[0], answers_of(place, ensemble, AlignmentOptions())[0]
    before = {(a.direction, a.query, a.answer): a.score for a in upright}
    for a in turned:
        key = a.direction, a.query, a.answer
        assert a.score >= before[key] - 1e-6 if a.direction == "image_to_mesh" else a.score == before[key]


# --- flags --------------------------------------------------------------------------------------------------------------------------------
def test_option_flags_may_leave_out_their_prefix():
    words = ["--task", "alignment", "--queries", "q"]
    long = parse_job(InferJob, [*words, "--options.gallery-views", "24", "--options.cache", "c"])
    assert parse_job(InferJob, [*words, "--gallery-views", "24", "--cache=c"]) == long
    assert long.options == AlignmentOptions(gallery_views=24, cache="c")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gallery-views", "-1"], "--options.gallery-views is -1: it must be from 0"),
        (["--query-rolls", "0"], "--options.query-rolls is 0: it must be from 1"),
        (["--cache", "c"], "add --options.gallery-views 24"),
    ],
)
def test_option_out_of_range_ends_with_the_flag_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_job(InferJob, ["--task", "alignment", "--queries", "q", *words])
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.replace("│", " ").split())
