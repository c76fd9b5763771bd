"""How much histograms tell of the class, measured so that no exact duplicate helps: k-fold cross-validation over unique shapes, and a given split.

    python -m cad_models.histograms.cross_validation --source histograms/                       # 10 folds x 5 repeats, model, hull and both
    python -m cad_models.histograms.cross_validation --source histograms/ --train train.tsv --test valid.tsv --recipe source_baseline

Of every group of exact duplicates one shape takes part; folds are stratified by class. In each fold a fresh model learns from the other folds, without
any look at the held-out one (no early stopping), and tells classes by the nearest class centre; ridge regression on the very same folds and inputs
stands beside it. With ``--train`` and ``--test`` (tables that name shapes) the split is taken as it is, and the test shapes that have no duplicate in
training are counted apart.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from cad_models.common.schedule import lr_factor
from cad_models.config import replace_all
from cad_models.histograms.data import duplicates, inspect_item, list_source, read_shape, shape_columns
from cad_models.histograms.features import feature_width, features
from cad_models.histograms.learner import HistogramLearner
from cad_models.histograms.metrics import class_centres, ridge_classifier
from cad_models.histograms.published import read_table
from cad_models.histograms.recipe import RECIPE, HistogramRecipe
from cad_models.histograms.task import HistogramTask
from cad_models.task import Reject


@dataclass(frozen=True)
class Shapes:
    """Shapes in memory.

    Attributes:
        ids: names.
        labels: int64 [n], positions in `class_names`.
        groups: int64 [n], equal for exact duplicates.
        histograms, distributions: as stored in a dataset, one row a shape.
    """

    ids: list[str]
    class_names: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray
    histograms: np.ndarray
    distributions: np.ndarray


def load_shapes(source: str, log2_chords: int) -> Shapes:
    """All usable shapes of a source, in this process; broken ones are named on the way."""
    items, inspections, columns = [], [], []
    for item in list_source(source).items:
        inspection = inspect_item(item)
        if isinstance(inspection, Reject):
            print(f"left out {item.source}: {inspection.reason}: {inspection.detail}")
            continue
        items.append(item)
        inspections.append(inspection)
        columns.append(shape_columns(read_shape(item.uri)[0], log2_chords))
    names = tuple(sorted({item.label for item in items}))
    return Shapes(
        ids=[item.object_id for item in items],
        class_names=names,
        labels=np.array([names.index(item.label) for item in items], dtype=np.int64),
        groups=np.array(duplicates(inspections), dtype=np.int64),
        histograms=np.stack([c["histograms"] for c in columns]),
        distributions=np.stack([c["distributions"] for c in columns]),
    )


def fitted(recipe: HistogramRecipe, rows: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"], num_classes: int) -> HistogramLearner:
    """A learner trained on rows in memory by the recipe: batches in a new random order every epoch, the recipe's schedule, no evaluation."""
    import torch

    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)
    learner = HistogramLearner(recipe, feature_width(recipe.data), num_classes)
    x, y = torch.from_numpy(rows), torch.from_numpy(labels)
    learner.adapt(iter([{"features": x}]))
    optimizer = learner.optimizers(recipe)["model"]
    peaks = [group["lr"] for group in optimizer.param_groups]
    size = min(recipe.batch_size, len(x))
    steps = len(x) // size
    schedule = recipe.schedule
    for position in range(schedule.num_epochs * steps):
        if position % steps == 0:
            order = torch.randperm(len(x))
        factor = lr_factor(
            position, num_steps=schedule.num_epochs * steps, num_warmup_steps=round(schedule.num_warmup_epochs * steps), min_ratio=schedule.min_lr_ratio
        )
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        chosen = order[position % steps * size :][:size]
        loss = learner({"features": x[chosen], "label": y[chosen]}, "model")["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return learner.eval()


def predicted_classes(
    learner: HistogramLearner, train: Float[np.ndarray, "n width"], labels: Int[np.ndarray, " n"], test: Float[np.ndarray, "m width"], num_classes: int
) -> Int[np.ndarray, " m"]:
    """The class whose centre, over the training rows, is nearest to each test row."""
    import torch

    with torch.inference_mode():
        embedded, asked = (learner.embed(torch.from_numpy(rows)).numpy() for rows in (train, test))
    scores = asked.astype(np.float64) @ class_centres(embedded, labels, num_classes).T
    return np.where(np.bincount(labels, minlength=num_classes) > 0, scores, -np.inf).argmax(axis=1)


@dataclass(frozen=True)
class Scores:
    """Accuracies of the model and of ridge regression on the same test rows: one a repeat."""

    model: list[float]
    ridge: list[float]


def cross_validate(shapes: Shapes, recipe: HistogramRecipe, *, num_folds: int, num_repeats: int) -> Scores:
    """Stratified k-fold over one shape of each group of duplicates; repeat *r* shuffles with seed *r*."""
    from sklearn.model_selection import StratifiedKFold

    unique = np.unique(shapes.groups, return_index=True)[1]
    rows = features(shapes.histograms[unique], shapes.distributions[unique], recipe.data)
    labels, count = shapes.labels[unique], len(shapes.class_names)
    scores = Scores([], [])
    for repeat in range(num_repeats):
        right = np.zeros(2)
        for train, test in StratifiedKFold(num_folds, shuffle=True, random_state=repeat).split(rows, labels):
            learner = fitted(replace(recipe, seed=recipe.seed + repeat), rows[train], labels[train], count)
            right[0] += (predicted_classes(learner, rows[train], labels[train], rows[test], count) == labels[test]).sum()
            right[1] += (ridge_classifier().fit(rows[train], labels[train]).predict(rows[test]) == labels[test]).sum()
        scores.model.append(float(right[0] / len(labels)))
        scores.ridge.append(float(right[1] / len(labels)))
    return scores


def given_split(shapes: Shapes, recipe: HistogramRecipe, train: np.ndarray, test: np.ndarray, *, num_seeds: int) -> tuple[Scores, Scores]:
    """Scores on the test shapes as they are, and on those without a duplicate in training; one a seed (ridge has none)."""
    rows, count = features(shapes.histograms, shapes.distributions, recipe.data), len(shapes.class_names)
    labels = shapes.labels
    fresh = ~np.isin(shapes.groups[test], shapes.groups[train])
    hits = ridge_classifier().fit(rows[train], labels[train]).predict(rows[test]) == labels[test]
    everything, unseen = Scores([], [_share(hits)]), Scores([], [_share(hits[fresh])])
    for seed in range(num_seeds):
        learner = fitted(replace(recipe, seed=recipe.seed + seed), rows[train], labels[train], count)
        hits = predicted_classes(learner, rows[train], labels[train], rows[test], count) == labels[test]
        everything.model.append(_share(hits))
        unseen.model.append(_share(hits[fresh]))
    return everything, unseen


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _positions(shapes: Shapes, table: Path) -> np.ndarray:
    read = read_table(table.read_text(), delimiter="," if table.suffix.lower() == ".csv" else "\t")
    if read is None:
        raise SystemExit(f"{table} is no table of shapes: it needs the columns uuid, obj_name")
    place = {object_id: i for i, object_id in enumerate(shapes.ids)}
    found = [place[object_id] for object_id in read.labels if object_id in place]
    if not found:
        raise SystemExit(f"{table} names none of the {len(shapes.ids)} shapes of --source")
    return np.array(found)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="as for prepare.py: a folder, or builtin:<N>")
    parser.add_argument("--recipe", default="published_histograms", choices=["default", *HistogramTask.runs], help="one of the task's named runs")
    parser.add_argument("--inputs", nargs="+", default=None, metavar="INPUT", help="one row of inputs, as: --inputs model hull; default: three rows")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="of the folds, or seeds with --train and --test")
    parser.add_argument("--train", type=Path, help="table of the shapes to learn from")
    parser.add_argument("--test", type=Path, help="table of the shapes to test")
    arguments = parser.parse_args()
    if (arguments.train is None) != (arguments.test is None):
        parser.error("--train and --test go together")
    changes = {} if arguments.recipe == "default" else HistogramTask.runs[arguments.recipe].changes
    recipe = replace_all(RECIPE, changes)
    try:
        own = [list(recipe.data.inputs)] if arguments.recipe.startswith("source_") else [["model"], ["hull"], ["model", "hull"]]
        choices = [arguments.inputs] if arguments.inputs else own
        recipes = [replace_all(recipe, {"data.inputs": inputs}) for inputs in choices]
        shapes = load_shapes(arguments.source, recipe.data.log2_chords)
    except ValueError as error:
        parser.error(str(error))
    num_unique = len(np.unique(shapes.groups))
    print(f"{len(shapes.ids):,} shapes of {len(shapes.class_names)} classes, {num_unique:,} of them unique; recipe {arguments.recipe}", flush=True)
    if arguments.train is None:
        print(f"{arguments.folds}-fold x {arguments.repeats} over unique shapes; accuracy, mean ± deviation of the repeats\n")
        print(_line(["inputs", "this model", "ridge"]), _line(["---"] * 3), sep="\n", flush=True)
        for one in recipes:
            scores = cross_validate(shapes, one, num_folds=arguments.folds, num_repeats=arguments.repeats)
            print(_line([" + ".join(one.data.inputs), _spread(scores.model), _spread(scores.ridge)]), flush=True)
        return
    train, test = _positions(shapes, arguments.train), _positions(shapes, arguments.test)
    shared = int(np.isin(shapes.groups[test], shapes.groups[train]).sum())
    print(f"{len(train)} shapes to learn from, {len(test)} to test, of which {shared} have an exact duplicate in training; {arguments.repeats} seeds\n")
    print(_line(["inputs", "this model", "ridge", "this model, no duplicates", "ridge, no duplicates"]), _line(["---"] * 5), sep="\n", flush=True)
    for one in recipes:
        started = time.monotonic()
        everything, unseen = given_split(shapes, one, train, test, num_seeds=arguments.repeats)
        cells = [_spread(s) for s in (everything.model, everything.ridge, unseen.model, unseen.ridge)]
        print(_line([" + ".join(one.data.inputs), *cells]), f" ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
