"""What each part of the alignment recipe is worth: one row a change of the default recipe, several seeds each, on one dataset.

    PYTHONPATH=. python benchmarks/ablations.py --dataset ds/ --output outputs/ablations --list
    PYTHONPATH=. python benchmarks/ablations.py --dataset ds/ --output outputs/ablations --rows default pairs linear_head --seeds 0 1 2

The dataset needs the embeddings of ``hog`` (for the rival) and of every encoder that a row names. Runs that are finished are reused; ``ablations.json``
and ``ablations.md`` in the output folder cover all rows that have runs of all seeds. Figures are means over the seeds on the test split; intervals (95 %)
are bootstraps over objects of the seeds' mean, differences are paired: both sides answer the same queries, with the same resamples.
"""

import argparse
import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cad_models.alignment.fusion import fused_hits
from cad_models.alignment.metrics import Ranks, hits_by_object, learned_ranks, matching_ranks, query_bank_ranks, recalls
from cad_models.alignment.recipe import RECIPE
from cad_models.alignment.task import RUNS
from cad_models.checkpoint import Member, load_member
from cad_models.common.bootstrap import ratio_intervals
from cad_models.config import Recipe, replace_all
from cad_models.task import Columns, Predictions
from cad_models.tasks import TASKS
from rayjobs.champion import choose_members
from rayjobs.loop import LoopConfig
from rayjobs.named_runs import command_line
from rayjobs.predictions import predict_split
from rayjobs.resources import ScaleConfig
from rayjobs.streams import concatenated
from rayjobs.train import TrainJob, fit, loop_config

# Cheap to train: what the rest of the recipe is worth is seen with this point encoder.
_PAIRS = {"model.size": "pairs"}
_OF_PAIRS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "linear_head": {"model.num_experts": 1},
    "plain_experts": {"model.residual_head": False},
    "no_image_loss": {"loss.image_weight": 0.0},
    "no_augmented_views": {"data.augmented_share": 0.0},
    "hog": {"data.encoder": "hog"},
    "tiny": {"model.size": "tiny"},
    "tiny_with_pairs": {"model.size": "tiny", "model.pair_histogram": True},
    "before": {
        "data.encoder": "hog",
        "data.augmented_share": 0.0,
        "data.views_per_step": 0,
        "model.size": "tiny",
        "model.residual_head": False,
        "loss.image_weight": 0.0,
    },
    "balanced_experts": {"model.residual_head": False, "loss.balance_weight": 0.01, "loss.router_z_weight": 0.001},
    "rotation": {"data.augment.max_rotation_deg": 180.0},
    "no_scaling": {"data.augment.max_scale": 1.0, "data.augment.max_shift": 0.0},
    "no_ema": {"optim.ema_decay": 0.0},
    "views_24": {"data.views_per_step": 0},
    "embed_256": {"model.embed_dim": 256},
    "temperature_0.04": {"loss.temperature": 0.04},
    "tiny_no_normals": {"model.size": "tiny", "model.channels": "xyz"},
    "tiny_half_patches": {"model.size": "tiny", "model.patch_dropout": 0.5},
}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "default_linear_head": {"model.num_experts": 1},
    "default_no_augmented_views": {"data.augmented_share": 0.0},
    "default_hog": {"data.encoder": "hog"},
    "default_one_vector": {"model.side_vectors": False},
    "default_plain_experts": {"model.residual_head": False},
    "default_no_image_loss": {"loss.image_weight": 0.0},
    "default_no_ema": {"optim.ema_decay": 0.0},
    "default_rotation": {"data.augment.max_rotation_deg": 180.0},
    **{name: dict(RUNS[name].changes) for name in ("thorough", "thorough_upright")},
    **{name: {**_PAIRS, **change} for name, change in _OF_PAIRS.items()},
}
"""Name -> what the row changes in the default recipe (``before``: all that the ablations brought is taken back); each recipe is told by its command. All
rows but those named ``default`` and ``thorough`` have the encoder of point pairs."""

SHOWN = tuple(f"image_to_mesh/{infix}recall@{k}" for infix in ("", "crop/", "roll/", "roll_crop/") for k in (1, 3)) + ("mesh_to_image/recall@3",)

_TASK = TASKS["alignment"]

