"""Pictures and CAD files as people have them: thumbnails, renders, photos against their meshes and many others, learned and by matching rendered views.

    python -m benchmarks.image_cad_pairs --model outputs/runs/a/best/mean --model outputs/runs/b/best/mean --pairs pairs.csv --gallery meshes/ --dataset ds/

Image -> mesh: every picture of the CSV (columns image, cad, perhaps kind) among the CSV's meshes and those of the gallery folder, each geometry once.
Mesh -> image: every mesh of the CSV among its pictures. Files are read, masked, cropped, embedded and, for the fused score, rendered by the code of infer.py (`--gallery-views 24`; the crowd is left out). The rival renders 24 views
of every mesh and compares their HOG with that of the picture (the best view counts); "24 rolls" turns the picture in its plane so many times, and the best
counts. Intervals: 95 %, bootstrap over the CSV's meshes; differences are paired. With --dataset, the meshes of the CSV that were trained on are told.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.mesh_files import Pair, duplicate_groups, read_pairs
from benchmarks.tables import Figure, cell, markdown, named_ensemble, splits_by_digest, with_intervals
from cad_models.alignment.answers import combine_embeddings
from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.sides import scores as side_scores
from cad_models.common.cameras import ring_cameras
from cad_models.common.encoders import ImageEncoder, build_encoder
from cad_models.common.images import decode_image, prepare_image
from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, normalized, read_mesh
from cad_models.common.near_duplicates import near_duplicates, shape_points
from cad_models.common.points import sample_surface
from cad_models.common.rendering import render_views
from cad_models.common.score_ranks import score_ranks
from cad_models.ensemble import Ensemble, InputProcessor, ranked
from cad_models.task import Entry, Input, Requests, Search

KS = (1, 3, 10)
NUM_ROLLS = 24
NUM_VIEWS = 24
RIVAL = "rendered views, HOG"
FUSED = "fused with rendered views"
ROLLED = f", {NUM_ROLLS} rolls"
_VIEW_SIZE = 224
# Pixels of the square in which a picture is turned, and its rim: the corners of the part's box stay inside at any angle.
_ROLL_SIZE, _ROLL_MARGIN = 448, 0.16


def rolled(image: np.ndarray, count: int) -> list[np.ndarray]:
    """The picture turned in its plane by multiples of 360 / count degrees, on white; the first is the picture itself.

    Args:
        image: uint8 [height, width, 3].

    Returns:
        uint8 arrays, the others [448, 448, 3].
    """
    square = Image.fromarray(prepare_image(image, size=_ROLL_SIZE, margin=_ROLL_MARGIN))
    turned = [square.rotate(360 * k / count, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)) for k in range(1, count)]
    return [image, *(np.array(picture) for picture in turned)]


def best_views(queries: Sequence[np.ndarray], views: Sequence[np.ndarray]) -> np.ndarray:
    """Cosine of the best pair of a query's versions and a mesh's views, float64 [queries, meshes].

    Args:
        queries: [versions, width] a query.
        views: [views, width] a mesh.
    """
    stacked = np.concatenate([_unit(v) for v in views])
    starts = np.cumsum([0, *(len(v) for v in views[:-1])])
    return np.stack([np.maximum.reduceat((_unit(q) @ stacked.T).max(axis=0), starts) for q in queries])


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# --- scores -------------------------------------------------------------------------------------------------------------------------------
def learned_scores(ensemble: Ensemble, images: Sequence[Path], meshes: Sequence[Path]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Method -> scores [images, meshes] as infer.py would give them, and with rolls; the files that cannot be read.

    Methods are every member and the ensemble by the learned score alone, and the ensemble fused with rendered views.
    """
    options = AlignmentOptions(gallery_views=NUM_VIEWS, query_rolls=NUM_ROLLS)
    kinds = (("image", images), ("turned_image", images), ("mesh", meshes))
    inputs = tuple(Input(kind=kind, source=path.name, uri=str(path)) for kind, paths in kinds for path in paths)
    rows, told = [], time.monotonic()
    with InputProcessor(ensemble, options=options) as processor:
        for i, item in enumerate(inputs, start=1):
            rows += processor.process([item])
            if time.monotonic() - told > 20:
                print(f"{i} of {len(inputs)} files read", file=sys.stderr, flush=True)
                told = time.monotonic()
    bad = [item.source for item, row in zip(inputs, rows, strict=True) if row.reject]
    if bad:
        return {}, list(dict.fromkeys(bad))
    once, twice = len(images), 2 * len(images)
    # Pictures, the same turned [images, rolls, dim], meshes: each as every member sees them.
    parts = [[np.stack([row.outputs[m] for row in rows[chosen]]) for m in range(len(ensemble.members))] for chosen in _slices(once, twice)]
    named = {f"member {m + 1}": [part[m] for part in parts] for m in range(len(ensemble.members))}
    if len(ensemble.members) > 1:
        named["ensemble"] = [combine_embeddings(part, rule=ensemble.rule, weights=ensemble.weights) for part in parts]
    scores = {}
    for name, (upright, turned, gallery) in named.items():
        scores[name] = side_scores(upright, gallery)
        scores[name + ROLLED] = side_scores(turned.reshape(-1, turned.shape[-1]), gallery).reshape(len(turned), -1, len(gallery)).max(axis=1)
    gallery_entries = tuple(Entry(entry_id=str(i), inputs=(twice + i,)) for i in range(len(meshes)))
    for name, first in ((FUSED, 0), (FUSED + ROLLED, once)):
        asked = tuple(Entry(entry_id=str(i), inputs=(first + i,)) for i in range(len(images)))
        requests = Requests(inputs=inputs, searches=(Search(direction="image_to_mesh", queries=asked, gallery=gallery_entries),))
        answers = ranked(ensemble, requests, {i: row.outputs for i, row in enumerate(rows)}, top_k=len(meshes), options=options)
        scores[name] = np.full((len(images), len(meshes)), -np.inf)
        for found in answers:
            scores[name][int(found.query), int(found.answer)] = found.score
    return scores, []


