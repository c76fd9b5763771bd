"""What Prometheus sees of the jobs: each node's Ray agent serves these gauges beside Ray's own, under names that begin with ``ray_cad_``.

``cluster/grafana/cad.json`` shows them. MLflow has the history of every run; these are for watching a cluster while it works.
"""

import functools
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

GAUGES = {
    "cad_job_done": ("Finished units (objects, files, trials) of a job.", ("job",)),
    "cad_job_total": ("Units of a job in all.", ("job",)),
    "cad_job_rate": ("Units per second that a job has finished since it started.", ("job",)),
    "cad_train_epoch": ("Finished epochs of a run.", ("task", "run")),
    "cad_train_loss": ("Mean training loss since the last evaluation.", ("task", "run")),
    "cad_train_objects_per_s": ("Objects per second that a run trains on, all workers together.", ("task", "run")),
    "cad_train_workers": ("Workers of a run.", ("task", "run")),
    "cad_val_score": ("The task's score (for alignment Recall@3) on the validation split, last evaluation.", ("task", "run")),
    "cad_val_best_score": ("The best of a run's evaluations.", ("task", "run")),
    "cad_search_trials": ("Trials of a search by state: left, running, complete, pruned, failed.", ("task", "search", "state")),
    "cad_search_best_score": ("The best score of a search's trials.", ("task", "search")),
}
"""Name -> (description, names of its tags)."""


def show(values: Mapping[str, float], **tags: str) -> None:
    """Set gauges, by their names in `GAUGES`; nothing without Ray, and nothing of what is not finite."""
    ray = sys.modules.get("ray")  # a job that runs without Ray must not load it for this
    if ray is None or not ray.is_initialized():
        return
    for name, value in values.items():
        if math.isfinite(value):
            _gauge(name).set(float(value), tags=tags)


@functools.cache
def _gauge(name: str) -> "Gauge":
    from ray.util.metrics import Gauge

    description, tags = GAUGES[name]
    return Gauge(name, description=description, tag_keys=tags)
