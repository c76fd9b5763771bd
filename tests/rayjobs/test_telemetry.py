"""Gauges for Prometheus, and the Grafana dashboard that shows them."""

import json
import math
import re
import subprocess
import sys

import pytest

from rayjobs import telemetry
from rayjobs.telemetry import GAUGES, show
from tests.shared import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "cluster/grafana/cad.json").read_text())
# Ray's own, as its agents and its autoscaler serve them.
RAYS = {"ray_node_cpu_count", "ray_node_cpu_utilization", "ray_object_store_memory", "ray_tasks", "autoscaler_pending_nodes"}


def expressions() -> list[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    return variables + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_asks_for_metrics_that_there_are_and_shows_all_of_ours():
    asked = {name for text in expressions() for name in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+", text)}
    assert {f"ray_{name}" for name in GAUGES} == asked - RAYS, "every gauge has its panel, and no panel asks for another"


def test_dashboard_filters_and_legends_name_tags_that_the_gauges_have():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"ray_(cad_[a-z_]+)", target["expr"])
            tags = {tag for name in names for tag in GAUGES[name][1]}
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) | set(re.findall(r'\{(\w+)=', target["expr"]))
            assert not names or used <= tags, (panel["title"], used, tags)


def test_panels_do_not_overlap_and_have_their_own_numbers():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_without_ray_nothing_is_set_and_ray_is_not_loaded():
    code = "import sys; from rayjobs.telemetry import show; show({'cad_job_done': 1.0}, job='prepare'); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


class FakeGauge:
    def __init__(self, name, description, tag_keys):
        self.name, self.tag_keys, self.calls = name, tag_keys, []

    def set(self, value, tags):
        assert set(tags) == set(self.tag_keys), (self.name, tags)
        self.calls.append((value, tags))


@pytest.fixture
def gauges(monkeypatch):
    """All gauges as fakes that check their tags; as if Ray ran."""
    import ray

    made = {name: FakeGauge(name, *description_and_tags) for name, description_and_tags in GAUGES.items()}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(telemetry, "_gauge", made.__getitem__)
    return made


def test_what_is_not_finite_is_left_out(gauges):
    show({"cad_job_done": 3, "cad_job_rate": math.nan}, job="embed")
    assert gauges["cad_job_done"].calls == [(3.0, {"job": "embed"})] and not gauges["cad_job_rate"].calls


def test_a_run_and_a_search_set_every_gauge_of_theirs(gauges, tmp_path):
    from cad_models.dataset import Folder
    from rayjobs.live_runs import LiveSearch
    from rayjobs.loop import Training
    from rayjobs.progress import Progress
    from rayjobs.search import SearchConfig
    from rayjobs.trials import TrialSetting, run_here
    from tests.rayjobs.test_loop import RECIPE, TASK, config_of
    from tests.synthetic import make_dataset

    dataset = make_dataset(str(tmp_path / "ds"), 40, recipe=RECIPE).uri
    config = config_of(dataset, tmp_path / "run")
    Training(config).run()
    assert [value for value, _ in gauges["cad_train_epoch"].calls] == [1.0, 2.0, 3.0]
    assert gauges["cad_val_score"].calls[0][1] == {"task": "alignment", "run": "run"}
    best = [value for value, _ in gauges["cad_val_best_score"].calls]
    assert best == sorted(best) and best[-1] == max(value for value, _ in gauges["cad_val_score"].calls)
    Progress("prepare", 4, "objects").add(4)
    assert gauges["cad_job_done"].calls[-1] == (4.0, {"job": "prepare"})

    search = LiveSearch(
        folder=Folder(str(tmp_path / "search")),
        task=TASK,
        base=RECIPE,
        config=SearchConfig(num_samples=2, scheduler="none"),
        on_start=lambda trial: None,
        on_end=lambda trial: None,
    )
    run_here(search, TrialSetting(folder=str(tmp_path / "search"), base=config, plan=None, cache_bytes=10**9))
    search._show()
    states = {tags["state"]: value for value, tags in gauges["cad_search_trials"].calls}
    assert states == {"left": 0.0, "running": 0.0, "complete": 2.0, "pruned": 0.0, "failed": 0.0}
    assert all(gauge.calls for gauge in gauges.values()), [name for name, gauge in gauges.items() if not gauge.calls]
