"""What fits into a cluster that may grow, without starting one: arithmetic, and who said how far it grows."""

import itertools
import json

import pytest
import yaml

from rayjobs.actor_pool import fit_pool
from rayjobs.capacity import Capacity, Node, NodeGroup, bootstrap_groups, cluster_capacity, room, told_groups
from rayjobs.resources import ScaleConfig, concurrent_trainings, fit_workers, forwarded_environment, plan_workers, set_defaults
from tests.cluster.manifests import CLUSTER

HEAD = Node(cpus=0)
CPU_GROUP = NodeGroup(name="cpu", node=Node(cpus=8), max_count=10)
GPU_GROUP = NodeGroup(name="gpu", node=Node(cpus=8, gpus=1), max_count=8)
GROWING = Capacity(present=(HEAD,), groups=(CPU_GROUP, GPU_GROUP))
"""As cluster/kuberay begins: a head without CPUs for work."""


def plan(capacity, *, concurrent=1, **scale):
    return fit_workers(ScaleConfig(**scale), capacity, concurrent_trainings=concurrent, joined=True)


def pool(capacity, num_units=1_000, *, num_workers=0, cpus_per_worker=0.0, use_gpu=None):
    return fit_pool(num_units, capacity, num_workers=num_workers, cpus_per_worker=cpus_per_worker, use_gpu=use_gpu, joined=True)


# --- nodes --------------------------------------------------------------------------------------------------------------------------------
def brute_room(nodes, cpus, gpus):
    """Place workers one by one on the first node that has room."""
    free = [[round(node.cpus * 10_000), round(node.gpus * 10_000)] for node in nodes]
    need = [round(cpus * 10_000), round(gpus * 10_000)]
    count = 0
    while True:
        spot = next((f for f in free if f[0] >= need[0] and f[1] >= need[1]), None)
        if spot is None:
            return count
        spot[0] -= need[0]
        spot[1] -= need[1]
        count += 1


@pytest.mark.parametrize("cpus, gpus", list(itertools.product((0.01, 0.3, 0.7, 1.0, 2.5, 9.0), (0.0, 0.5, 1.0))))
def test_room_is_what_placing_one_by_one_gives(cpus, gpus):
    nodes = [Node(cpus=c, gpus=g) for c, g in ((0, 0), (1, 1), (2.1, 0), (8, 4), (0.9, 2), (6, 0))]
    assert room(nodes, cpus, gpus) == brute_room(nodes, cpus, gpus)


def test_most_counts_what_is_up_of_a_group_once():
    up = Capacity(present=(HEAD, Node(cpus=8), Node(cpus=8), Node(cpus=4)), groups=(CPU_GROUP,))
    assert sorted(node.cpus for node in up.most) == [0, 4, *[8] * 10]
    beyond = Capacity(present=(Node(cpus=8),) * 12, groups=(CPU_GROUP,))
    assert len(beyond.most) == 12, "more than the group's end are up: they count"
    assert Capacity(present=(HEAD,)).most == (HEAD,)


# --- training -----------------------------------------------------------------------------------------------------------------------------
def test_training_on_a_head_without_cpus_takes_the_groups_upper_bounds():
    got = plan(GROWING, num_workers=8)
    assert (got.num_workers, got.cpus_per_worker, got.use_gpu) == (8, 1.0, True)
    got = plan(GROWING, num_workers=8, use_gpu=False)
    assert (got.cpus_per_worker, got.use_gpu) == (1.0, False)


def test_training_uses_gpus_by_default_only_where_each_worker_can_get_one():
    assert plan(GROWING, num_workers=2, concurrent=4).use_gpu
    assert not plan(GROWING, num_workers=3, concurrent=3).use_gpu
    assert not plan(Capacity(present=(Node(cpus=8),)), num_workers=1).use_gpu


