"""The `ray up` files of cluster/vm/, checked by Ray's own schema; no cloud is asked."""

import copy

import pytest
import yaml

from tests.cluster.manifests import CLUSTER, containers, documents, only

FILES = ("aws.yaml", "gcp.yaml")


def config(name):
    return yaml.safe_load((CLUSTER / "vm" / name).read_text())


def prepared(content):
    """As `ray up` begins: defaults filled in, then the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(content))
    validate_config(filled)
    return filled


@pytest.mark.parametrize("name", FILES)
def test_file_is_what_ray_up_takes(name):
    filled = prepared(config(name))
    assert filled["head_node_type"] == "head" and filled["docker"]["image"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "path, value",
    [(("idle_timeout",), 5), (("available_node_types", "gpu", "maxworkers"), 2), (("available_node_types", "gpu", "resources", "GPU"), "1"), (("max_workers",), 3)],
)
def test_mistake_is_refused(name, path, value):
    content = config(name)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if path == ("max_workers",):  # the schema takes it: that all groups can grow to their ends is our own rule
        assert not groups_can_grow(content)
        return
    with pytest.raises(Exception, match="schema|valid|Additional properties|is not of type"):
        prepared(content)


def groups_can_grow(content):
    return content["max_workers"] >= sum(group["max_workers"] for group in content["available_node_types"].values())


@pytest.mark.parametrize("name", FILES)
def test_groups_are_those_of_kubernetes(name):
    content = config(name)
    spec = only(documents("raycluster.yaml"), "RayCluster")["spec"]
    for group in spec["workerGroupSpecs"]:
        limits = containers(group["template"]["spec"])[0]["resources"]["limits"]
        twin = content["available_node_types"][group["groupName"]]
        assert (twin["min_workers"], twin["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        assert (twin["resources"]["CPU"], twin["resources"].get("GPU", 0)) == (int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)))
    assert len(content["available_node_types"]) == 1 + len(spec["workerGroupSpecs"])
    assert content["available_node_types"]["head"]["resources"] == {"CPU": 0} and groups_can_grow(content)


@pytest.mark.parametrize("name", FILES)
def test_ray_wants_a_token_and_listens_on_loopback(name):
    content = config(name)
    start = content["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "--num-cpus=0" in start
    assert "--env RAY_AUTH_MODE=token" in content["docker"]["run_options"]
    assert content["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_workers_are_spot_machines_and_the_head_is_not():
    aws, gcp = (config(name)["available_node_types"] for name in FILES)
    for group in ("cpu", "gpu"):
        assert aws[group]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert {"preemptible": True} in gcp[group]["node_config"]["scheduling"]
    assert "InstanceMarketOptions" not in aws["head"]["node_config"] and "scheduling" not in gcp["head"]["node_config"]


def test_aws_lets_nobody_but_a_named_address_in():
    (rule,) = config("aws.yaml")["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(entry["CidrIp"].endswith("/32") for entry in rule["IpRanges"])
