"""Mesh -> mesh: does the search find the other versions of a part? Recall@1 and mAP of point embedding, measures in file units, and both.

    python -m benchmarks.mesh_to_mesh --model models:/cad-alignment@champion --meshes meshes/ --families manifest.csv --dataset ds/

A query is a mesh whose family (CSV, columns path, family and perhaps dup_of) has other members; these are the right answers, among all meshes of the
folder. Its own file and its exact duplicates (dup_of) are no answers, neither right nor wrong. With --dataset, the queries of its test split are told
apart. Intervals: 95 %, bootstrap over families; differences are paired.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mesh_files import read_families
from benchmarks.tables import Figure, cell, markdown, named_ensemble, splits_by_digest, with_intervals
from cad_models.alignment.options import AlignmentOptions
from cad_models.alignment.similar_meshes import described, fused_scores
from cad_models.common.score_ranks import average_precisions, score_ranks
from cad_models.ensemble import InputProcessor

METHODS = {"point embedding": 0.0, "measures": 1.0}
"""Name -> ``scale_aware``; the fused ones are named by their weight."""


def family_figures(
    scores: dict[str, np.ndarray], family: Sequence[str], duplicate: Sequence[int], queries: np.ndarray
) -> tuple[dict[str, dict[str, Figure]], int, int]:
    """Recall@1 and mAP of each method, and paired differences from the first two: method -> figure's name -> figure; number of queries and families.

    Args:
        scores: Method -> [meshes, meshes].
        family: Of each mesh; "" = of none.
        duplicate: Number of the group of exact duplicates of each mesh.
        queries: bool [meshes], which may ask; those without a right answer are left out.
    """
    names, copies = np.array(family), np.array(duplicate)
    allowed = copies[:, None] != copies[None, :]
    relevant = (names[:, None] == names[None, :]) & (names != "")[:, None] & allowed
    rows = np.flatnonzero(queries & relevant.any(axis=1))
    values: dict[tuple[str, str], np.ndarray] = {}
    for method, matrix in scores.items():
        asked = matrix[rows], relevant[rows], allowed[rows]
        values[method, "recall@1"] = (score_ranks(*asked) <= 1).astype(np.float64)
        values[method, "map"] = average_precisions(*asked)
    for method in list(scores)[2:]:
        for rival in list(scores)[:2]:
            for figure in ("recall@1", "map"):
                values[method, f"{figure} - {rival}"] = values[method, figure] - values[rival, figure]
    numbers = np.unique(names[rows], return_inverse=True)[1]
    found = with_intervals({"\0".join(key): value for key, value in values.items()}, numbers)
    figures: dict[str, dict[str, Figure]] = {}
    for key, figure in found.items():
        method, name = key.split("\0")
        figures.setdefault(method, {})[name] = figure
    return figures, len(rows), len(np.unique(numbers))


def measure(models: Sequence[str], meshes: Path, families: Path, dataset: str, weights: Sequence[float]) -> dict[str, Any]:
    """All figures: ``{"scopes": {scope: {"num_queries", "num_families", "figures"}}, ...}``."""
    known = read_families(families, meshes)
    options = AlignmentOptions(scale_aware=max(weights))
    with named_ensemble(models) as ensemble:
        requests = ensemble.task.list_requests(str(meshes), str(meshes), direction="mesh_to_mesh", options=options)
        with InputProcessor(ensemble, options=options) as processor:
            outputs = {i: row.outputs for i, row in enumerate(processor.process(requests.inputs)) if row.reject is None}
        found = described(requests.searches[0].gallery, outputs, rule=ensemble.rule, weights=ensemble.weights)
        members = [f"{name} ({member.digest[:12]})" for name, member in zip(ensemble.names, ensemble.members, strict=True)]
    paths = [Path(requests.inputs[i].uri) for i in found.inputs.tolist()]
    family = [known[path].family if path in known else "" for path in paths]
    duplicate = _copies(paths, known)
    own = found.embeddings, found.measures
    scores = {name: fused_scores(own, own, scale_aware=weight) for name, weight in METHODS.items()}
    scores |= {f"both ({weight:g})": fused_scores(own, own, scale_aware=weight) for weight in weights}
    scopes = {"all": np.ones(len(paths), dtype=bool)}
    counts: dict[str, int] = {}
    if dataset:
        splits = splits_by_digest(dataset)
        split = np.array([splits.get(hashlib.sha256(path.read_bytes()).hexdigest(), "not in the dataset") for path in paths])
        counts = dict(Counter(split.tolist()))
        scopes = {"test": split == "test", **scopes}
    told = {}
    for scope, chosen in scopes.items():
        figures, num_queries, num_families = family_figures(scores, family, duplicate, chosen)
        told[scope] = {"num_queries": num_queries, "num_families": num_families, "figures": figures}
    return {"members": members, "num_meshes": len(paths), "num_unreadable": len(requests.inputs) - len(paths), "splits": counts, "scopes": told}


def _copies(paths: Sequence[Path], known: dict[Path, Any]) -> list[int]:
    """A number for each mesh, the same for exact duplicates."""
    position = {path: i for i, path in enumerate(paths)}
    first = []
    for i, path in enumerate(paths):
        original = known[path].duplicate_of if path in known else None
        first.append(position.get(original, i) if original else i)
    # dup_of may name a duplicate in its turn.
    while (further := [first[i] for i in first]) != first:
        first = further
    return first


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table: differences of the fused ones in points."""
    rows = []
    for scope, told in result["scopes"].items():
        for method, figures in told["figures"].items():
            differences = [cell(figures[f"{name} - {rival}"], signed=True) if f"{name} - {rival}" in figures else "" for rival in METHODS for name in ("map",)]
            rows.append([f"{scope} ({told['num_queries']} of {told['num_families']} families)", method, cell(figures["recall@1"]), cell(figures["map"]), *differences])
    return markdown(["queries", "method", "Recall@1", "mAP", *(f"mAP less {rival}" for rival in METHODS)], rows)


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="as in infer.py; repeat for an ensemble")
    parser.add_argument("--meshes", required=True, help="folder of meshes: queries and gallery")
    parser.add_argument("--families", required=True, help="CSV with the columns path, family, perhaps dup_of")
    parser.add_argument("--dataset", default="", help="dataset folder that the model was trained on: tells which meshes it has seen")
    parser.add_argument("--scale-aware", type=float, nargs="+", default=[AlignmentOptions().scale_aware], help="weights of the measures in the fused scores, above 0")
    parser.add_argument("--output", default="outputs/mesh_to_mesh.json")
    flags = parser.parse_args()
    try:
        if not all(0 < weight < 1 for weight in flags.scale_aware):
            raise ValueError(f"--scale-aware {' '.join(map(str, flags.scale_aware))}: each must lie between 0 and 1; 0 and 1 are measured anyway")
        result = measure(flags.model, Path(flags.meshes), Path(flags.families), flags.dataset, flags.scale_aware)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{result['num_meshes']} meshes, {result['num_unreadable']} unreadable; members: {', '.join(result['members'])}")
    if result["splits"]:
        print(f"seen in training: {result['splits'].get('train', 0)}; " + ", ".join(f"{name} {count}" for name, count in sorted(result["splits"].items())))
    print(f"\n{table(result)}")
    Path(flags.output).parent.mkdir(parents=True, exist_ok=True)
    Path(flags.output).write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{flags.output}")


if __name__ == "__main__":
    main()
