"""A cluster of several nodes on this machine that grows and shrinks as a real one does: Ray's own autoscaler, nodes that are processes.

    python cluster/local/start.py                                                     # prints what other shells need; Ctrl-C ends it
    python cluster/local/start.py --max-nodes 4 -- python rayjobs/tune.py --task alignment --dataset ds/ --search.max-concurrent 4

The head has no CPUs for work, as in cluster/kuberay. It has a token of its own and ports that were free, and leaves other Rays on the machine alone.
Dashboard and job server listen on loopback; Ray's ports between nodes do not, and demand the token. For trying and testing: the nodes share the
machine's cores and memory, so nothing becomes faster.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    import psutil

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Ray's name for the first of its fake nodes; the autoscaler counts the others on from it.
_HEAD_ID = "f" * 51 + "00000"
# Ray's fake provider knows its head by no other name.
_HEAD_TYPE = "ray.head.default"
_MARK = "CAD_LOCAL_CLUSTER"
_OBJECT_STORE_BYTES = 200_000_000
# On a busy machine one of Ray's processes may take longer than the others wait for it; then it helps to start again.
_LONGEST_START_S, _ATTEMPTS = 120, 3


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """A fake cluster on this machine."""

    head_cpus: int = 0
    """CPUs of the head, for work."""
    cpus_per_node: int = 2
    """CPUs that each further node declares; the machine need not have them."""
    max_nodes: int = 3
    """Most nodes beside the head."""
    idle_timeout_s: float = 20.0
    """Seconds after which an idle node goes."""

    def __post_init__(self) -> None:
        for name, least in {"head_cpus": 0, "cpus_per_node": 1, "max_nodes": 1, "idle_timeout_s": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name):g} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RunningCluster:
    """A cluster that runs, and what reaches it."""

    folder: Path
    gcs_address: str
    dashboard_url: str
    environment: dict[str, str]
    """For drivers and for ``ray job submit`` (with ``--address`` the dashboard's URL)."""
    mark: str

    def num_nodes(self) -> int:
        """Nodes that are up, the head among them."""
        from ray._raylet import GcsClient
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        infos = GcsClient(address=self.gcs_address).get_all_node_info(timeout=10)
        return sum(info.state == GcsNodeInfo.GcsNodeState.ALIVE for info in infos.values())


@contextlib.contextmanager
def running(cluster: LocalCluster) -> Iterator[RunningCluster]:
    """Start a cluster, and end all of its processes afterwards, however the block ends.

    Raises:
        RuntimeError: it did not start; with the last lines of Ray's logs.
    """
    # Ray's sockets live below it, and their names may not be long.
    folder = Path(tempfile.mkdtemp(prefix="cad-", dir="/tmp"))
    gcs, dashboard, agent, client = _free_ports(4)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    address, mark = f"127.0.0.1:{gcs}", uuid.uuid4().hex
    reach = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": address}
    started = RunningCluster(
        folder=folder, gcs_address=address, dashboard_url=f"http://127.0.0.1:{dashboard}", environment={**os.environ, **reach}, mark=mark
    )
    (folder / "autoscaling.yaml").write_text(json.dumps(_autoscaling(cluster, address, folder)))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cluster.head_cpus}"),
        *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={folder}/h", f"--autoscaling-config={folder}/autoscaling.yaml"),
    ]
    environment = {name: value for name, value in started.environment.items() if name != "RAY_ADDRESS"} | {
        **{"RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        **{"RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID, _MARK: mark},
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    before = {name: os.environ.get(name) for name in reach}
    try:
        set_environment(reach)  # for this process's own look at the cluster
        for attempt in range(1, _ATTEMPTS + 1):
            with (folder / "head.log").open("w") as log:
                head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            if (problem := _wait_until_up(started, head)) is None:
                break
            _end_all(mark)
            shutil.rmtree(folder / "h", ignore_errors=True)
            if attempt == _ATTEMPTS:
                raise RuntimeError(f"the local cluster did not start in {_ATTEMPTS} attempts:\n{problem}")
        _report_groups(cluster, address)
        yield started
    finally:
        _end_all(mark)
        set_environment(before)
        shutil.rmtree(folder, ignore_errors=True)


def set_environment(values: Mapping[str, str | None]) -> None:
    """Set variables of this process (None: unset), and have Ray look at them: it keeps the token, and whether there is one, from its first use on."""
    from ray._raylet import AuthenticationTokenLoader, Config

    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def _autoscaling(cluster: LocalCluster, address: str, folder: Path) -> dict[str, object]:
    empty_lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands")
    return {
        "cluster_name": "local",
        "max_workers": cluster.max_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": cluster.idle_timeout_s / 60,
        "provider": {
            "type": "external",
            "module": "cluster.local.node_provider.LocalNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": address,
            "node_temp_root": str(folder),
        },
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": cluster.head_cpus}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": cluster.cpus_per_node, "object_store_memory": _OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": cluster.max_nodes,
            },
        },
        "head_node_type": _HEAD_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in (*empty_lists, "worker_start_ray_commands")},
    }