def _slices(first: int, second: int) -> tuple[slice, slice, slice]:
    return slice(first), slice(first, second), slice(second, None)


def rival_scores(images: Sequence[Path], meshes: Sequence[Path], encoder: ImageEncoder) -> dict[str, np.ndarray]:
    """Scores [images, meshes] of matching rendered views, of the picture as it is and turned."""
    cameras = ring_cameras(NUM_VIEWS)
    views, told = [], time.monotonic()
    for i, path in enumerate(meshes, start=1):
        mesh = read_mesh(path)
        views.append(encoder.encode(list(render_views(mesh.vertices, mesh.faces, cameras, size=_VIEW_SIZE))))
        if time.monotonic() - told > 20:
            print(f"{i} of {len(meshes)} meshes rendered", file=sys.stderr, flush=True)
            told = time.monotonic()
    versions = [encoder.encode(rolled(decode_image(path.read_bytes()), NUM_ROLLS)) for path in images]
    return {RIVAL: best_views([v[:1] for v in versions], views), RIVAL + ROLLED: best_views(versions, views)}


# --- figures ------------------------------------------------------------------------------------------------------------------------------
def pair_figures(scores: Mapping[str, np.ndarray], cad: Sequence[int], kind: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Recalls of every method by direction and kind, and the paired differences of the learned ones from the rival with as many rolls.

    Args:
        scores: Method -> [images, meshes].
        cad: Of each image the column of its mesh.
        kind: Of each image.

    Returns:
        ``"<direction>/<kind>"`` -> ``{"num_queries", "num_meshes", "figures": {method: {"recall@1": ...}}}``; kind ``all`` first.
    """
    shown = np.array(cad)
    asking = np.unique(shown)
    relevant = shown[:, None] == np.arange(next(iter(scores.values())).shape[1])[None, :]
    told = {}
    for name in ("all", *dict.fromkeys(kind)):
        chosen = np.array([name in ("all", k) for k in kind])
        for direction in ("image_to_mesh", "mesh_to_image"):
            if direction == "image_to_mesh":
                ranks = {method: score_ranks(matrix[chosen], relevant[chosen]) for method, matrix in scores.items()}
                owner = shown[chosen]
            else:
                # Of one kind: its pictures are the right answers, the other kinds' of the same mesh are neither right nor wrong.
                owner = asking[relevant[chosen][:, asking].any(axis=0)]
                right = relevant & chosen[:, None]
                ranks = {m: score_ranks(matrix[:, owner].T, right[:, owner].T, (right | ~relevant)[:, owner].T) for m, matrix in scores.items()}
            hits = {(method, f"recall@{k}"): (found <= k).astype(np.float64) for method, found in ranks.items() for k in KS}
            for method in ranks:
                rival = RIVAL + ROLLED if method.endswith(ROLLED) else RIVAL
                if rival in ranks and method != rival:
                    hits |= {(method, f"recall@{k} - rival"): hits[method, f"recall@{k}"] - hits[rival, f"recall@{k}"] for k in KS}
            found = with_intervals({"\0".join(key): value for key, value in hits.items()}, owner)
            figures: dict[str, dict[str, Figure]] = {}
            for key, figure in found.items():
                method, figure_name = key.split("\0")
                figures.setdefault(method, {})[figure_name] = figure
            told[f"{direction}/{name}"] = {"num_queries": len(owner), "num_meshes": len(np.unique(owner)), "figures": figures}
    return told


def table(told: Mapping[str, dict[str, Any]]) -> str:
    """As Markdown; differences from the rival in points, at Recall@3."""
    rows = []
    for scope, row in told.items():
        direction, _, kind = scope.partition("/")
        for method, figures in row["figures"].items():
            difference = cell(figures["recall@3 - rival"], signed=True) if "recall@3 - rival" in figures else ""
            rows.append([direction.replace("_to_", " → "), f"{kind} ({row['num_queries']})", method, *(cell(figures[f"recall@{k}"]) for k in KS), difference])
    return markdown(["direction", "queries", "method", *(f"Recall@{k}" for k in KS), "Recall@3 less rival"], rows)


def unique_meshes(pairs: Sequence[Pair], gallery: Path) -> tuple[list[Path], dict[Path, int], dict[int, list[Path]]]:
    """The meshes to search in, each geometry once and the pairs' own first; position of every CAD file; all files of each position."""
    cads = list(dict.fromkeys(pair.cad for pair in pairs))
    others = sorted(path.absolute() for path in gallery.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    usable = [*cads]
    for path in others:
        try:
            read_mesh(path)
        except BadMesh as error:
            print(f"left out, {error.reason}: {path}", file=sys.stderr)
        else:
            usable.append(path)
    first = duplicate_groups(usable).tolist()
    kept = sorted(set(first))
    position = {original: i for i, original in enumerate(kept)}
    files: dict[int, list[Path]] = {}
    for path, original in zip(usable, first, strict=True):
        files.setdefault(position[original], []).append(path)
    return [usable[i] for i in kept], {cad: position[first[i]] for i, cad in enumerate(cads)}, files


def trained_on(cads: Mapping[Path, int], meshes: Sequence[Path], files: Mapping[int, Sequence[Path]], dataset: str) -> dict[str, list[str]]:
    """Split of the dataset -> CAD files that are in it, themselves or as an exact duplicate (by geometry) among the files of the search; ``nearly train``:
    those of which a near duplicate (`cad_models.common.near_duplicates`) is."""
    splits = splits_by_digest(dataset)
    split_of = {i: {splits.get(hashlib.sha256(path.read_bytes()).hexdigest(), "not in the dataset") for path in own} for i, own in files.items()}
    found: dict[str, list[str]] = {}
    for cad, position in cads.items():
        for split in split_of[position] - {"not in the dataset"} or {"not in the dataset"}:
            found.setdefault(split, []).append(cad.name)
    shapes = np.stack([shape_points(sample_surface(normalized(read_mesh(path)), 2_048, 0)[0]) for path in meshes])
    pairs = near_duplicates(shapes)
    alike = {a for i, j, _ in pairs for a, b in ((i, j), (j, i)) if "train" in split_of[b]}
    if near := [cad.name for cad, position in cads.items() if position in alike and "train" not in split_of[position]]:
        found["nearly train"] = near
    return found


def main() -> None:
    """Print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="as in infer.py; repeat for an ensemble")
    parser.add_argument("--pairs", required=True, help="CSV with the columns image, cad, perhaps kind; paths relative to it")
    parser.add_argument("--gallery", required=True, help="folder of further meshes to search in")
    parser.add_argument("--dataset", default="", help="dataset folder that the models were trained on")
    parser.add_argument("--no-rival", action="store_true", help="leave out the rival, which renders every mesh")
    parser.add_argument("--output", default="outputs/image_cad_pairs.json")
    flags = parser.parse_args()
    try:
        pairs = read_pairs(Path(flags.pairs))
        meshes, position, files = unique_meshes(pairs, Path(flags.gallery))
        seen = trained_on(position, meshes, files, flags.dataset) if flags.dataset else {}
        with named_ensemble(flags.model) as ensemble:
            images = [pair.image for pair in pairs]
            scores, bad = learned_scores(ensemble, images, meshes)
            members = [f"{name} ({member.digest[:12]})" for name, member in zip(ensemble.names, ensemble.members, strict=True)]
        if bad:
            raise ValueError(f"these files cannot be read: {', '.join(bad)}; leave them out")
        if not flags.no_rival:
            scores |= rival_scores(images, meshes, build_encoder("hog"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(pairs)} pictures of {len(position)} meshes; {len(meshes)} meshes to search in, each geometry once")
    for m, name in enumerate(members, start=1):
        print(f"member {m}: {name}")
    if seen:
        print("splits of the pairs' meshes: " + ", ".join(f"{len(names)} {split}" for split, names in sorted(seen.items())))
        for split, told in (("train", "trained on"), ("nearly train", "nearly trained on (a near duplicate was)")):
            print(f"{told}: {', '.join(sorted(seen.get(split, []))) or 'none of them'}")
    told = pair_figures(scores, [position[pair.cad] for pair in pairs], [pair.kind for pair in pairs])
    print(f"\n{table(told)}")
    result = {"members": members, "num_meshes": len(meshes), "pairs_by_split": seen, "figures": told}
    Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
    Path(flags.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{flags.output}")


if __name__ == "__main__":
    main()
