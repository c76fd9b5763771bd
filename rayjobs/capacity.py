"""What a cluster has, and what it may grow to: the nodes that are up, and the groups of nodes that its autoscaler may add.

Ray tells jobs what is up; how far an autoscaler may go it tells only where somebody reported it. Looked at in this order:

1. the environment variable CAD_NODE_GROUPS, which cluster/kuberay sets on the head: a JSON list as
   ``[{"name": "gpu", "resources": {"CPU": 8, "GPU": 1}, "max_count": 8}]``
2. the cluster configuration in Ray's own store, which managed clusters and cluster/local report
3. ``~/ray_bootstrap_config.yaml``, which ``ray up`` leaves on the head
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLE = "CAD_NODE_GROUPS"
_BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
# Ray's way to say that a group has no upper bound.
_UNBOUNDED, _MANY = -1, 1_000
# Ray counts resources in ten thousandths.
_GRAIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node offers."""

    cpus: float
    gpus: float = 0.0

    def room(self, cpus: float, gpus: float) -> int:
        """Workers that fit on it when each holds so many CPUs and GPUs."""
        each = [(self.cpus, cpus), (self.gpus, gpus)]
        return min((math.floor((has + _GRAIN) / need) for has, need in each if need > 0), default=_MANY)


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Equal nodes that an autoscaler adds and removes."""

    name: str
    node: Node
    max_count: int


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A cluster's nodes."""

    present: tuple[Node, ...]
    """Those that are up."""
    groups: tuple[NodeGroup, ...] = ()
    """Those that may come; empty = the cluster does not grow, or nobody said how far."""

    @property
    def most(self) -> tuple[Node, ...]:
        """The nodes of the cluster when all groups have grown to their ends."""
        shapes = {group.node for group in self.groups}
        return tuple(node for node in self.present if node not in shapes) + tuple(
            node for group in self.groups for node in [group.node] * max(group.max_count, self.present.count(group.node))
        )

    def describe(self) -> str:
        """What there is, and what may come, in words: ``0 CPUs and may grow to 80 CPUs, 8 GPUs (cpu: 10 x 8 CPUs; …)``."""
        now = _sizes(self.present)
        if not self.groups:
            return now
        each = "; ".join(f"{group.name}: {group.max_count} x {_sizes([group.node])}" for group in self.groups)
        return f"{now} and may grow to {_sizes(self.most)} ({each})"


def _sizes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")


def room(nodes: Iterable[Node], cpus: float, gpus: float = 0.0) -> int:
    """Workers that fit on the nodes together; none is divided between two."""
    return sum(node.room(cpus, gpus) for node in nodes)


def cluster_capacity() -> Capacity:
    """Of the cluster that this process has joined; needs Ray.

    Raises:
        ValueError: CAD_NODE_GROUPS is not what it should be.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    present = tuple(Node(cpus=float(has.get("CPU", 0.0)), gpus=float(has.get("GPU", 0.0))) for has in alive)
    return Capacity(present=present, groups=_groups() if os.environ.get("RAY_ADDRESS") else ())


def _groups() -> tuple[NodeGroup, ...]:
    return told_groups(os.environ.get(_VARIABLE, "")) or _reported_groups() or bootstrap_groups(Path(_BOOTSTRAP_FILE).expanduser())


def told_groups(text: str) -> tuple[NodeGroup, ...]:
    """The groups in a value of CAD_NODE_GROUPS. Raises ValueError for anything else than an empty text or such a list."""
    if not text.strip():
        return ()
    try:
        return tuple(_group(entry["name"], entry["resources"], int(entry["max_count"])) for entry in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{_VARIABLE} must be a JSON list as [{{"name": "gpu", "resources": {{"CPU": 8, "GPU": 1}}, "max_count": 8}}], '
            f"got {text!r} ({type(error).__name__}: {error})"
        ) from error


def _reported_groups() -> tuple[NodeGroup, ...]:
    from ray._private.state import state

    config = state.get_cluster_config()
    return () if config is None else tuple(_group(group.name, dict(group.resources), group.max_count) for group in config.node_group_configs)


def bootstrap_groups(path: Path) -> tuple[NodeGroup, ...]:
    """The groups in the file that ``ray up`` leaves on the head; none when it is not there."""
    if not path.is_file():
        return ()
    import yaml

    config: dict[str, Any] = yaml.safe_load(path.read_text())
    types = {name: group for name, group in config["available_node_types"].items() if name != config["head_node_type"]}
    return tuple(_group(name, group.get("resources", {}), group.get("max_workers", config.get("max_workers", 0))) for name, group in types.items())


def _group(name: str, resources: dict[str, Any], max_count: int) -> NodeGroup:
    node = Node(cpus=float(resources.get("CPU", 0)), gpus=float(resources.get("GPU", 0)))
    return NodeGroup(name=name, node=node, max_count=_MANY if max_count == _UNBOUNDED else max_count)
