"""The fake cluster of cluster/local: it starts behind a token, grows for a search, shrinks after it, and ends without leftovers."""

import functools
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from benchmarks.autoscaling import search_command, watch
from cluster.local.start import LocalCluster, processes, running, set_environment
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

START = str(REPOSITORY / "cluster/local/start.py")


@pytest.mark.parametrize("flags", [("--max-nodes", "0"), ("--cpus-per-node", "0"), ("--idle-timeout-s", "0.5"), ("--max-node", "2")])
def test_mistake_in_the_flags_ends_with_status_2(flags):
    done = subprocess.run([sys.executable, START, *flags], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and flags[0] in done.stdout + done.stderr


def test_clusters_one_after_the_other_in_a_process_have_each_its_own_token(tmp_path, monkeypatch):
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = get_authentication_mode()
    try:
        for name in ("first", "second"):
            (tmp_path / name).write_text(name * 8)
            set_environment({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": None})
            assert get_authentication_mode() == AuthenticationMode.DISABLED
            set_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / name)})
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert AuthenticationTokenLoader.instance().get_raw_token() == name * 8
    finally:
        set_environment({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None})
    assert get_authentication_mode() == before


@pytest.mark.slow
@pytest.mark.ray
def test_search_on_a_head_without_cpus_grows_the_cluster_which_shrinks_again(tmp_path):
    dataset = make_dataset(str(tmp_path / "ds"), 40).uri
    with running(LocalCluster(idle_timeout_s=8, max_nodes=3)) as cluster:
        watched = watch(cluster, search_command(dataset, tmp_path, num_workers=0), tmp_path)
        assert watched.status == 0, watched.output
        dashboard = urllib.request.Request(f"{cluster.dashboard_url}/api/jobs/")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(dashboard, timeout=20)
    nodes = [count for _, count in watched.counts]
    assert nodes[0] == 1 and max(nodes) >= 3 and nodes[-1] == 1, nodes  # four trials at once on nodes of two CPUs
    assert "8 complete" in watched.output, watched.output
    assert processes(cluster.mark) == [] and not cluster.folder.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_cluster_that_is_stopped_leaves_no_process(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        # A shell's background job ignores SIGINT, and so would what these tests start there.
        listening = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        start = subprocess.Popen([sys.executable, "-u", START], stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=listening)
    try:
        deadline = time.monotonic() + 200
        while "1 nodes" not in (tmp_path / "log.txt").read_text():
            assert start.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.5)
        (mark,) = {p.environ().get("CAD_LOCAL_CLUSTER") for p in psutil.Process(start.pid).children(recursive=True)} - {None}
        assert len(processes(mark)) > 3
        told = (tmp_path / "log.txt").read_text()
        token = told.split("RAY_AUTH_TOKEN_PATH=")[1].split()[0]
        with open(token) as file:
            assert os.stat(token).st_mode & 0o777 == 0o600 and file.read() not in told
        os.kill(start.pid, signal.SIGINT)
        assert start.wait(timeout=60) == 130
        assert processes(mark) == [] and not os.path.exists(token)
    finally:
        if start.poll() is None:  # it ends its cluster's processes itself
            start.terminate()
            start.wait(timeout=60)
