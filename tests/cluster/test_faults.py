"""Faults on a fake cluster of several nodes: what a training loses, and what it ends with."""

import pytest

from cluster.local.start import LocalCluster, running
from tests.cluster.chaos import Chaos, disturb
from tests.cluster.fault_matrix import RECIPE, Matrix, Setting, disk_full, store_stopped
from tests.synthetic import make_dataset


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_search_under_random_kills_ends_with_the_undisturbed_table(tmp_path):
    outcome = disturb(Chaos(kills=4, seed=3, trials=3, epochs=120, shortest_s=3, longest_s=8), tmp_path)
    assert len(outcome.kills) == 4, outcome.log
    assert outcome.undisturbed == outcome.disturbed, outcome.log


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_disk_that_is_full_and_an_object_store_that_stops_cost_no_result(tmp_path):
    with running(LocalCluster(max_nodes=1)) as cluster:
        setting = Setting(Matrix(epochs=24), tmp_path, make_dataset(str(tmp_path / "ds"), 40, recipe=RECIPE).uri, cluster)
        rows = [store_stopped(setting, seconds=8.0), disk_full(setting)]
    for row in rows:
        assert row.note.startswith("not tried") or (row.equal and row.epochs_lost == 0), row
    assert "No space left on device" in rows[1].note or rows[1].note.startswith("not tried"), rows[1]
