"""The model of scale: hand-computed cases."""

import dataclasses

import pytest

from benchmarks.scale_model import Assumptions, hours, simulated_makespan


def test_hours_halve_with_twice_the_gpus_where_nothing_is_exchanged():
    given = Assumptions(node_gb_per_s=1e12, link_gb_per_s=1e12, storage_gb_per_s=1e12)
    one, two = (hours(gpus, given, tflop=0.1, parameters=10**8) for gpus in (1, 2))
    for stage in ("prepare", "embed", "train"):
        assert two[stage] == pytest.approx(one[stage] / 2)
    assert two["cost"] == pytest.approx(one["cost"])


def test_embedding_takes_operations_over_rate():
    given = Assumptions(peak_tflops=100.0, utilization=0.5, image_tflop=0.5, views=8, query_views=2)
    assert hours(4, given, tflop=0.1, parameters=1)["embed"] == pytest.approx(1e6 * 10 * 0.5 / (4 * 50) / 3600)


def test_training_waits_for_storage_where_that_is_slower():
    slow = dataclasses.replace(Assumptions(), storage_gb_per_s=1e-3)
    found = hours(8, slow, tflop=0.1, parameters=10**8)
    assert found["train"] == pytest.approx(slow.epochs * 1e6 / slow.batch_size * found["read_ms"] / 1e3 / 3600)


def test_makespan_of_one_node_without_losses_is_the_least_possible():
    assert simulated_makespan(parts=50, nodes=1, losses_per_node_hour=0.0) == pytest.approx(1.0)


def test_makespan_grows_with_losses_and_is_the_same_for_a_seed():
    calm, rough = (simulated_makespan(parts=200, nodes=8, losses_per_node_hour=rate, seed=3) for rate in (0.0, 10.0))
    assert 1.0 <= calm < rough
    assert rough == simulated_makespan(parts=200, nodes=8, losses_per_node_hour=10.0, seed=3)