def _wait_until_up(started: RunningCluster, head: subprocess.Popen) -> str | None:
    """None when the autoscaler has reported (``ray start`` says that all is well also when it fails at every step), else what the logs end with."""
    deadline = time.monotonic() + _LONGEST_START_S
    while head.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # until it listens, Ray's client raises errors of several kinds
            if started.num_nodes() == 1 and _autoscaler_reports(started.gcs_address):
                return None
        time.sleep(0.5)
    logs = [started.folder / "head.log", *(started.folder / "h/session_latest/logs" / name for name in ("monitor.err", "monitor.log"))]
    return "\n".join(line for log in logs if log.exists() for line in log.read_text().splitlines()[-10:])


def _autoscaler_reports(address: str) -> bool:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(GcsClient(address=address).get_cluster_status(timeout_s=10))
    return reply.autoscaling_state.autoscaler_state_version > 0


def _report_groups(cluster: LocalCluster, address: str) -> None:
    """Tell Ray, and the jobs that ask it, how far the cluster may grow."""
    from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE, GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    group = NodeGroupConfig(name="cpu", resources={"CPU": cluster.cpus_per_node}, min_count=0, max_count=cluster.max_nodes)
    GcsClient(address=address).internal_kv_put(
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
        ClusterConfig(node_group_configs=[group]).SerializeToString(),
        True,
        GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
    )


def processes(mark: str) -> "list[psutil.Process]":
    """All processes that descend from a cluster's start, whatever became of their parents."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _end_all(mark: str) -> None:
    import psutil

    for attempt in range(10):  # what was just starting appears after the first look
        if not (ours := processes(mark)):
            return
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM if attempt == 0 else signal.SIGKILL)
        psutil.wait_procs(ours, timeout=5)


def main() -> int:
    """Start, run what was asked for or wait, end all."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[split + 1 :]
    try:
        cluster = tyro.cli(LocalCluster, args=sys.argv[1:split], description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        with running(cluster) as started:
            return _run(command, started) if command else _serve(started)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: list[str], started: RunningCluster) -> int:
    job = subprocess.Popen(command, env=started.environment)
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:  # the job has got it too: let it save its work
            continue


def _serve(started: RunningCluster) -> int:
    token = started.environment["RAY_AUTH_TOKEN_PATH"]
    print(
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}\n"
        f"export RAY_ADDRESS={started.gcs_address}        # python rayjobs/….py\n"
        f"export RAY_ADDRESS={started.dashboard_url}      # ray job submit …; the dashboard\n"
        "Ctrl-C ends the cluster",
        flush=True,
    )
    shown, begun = 0, time.monotonic()
    while True:
        if (now := started.num_nodes()) != shown:
            shown = now
            print(f"{time.monotonic() - begun:6.0f} s: {now} nodes, the head included", flush=True)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