Hits = Mapping[str, tuple[np.ndarray, np.ndarray]]


def mean_hits(seeds: Sequence[Hits]) -> Hits:
    """Hits of each object, averaged over runs that answered the same queries."""
    return {name: (np.mean([hits[name][0] for hits in seeds], axis=0), counts) for name, (_, counts) in seeds[0].items()}


def figures(side: Hits, other: Hits | None = None) -> dict[str, tuple[float, float, float]]:
    """Metric -> (value, low, high) of a side, or of its difference to another one."""
    names = list(SHOWN)
    hits = np.stack([side[name][0] - (0 if other is None else other[name][0]) for name in names], axis=1)
    counts = np.stack([side[name][1] for name in names], axis=1)
    low, high = ratio_intervals(hits, counts)
    values = hits.sum(axis=0) / counts.sum(axis=0)
    return {name: (float(v), float(least), float(most)) for name, v, least, most in zip(names, values, low, high, strict=True)}


def recipe_of(row: str, seed: int, common: Mapping[str, Any]) -> Recipe:
    """The recipe of one run of a row."""
    return replace_all(RECIPE, {"data.encoder": "hog_polar", **common, **ROWS[row], "seed": seed})


def command_of(row: str, dataset: str, common: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What trains the same: one member a seed."""
    recipe = dataclasses.replace(recipe_of(row, 0, common), seed=RECIPE.seed)
    return shlex.join(command_line(TrainJob(task="alignment", recipe=recipe, dataset=dataset, seeds=tuple(seeds))))


class Bench:
    """Trains runs, or finds them finished, and ranks the test split by them.

    Args:
        common: Recipe changes of all rows: the budget.
    """

    def __init__(self, dataset: str, output: str, common: Mapping[str, Any], *, num_threads: int) -> None:
        self.dataset, self.output, self.common = dataset, output, common
        self.scale = ScaleConfig(num_workers=0, threads_per_worker=num_threads)

    def loop(self, recipe: Recipe, name: str) -> LoopConfig:
        """The loop's configuration of a run in this process."""
        return loop_config(
            task_name="alignment", recipe=recipe, dataset_uri=self.dataset, output=f"{self.output}/runs", name=name, scale=self.scale, plan=None
        )

    def train(self, row: str, seed: int) -> None:
        """Train a run unless it is finished."""
        loop = self.loop(recipe_of(row, seed, self.common), f"{row}-{seed}")
        started, cpu = time.monotonic(), time.process_time()
        done = (Path(self.output) / f"runs/{row}-{seed}/result.json").exists()
        if not fit(loop, None, quiet=True):
            raise SystemExit(f"{row}-{seed} was stopped: the same command goes on")
        if not done:
            seconds = {"wall_s": time.monotonic() - started, "cpu_s": time.process_time() - cpu}
            (Path(self.output) / f"runs/{row}-{seed}/seconds.json").write_text(json.dumps(seconds))
            print(f"{row}-{seed}: {seconds['wall_s']:.0f} s, {seconds['cpu_s']:.0f} s of CPU", flush=True)

    def best(self, row: str, seed: int) -> tuple[Member, LoopConfig]:
        """The best checkpoint of a finished run."""
        loop = self.loop(recipe_of(row, seed, self.common), f"{row}-{seed}")
        return load_member(Path(self.output) / f"runs/{row}-{seed}/best/mean"), loop

    def columns(self, recipe: Recipe, split: str) -> Columns:
        """A whole split as the recipe reads it."""
        return concatenated(list(getattr(self.loop(recipe, "unused"), split).parts(0, 1)))

    def rival(self) -> dict[str, Ranks]:
        """Render the gallery, match views: cosines of HOG."""
        return matching_ranks(self.columns(replace_all(RECIPE, {**self.common, "data.encoder": "hog"}), "test"))


def through_head(member: Member, columns: Columns) -> Columns:
    """The frozen embeddings of views and query images, replaced by the trained head's."""
    import torch

    changed = dict(columns)
    for name, value in columns.items():
        if name == "views" or name.startswith("query_views"):
            with torch.inference_mode():
                rows = torch.from_numpy(value.reshape(-1, value.shape[-1]).astype(np.float32))
                changed[name] = member.learner.embed_images(rows).numpy().reshape(*value.shape[:2], -1)
    return changed


def soup(bench: Bench, row: str, seed: int) -> Member:
    """Greedy soup of a run's kept checkpoints (arXiv:2203.05482): from the best on, each is averaged in if the validation split likes that."""
    member, loop = bench.best(row, seed)
    folder = Path(bench.output) / f"runs/{row}-{seed}"
    others = [load_member(found).learner.state_dict() for found in (*sorted(folder.glob("best/*")), folder / "last") if found.name != "mean"]
    kept, count = member.learner.state_dict(), 1
    kept = {name: value.clone() for name, value in kept.items()}
    best = _score(predicted(member, loop, "val"))
    for other in others:
        tried = {name: value + (other[name] - value) / (count + 1) if value.is_floating_point() else value for name, value in kept.items()}
        member.learner.load_state_dict(tried)
        score = _score(predicted(member, loop, "val"))
        if score >= best:
            kept, count, best = tried, count + 1, score
    member.learner.load_state_dict(kept)
    return member


def predicted(member: Member, loop: LoopConfig, split: str, *, more: bool = False) -> Predictions:
    """A member's predictions of a split; with the views that a fused score compares if asked for."""
    found = predict_split(_TASK, loop.recipe, member.learner, getattr(loop, split), "cpu", more=more)
    assert found is not None  # one process
    return found


def _score(predictions: Predictions) -> float:
    return recalls(learned_ranks(predictions))["recall@3"]


def _alone(predictions: Predictions) -> Hits:
    return hits_by_object(learned_ranks(predictions), len(predictions["group"]))


def _fused(val: Sequence[Predictions], test: Sequence[Predictions]) -> Hits:
    """The fused score of some runs, with weights fitted on the validation split."""
    rule = _TASK.combine_rules[0]
    hits = fused_hits(_TASK.combine(test, rule=rule, fitted=_TASK.fit_rule(val, rule=rule)))
    return {name.removeprefix("fused/"): of for name, of in hits.items() if name.startswith("fused/")}


def measured(bench: Bench, row: str, seeds: Sequence[int]) -> tuple[dict[str, Hits], dict[str, tuple[Predictions, Predictions]]]:
    """Sides that the runs of a row give: the model alone, its head on rendered views, its scores normalised by a bank, both fused, a soup of its
    checkpoints, the seeds' ensemble; and the runs' predictions of validation and test split."""
    found: dict[str, list[Hits]] = {name: [] for name in ("", ", head on 24 rendered views", ", query bank", ", fused with 24 rendered views", ", soup")}
    vals, tests = [], []
    for seed in seeds:
        member, loop = bench.best(row, seed)
        val, test = (predicted(member, loop, split, more=True) for split in ("val", "test"))
        train, columns = predicted(member, loop, "train"), bench.columns(loop.recipe, "test")
        number = len(test["group"])
        bank = train["query"][np.arange(train["query"].shape[1]) < train["num_queries"][:, None]]
        found[""].append(_alone(test))
        found[", head on 24 rendered views"].append(hits_by_object(matching_ranks(through_head(member, columns)), number))
        found[", query bank"].append(hits_by_object(query_bank_ranks(test, bank), number))
        found[", fused with 24 rendered views"].append(_fused([val], [test]))
        found[", soup"].append(_alone(predicted(soup(bench, row, seed), loop, "test")))
        vals.append(val)
        tests.append(test)
    sides = {f"{row}{name}": mean_hits(hits) for name, hits in found.items()}
    if len(seeds) > 1:
        sides[f"{row}, ensemble of {len(seeds)} seeds"] = _alone(_TASK.combine(tests))
        sides[f"{row}, ensemble of {len(seeds)} seeds, fused"] = _fused(vals, tests)
        best = max(range(len(seeds)), key=lambda i: found[""][i]["image_to_mesh/recall@3"][0].sum())
        sides[f"{row}, best seed on test"] = found[""][best]
    learned = [{name: column for name, column in p.items() if "view" not in name and "frozen" not in name} for p in (*vals, *tests)]
    return sides, {f"{row}-{seed}": (learned[i], learned[len(vals) + i]) for i, seed in enumerate(seeds)}


def chosen_on_validation(runs: Mapping[str, tuple[Predictions, Predictions]]) -> dict[str, Hits]:
    """The best of all rows' runs on the validation split, the ensemble that is chosen there greedily among them, and that one of its members which is
    best on the test split; all on the test split."""
    names = list(runs)
    best = max(names, key=lambda name: _score(runs[name][0]))
    positions, _ = choose_members([runs[name][0] for name in names], _TASK.combine, _score, _TASK.score)
    chosen = [names[i] for i in positions]
    alone = {name: _alone(runs[name][1]) for name in dict.fromkeys([best, *chosen])}
    top = max(chosen, key=lambda name: alone[name]["image_to_mesh/recall@3"][0].sum())
    return {
        f"best run on validation ({best})": alone[best],
        f"greedy ensemble ({', '.join(chosen)})": _alone(_TASK.combine([runs[name][1] for name in chosen])),
        f"best member of the greedy ensemble ({top})": alone[top],
    }


def table(sides: Mapping[str, Hits], other: str | None) -> str:
    """Markdown: a row a side, figures with intervals in points; differences to the side ``other`` where it is given."""
    titles = {name: name.removeprefix("image_to_mesh/").replace("recall@", "R@") for name in SHOWN}
    lines = ["| " + " | ".join(["row" if other is None else f"minus {other}", *titles.values()]) + " |", "| --- " * (len(SHOWN) + 1) + "|"]
    for name, side in sides.items():
        if name == other:
            continue
        found = figures(side, None if other is None else sides[other])
        sign = "" if other is None else "+"
        cells = [f"{100 * v:{sign}.0f} [{100 * low:{sign}.0f}, {100 * high:{sign}.0f}]" for v, low, high in found.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, then write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=RECIPE.schedule.num_epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="tell each row's command, and end")
    parser.add_argument("--train-only", action="store_true", help="train what is missing, and end")
    flags = parser.parse_args()
    # Evaluations cost as much as an epoch: a few of them are enough to pick a checkpoint.
    common = {"schedule.num_epochs": flags.epochs, "schedule.eval_every_epochs": max(1, flags.epochs // 8)}
    if flags.list:
        for row in flags.rows:
            print(f"{row}: {command_of(row, flags.dataset, common, flags.seeds)}")
        return
    bench = Bench(flags.dataset, flags.output, common, num_threads=flags.threads)
    for seed in flags.seeds:
        for row in flags.rows:
            bench.train(row, seed)
    if flags.train_only:
        return
    number = len(bench.columns(recipe_of(flags.rows[0], 0, common), "test")["group"])
    sides: dict[str, Hits] = {"rival: HOG on 24 rendered views": hits_by_object(bench.rival(), number)}
    runs: dict[str, tuple[Predictions, Predictions]] = {}
    for row in flags.rows:
        of_row, of_runs = measured(bench, row, flags.seeds)
        sides, runs = sides | of_row, runs | of_runs
    sides |= chosen_on_validation(runs)
    others = (next(iter(sides)), flags.rows[0], list(sides)[-1])  # the rival, the first row, the greedy ensemble's best member
    seconds = {
        row: [json.loads((Path(flags.output) / f"runs/{row}-{seed}/seconds.json").read_text())["cpu_s"] for seed in flags.seeds] for row in flags.rows
    }
    commands = {row: command_of(row, flags.dataset, common, flags.seeds) for row in flags.rows}
    result = {
        "dataset": flags.dataset,
        "seeds": flags.seeds,
        "epochs": flags.epochs,
        "cpu_seconds": seconds,
        "commands": commands,
        "recall": {name: figures(side) for name, side in sides.items()},
        "differences": {other: {name: figures(side, sides[other]) for name, side in sides.items() if name != other} for other in others},
    }
    (Path(flags.output) / "ablations.json").write_text(json.dumps(result, indent=1))
    text = "\n\n".join(
        [
            f"Test split, {number} objects, {len(flags.seeds)} seeds, {flags.epochs} epochs. Image -> mesh unless said otherwise, in points.",
            table(sides, None),
            *[table(sides, other) for other in others],
            "\n".join(f"- {row} ({np.mean(seconds[row]):.0f} s of CPU a run): `{commands[row]}`" for row in flags.rows),
        ]
    )
    (Path(flags.output) / "ablations.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
