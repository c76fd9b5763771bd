"""Row 10. Epochs of training until a search has found its best Recall@3: the default search (TPE, asynchronous halving) beside random search.

Rival: random recipes of the same space, trained to the end. Both begin with the same base recipe (a poor one), of the same seed; five seeds. What
counts are epochs, not seconds, so trainings are tiny (boxes with noisy embeddings) and a recipe that both try is trained once. A random search that
has not got there within ``MOST`` times the default's epochs counts as having taken so many.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.generated_dataset import write_dataset
from benchmarks.measure import Comparison, Settings, row_main, times_better
from cad_models.alignment.recipe import SMOKE
from cad_models.config import digest, replace_all
from cad_models.tasks import TASKS
from rayjobs.loop import Training
from rayjobs.resources import ScaleConfig
from rayjobs.search import SearchConfig, Trial, ended, next_trial, should_stop
from rayjobs.train import loop_config

MOST = 3


class _Pruned(Exception):
    pass


class Curves:
    """Scores after every epoch of recipes, each trained once and no further than asked."""

    def __init__(self, dataset: Path, out: Path) -> None:
        self._dataset, self._out = dataset, out
        self._known: dict[str, dict[int, float]] = {}
        self._whole: set[str] = set()

    def scores(self, recipe) -> Iterator[tuple[int, float]]:
        """Epoch and score, one after the other; leave off to stop the training there."""
        # A training cannot be a generator, so it is trained in stretches: known epochs first, then to the end.
        key = digest(recipe)
        yield from sorted(self._known.get(key, {}).items())
        if key in self._whole:
            return
        seen = len(self._known.setdefault(key, {}))
        for epoch, score in self._trained(recipe, key):
            if epoch > seen:
                yield epoch, score

    def _trained(self, recipe, key: str) -> Iterator[tuple[int, float]]:
        found = self._known[key]

        def report(metrics: dict[str, float]) -> None:
            epoch = int(metrics["epoch"])
            found[epoch] = metrics[TASKS["alignment"].score.name]
            if epoch == stop_after:
                raise _Pruned

        # One epoch further at a time: a training resumes from its checkpoint, so no epoch is trained twice.
        for stop_after in range(len(found) + 1, recipe.schedule.num_epochs + 1):
            loop = loop_config(
                task_name="alignment", recipe=recipe, dataset_uri=str(self._dataset), output=str(self._out), name=key,
                scale=ScaleConfig(num_workers=0), plan=None,
            )  # fmt: skip
            try:
                Training(loop, report=report).run()
            except _Pruned:
                pass
            yield stop_after, found[stop_after]
        self._whole.add(key)


def search(base, config: SearchConfig, curves: Curves, *, goal: float | None, most_epochs: int) -> tuple[float, int]:
    """The best score, and the epochs trained when it was reached. With a ``goal`` it ends there, else after all trials; or at ``most_epochs``."""
    task, trials = TASKS["alignment"], []
    best, reached, spent = -1.0, 0, 0
    while len(trials) < config.num_samples and spent < most_epochs:
        trial: Trial | None = next_trial(task, base, config, trials)
        if trial is None:
            break
        own: dict[int, float] = {}
        pruned = False
        for epoch, score in curves.scores(replace_all(base, trial.values)):
            own[epoch] = score
            spent += 1
            if score > best:
                best, reached = score, spent
            if goal is not None and best >= goal:
                return best, reached
            others = [dict(other.scores) for other in trials]
            pruned = should_stop(
                config.scheduler, task.score, own, others, grace=config.grace(base.schedule.num_epochs), num_epochs=base.schedule.num_epochs
            )
            if pruned:
                break
        trials.append(ended(trial, "pruned" if pruned else "complete", task.score, scores=own, seconds=0.0, best=None if pruned else max(own.values())))
    return best, most_epochs if goal is not None else reached


def run(settings: Settings) -> list[Comparison]:
    """Both searches for every seed."""
    num_samples, repeats = settings.pick(32, 4), settings.pick(5, 1)
    changes = {
        "data.num_points": 128, "model.num_points": 128, "batch_size": 16, "schedule.num_epochs": settings.pick(9, 2),
        "schedule.num_warmup_epochs": 0.5, "optim.lr": 1e-4, "optim.head_lr": 3e-4, "loss.temperature": 0.2, "model.embed_dim": 512, "model.size": "pairs",
    }  # fmt: skip
    base = replace_all(SMOKE, changes)
    ours, theirs, scores = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        dataset = Path(scratch) / "dataset"
        write_dataset(dataset, base, num_objects={"train": settings.pick(96, 32), "val": settings.pick(192, 32)}, width=64, noise=0.05)
        for seed in range(repeats):
            curves = Curves(dataset, Path(scratch) / f"runs-{seed}")
            seeded = replace_all(base, {"seed": seed})
            config = SearchConfig(num_samples=num_samples, seed=seed)
            best, epochs = search(seeded, config, curves, goal=None, most_epochs=num_samples * base.schedule.num_epochs)
            rival = SearchConfig(num_samples=10_000, seed=seed, scheduler="none", num_startup_trials=10_000)
            _, random_epochs = search(seeded, rival, curves, goal=best, most_epochs=MOST * epochs)
            ours.append(float(epochs))
            theirs.append(float(random_epochs))
            scores.append(best)
    ratio, low, high = times_better(ours, theirs)
    note = f"{num_samples} trials of {base.schedule.num_epochs} epochs, 5 seeds, at most {MOST}; Recall@3 {statistics.median(scores):.2f}"
    return [
        Comparison(
            row=10, what="tuning to the default search's best Recall@3", against="random search, no pruning", unit="epochs", ours=statistics.median(ours),
            theirs=statistics.median(theirs), ratio=ratio, low=low, high=high, num_rounds=repeats, at_least=2, note=note,
        )  # fmt: skip
    ]


if __name__ == "__main__":
    row_main(run)