def test_threads_are_the_cores_of_a_node_divided_among_the_workers_on_it(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    eight = Capacity(present=(Node(cpus=8),))
    assert plan(eight, num_workers=1).threads_per_worker == 8
    assert plan(eight, num_workers=2).threads_per_worker == 4
    assert plan(eight, num_workers=2, concurrent=3).threads_per_worker == 1
    assert plan(GROWING, num_workers=8).threads_per_worker == 8, "one GPU a node: the node's cores are its worker's"
    assert plan(eight, num_workers=2, threads_per_worker=3).threads_per_worker == 3


@pytest.mark.parametrize("declared", [2, 3, 4, 16])
@pytest.mark.parametrize("num_workers, concurrent", [(1, 1), (2, 1), (1, 2)])
def test_one_node_that_declares_more_cpus_than_cores_gives_the_threads_of_a_direct_run(monkeypatch, declared, num_workers, concurrent):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    scale, node = ScaleConfig(num_workers=num_workers), Capacity(present=(Node(cpus=declared),))
    joined, direct = (fit_workers(scale, node, concurrent_trainings=concurrent, joined=joined) for joined in (True, False))
    assert joined.threads_per_worker == direct.threads_per_worker == 2 // (num_workers * concurrent)


@pytest.mark.parametrize("num_workers, concurrent", [(1, 1), (3, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("nodes", [(6,), (2, 2), (1, 1, 1), (4, 0, 3), (8, 8)])
def test_default_share_of_cpus_leaves_one_for_data_and_is_the_largest_that_does(nodes, num_workers, concurrent):
    capacity = Capacity(present=tuple(Node(cpus=cpus) for cpus in nodes))
    wanted = num_workers * concurrent
    shares = [h / 100 for h in range(1, 101) if brute_room(capacity.present, h / 100, 0) >= wanted and wanted * h / 100 <= sum(nodes) - 1 + 1e-9]
    got = plan(capacity, num_workers=num_workers, concurrent=concurrent)
    assert got.cpus_per_worker == pytest.approx(max(shares)) and got.resources_per_worker == {"CPU": got.cpus_per_worker}


@pytest.mark.parametrize(
    "capacity, concurrent, scale, said",
    [
        (GROWING, 1, dict(num_workers=9, use_gpu=True), ["9 GPUs", "8 GPUs", "at most 8 workers", "gpu: 8 x 8 CPUs, 1 GPUs"]),
        (GROWING, 5, dict(num_workers=2, use_gpu=True), ["--scale.num-workers 2 x 5", "10 GPUs", "at most 4 trainings at once"]),
        (GROWING, 1, dict(num_workers=2, cpus_per_worker=9.0), ["9 CPUs each", "no node has more than 8 CPUs", "--scale.cpus-per-worker 1"]),
        (GROWING, 1, dict(num_workers=2, cpus_per_worker=8.5, use_gpu=True), ["beside a GPU", "no node has more than 8 CPUs beside a GPU"]),
        (Capacity(present=(Node(cpus=4),)), 1, dict(num_workers=2, cpus_per_worker=2.0), ["needs 4 CPUs", "has 4 CPUs", "--scale.cpus-per-worker 1"]),
        (Capacity(present=(Node(cpus=1),)), 1, dict(num_workers=1), ["has 1 CPUs", "add nodes", "CAD_NODE_GROUPS"]),
        (Capacity(present=(HEAD,)), 2, dict(num_workers=1), ["has 0 CPUs", "CAD_NODE_GROUPS"]),
        (Capacity(present=(Node(cpus=8, gpus=2),)), 1, dict(num_workers=3, use_gpu=True), ["3 GPUs", "at most 2 workers", "CAD_NODE_GROUPS"]),
    ],
)
def test_request_that_can_never_be_met_says_what_why_and_what_would_fit(capacity, concurrent, scale, said):
    with pytest.raises(ValueError) as error:
        plan(capacity, concurrent=concurrent, **scale)
    for text in said:
        assert text in str(error.value), str(error.value)
    assert ("CAD_NODE_GROUPS" in str(error.value)) is (not capacity.groups)


@pytest.mark.parametrize("scale", [dict(num_workers=9, use_gpu=True), dict(num_workers=2, cpus_per_worker=9.0), dict(num_workers=90, cpus_per_worker=3.0)])
def test_remedy_that_is_told_does_fit(scale):
    with pytest.raises(ValueError) as error:
        plan(GROWING, **scale)
    words = str(error.value).split()
    if "--scale.cpus-per-worker" in words:
        better = {**scale, "cpus_per_worker": float(words[words.index("--scale.cpus-per-worker") + 1])}
    else:
        better = {**scale, "num_workers": int(words[words.index("most") + 1])}
    plan(GROWING, **better)


def test_local_ray_counts_slots_and_gives_threads_by_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    slots = Capacity(present=(Node(cpus=12),))
    got = fit_workers(ScaleConfig(num_workers=2), slots, concurrent_trainings=1, joined=False)
    assert (got.cpus_per_worker, got.threads_per_worker) == (1.0, 2)
    with pytest.raises(ValueError) as error:
        fit_workers(ScaleConfig(num_workers=2, use_gpu=True), slots, concurrent_trainings=1, joined=False)
    assert "CAD_NODE_GROUPS" not in str(error.value), "a local Ray does not grow"


# --- Ray Data -----------------------------------------------------------------------------------------------------------------------------
def test_pool_begins_with_what_is_there_and_may_use_all_that_comes():
    got = pool(Capacity(present=(HEAD, Node(cpus=8)), groups=(CPU_GROUP,)))
    assert (got.min_workers, got.max_workers, got.cpus, got.gpus) == (8, 80, 1.0, 0.0)
    got = pool(GROWING, use_gpu=False)
    assert (got.min_workers, got.max_workers) == (1, 144), "of both groups"
    assert pool(GROWING, num_units=3, use_gpu=False).max_workers == 3
    assert pool(GROWING, num_workers=20, use_gpu=False).max_workers == 20


def test_pool_uses_gpus_that_may_come_and_leaves_their_node_a_cpu():
    got = pool(GROWING)
    assert (got.min_workers, got.max_workers, got.cpus, got.gpus) == (1, 8, 7.0, 1.0)


def test_pool_of_a_cluster_that_nobody_described_takes_what_comes():
    assert pool(Capacity(present=(Node(cpus=2),))).max_workers == 1_000, "as many as there are units"


@pytest.mark.parametrize(
    "capacity, asked, said",
    [
        (Capacity(present=(HEAD,), groups=(CPU_GROUP,)), dict(use_gpu=True), ["no GPU", "cpu: 10 x 8 CPUs"]),
        (GROWING, dict(cpus_per_worker=9.0, use_gpu=False), ["--scale.cpus-per-worker 9", "more than 8 CPUs"]),
        (Capacity(present=(Node(cpus=2),)), dict(cpus_per_worker=3.0), ["more than 2 CPUs", "CAD_NODE_GROUPS"]),
        (Capacity(present=(HEAD,)), {}, ["0 CPUs", "CAD_NODE_GROUPS"]),
    ],
)
def test_pool_that_can_never_start_is_refused(capacity, asked, said):
    with pytest.raises(ValueError) as error:
        pool(capacity, **asked)
    assert all(text in str(error.value) for text in said), str(error.value)


# --- who says how far ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def joined(monkeypatch, tmp_path):
    """A cluster with a head only, which this process has joined; nothing says how far it grows."""
    import ray
    from ray._private.state import state

    nodes = [{"Alive": True, "Resources": {"node:__internal_head__": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv("CAD_NODE_GROUPS", raising=False)
    return nodes


TOLD = json.dumps([{"name": "big", "resources": {"CPU": 8, "GPU": 2}, "max_count": 3}])


def test_nothing_said_is_what_is_up(joined):
    assert cluster_capacity() == Capacity(present=(HEAD,))


def test_environment_variable_tells_the_groups(joined, monkeypatch):
    monkeypatch.setenv("CAD_NODE_GROUPS", TOLD)
    assert cluster_capacity().groups == (NodeGroup(name="big", node=Node(cpus=8, gpus=2), max_count=3),)
    assert plan_workers(ScaleConfig(num_workers=6)).use_gpu
    assert concurrent_trainings(ScaleConfig(num_workers=2)) == 3
    assert concurrent_trainings(ScaleConfig(num_workers=2, use_gpu=False)) == 11, "24 CPUs without the one for data, two each"


def test_local_ray_does_not_grow_whatever_is_said(joined, monkeypatch):
    monkeypatch.setenv("CAD_NODE_GROUPS", TOLD)
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_capacity().groups == ()


def test_rays_own_store_tells_the_groups(joined, monkeypatch):
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    config = ClusterConfig(node_group_configs=[NodeGroupConfig(name="any", resources={"CPU": 4}, max_count=-1)])
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    (group,) = cluster_capacity().groups
    assert group.node == Node(cpus=4) and group.max_count >= 100, "-1 is Ray's word for no bound"


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_file_of_ray_up_tells_the_groups(joined, name, tmp_path):
    (tmp_path / "ray_bootstrap_config.yaml").write_text((CLUSTER / "vm" / name).read_text())
    assert set(cluster_capacity().groups) == {CPU_GROUP, GPU_GROUP}


def test_file_of_ray_up_without_bounds_takes_the_clusters(tmp_path):
    config = {"max_workers": 7, "head_node_type": "h", "available_node_types": {"h": {}, "w": {"resources": {"CPU": 2}, "node_config": {}}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert bootstrap_groups(tmp_path / "c.yaml") == (NodeGroup(name="w", node=Node(cpus=2), max_count=7),)


@pytest.mark.parametrize("text", ["{", "3", '[{"name": "x"}]', '[{"name": "x", "resources": 3, "max_count": 1}]', '[{"name": "x", "resources": {}, "max_count": "n"}]'])
def test_variable_that_is_no_list_of_groups_is_refused(text):
    with pytest.raises(ValueError, match="CAD_NODE_GROUPS must be a JSON list"):
        told_groups(text)


# --- what travels -------------------------------------------------------------------------------------------------------------------------
def test_credentials_do_not_travel_in_the_runtime_environment(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sent = forwarded_environment()
    assert "s3cret" not in sent.values()
    assert sent["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000" and sent["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("address, seconds", [("", "60"), ("auto", "900")])
def test_workers_of_a_joined_cluster_are_waited_for_as_long_as_a_node_takes(address, seconds, monkeypatch):
    environment = {"RAY_ADDRESS": address}
    monkeypatch.setattr("os.environ", environment)
    set_defaults()
    assert environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == seconds
