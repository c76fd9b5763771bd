"""mlflow.yaml's commands as processes: PostgreSQL, S3, passwords; and a job that tracks and registers through them."""

import base64
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from tests.cluster.manifests import documents, only
from tests.object_store import BUCKET, free_port, s3_server
from tests.shared import REPOSITORY
from tests.synthetic import make_dataset

PASSWORDS = {name: secrets.token_hex(12) for name in ("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")}
USER, USER_PASSWORD = "trainer", secrets.token_hex(12)
RECIPE = {"data.num_points": 64, "model.num_points": 64, "model.embed_dim": 32}


@contextlib.contextmanager
def postgres(folder: Path):
    """A PostgreSQL server on loopback that demands the password; yields its port."""
    if not shutil.which("initdb") or not shutil.which("postgres"):
        pytest.skip("PostgreSQL (initdb, postgres) is not installed")
    user = {}
    if os.geteuid() == 0:  # it refuses to run as root
        user = {"user": "postgres"}
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORDS["POSTGRES_PASSWORD"])
    data, port = folder / "data", free_port()
    init = ["initdb", "-D", str(data), "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    subprocess.run(init, check=True, capture_output=True, cwd=folder, **user)
    command = ["postgres", "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, **user)
    try:
        deadline = time.monotonic() + 60
        ready = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", "postgres", "-c"]
        environment = {**os.environ, "PGPASSWORD": PASSWORDS["POSTGRES_PASSWORD"]}
        while subprocess.run([*ready, "create database mlflow"], env=environment, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.3)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)


def manifest_environment(container, values):
    """The container's variables with references to secrets resolved."""
    found = {}
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        found[variable["name"]] = values[reference["key"]] if reference else variable["value"]
    return found


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """The server as the manifest starts it, but for addresses and the bucket; yields its URL, its log and what reaches S3."""
    objects = documents("mlflow.yaml")
    pod = only(objects, "Deployment")["spec"]["template"]["spec"]
    folder = tmp_path_factory.mktemp("tracking")
    with contextlib.ExitStack() as stack:
        # Outside pytest's folder, which only its own user may enter.
        database = stack.enter_context(tempfile.TemporaryDirectory(prefix="cad-postgres-"))
        port = stack.enter_context(postgres(Path(database)))
        storage = stack.enter_context(s3_server(folder / "s3.txt"))
        places = {"mlflow-db:5432": f"127.0.0.1:{port}", "s3://my-bucket": f"s3://{BUCKET}", "--host=0.0.0.0": "--host=127.0.0.1", "--workers=2": "--workers=1"}
        places["--port=5000"] = f"--port={(listen := free_port())}"

        def here(text):
            for there, ours in places.items():
                text = text.replace(there, ours)
            return text

        (folder / "basic_auth.ini").write_text(here(only(objects, "ConfigMap")["data"]["basic_auth.ini"]))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "PG"))},
            **manifest_environment(pod["containers"][0], PASSWORDS),
            **storage,
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "HOME": str(folder),
        }
        command = [here(word) for word in pod["initContainers"][0]["command"]]
        subprocess.run([sys.executable, "-m", *command], env=environment, check=True, capture_output=True, timeout=180, cwd=folder)
        with (folder / "server.txt").open("w") as log:
            command = [here(word) for word in pod["containers"][0]["command"]]
            server = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        stack.callback(end, server)
        url = f"http://127.0.0.1:{listen}"
        wait_until_healthy(url, server, folder / "server.txt")
        yield url, folder / "server.txt", storage


def end(server):
    import psutil

    children = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    for process in psutil.wait_procs(children, timeout=20)[1]:
        process.kill()
    server.wait(timeout=20)


def wait_until_healthy(url, server, log):
    deadline = time.monotonic() + 240
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3_000:]
        time.sleep(0.5)


def call(url, path, body, *, user="", password=""):
    """Status of a request, and what it answers."""
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_server_of_the_manifest_refuses_who_has_no_password(tracking):
    url, _, _ = tracking
    search = ("/api/2.0/mlflow/experiments/search", {"max_results": 5})
    assert call(url, *search)[0] == 401
    assert call(url, *search, user="admin", password="wrong")[0] == 401
    assert call(url, *search, user="admin", password=PASSWORDS["MLFLOW_AUTH_ADMIN_PASSWORD"])[0] == 200


@pytest.mark.slow
def test_job_tracks_and_registers_through_the_server_and_leaves_no_password_anywhere(tracking, tmp_path):
    url, server_log, storage = tracking
    user = ("/api/2.0/mlflow/users/create", {"username": USER, "password": USER_PASSWORD})
    assert call(url, *user, user="admin", password=PASSWORDS["MLFLOW_AUTH_ADMIN_PASSWORD"])[0] == 200
    dataset = make_dataset(str(tmp_path / "ds"), 40, recipe=replace_all(SMOKE, RECIPE)).uri
    flags = [word for path, value in RECIPE.items() for word in (f"--{path.replace('_', '-')}", str(value))]
    command = [sys.executable, str(REPOSITORY / "rayjobs/train.py"), "--task", "alignment", "--smoke", *flags, "--dataset", dataset, "--output", str(tmp_path / "runs")]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))},
        **{"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": USER_PASSWORD, "PYTHONPATH": str(REPOSITORY)},
    }
    members = ["--scale.num-workers", "0", "--seeds", "1", "2", "--register"]
    done = subprocess.run([*command, *members], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    status, answer = call(url, "/api/2.0/mlflow/runs/search", {"experiment_ids": ["1"], "max_results": 100}, user=USER, password=USER_PASSWORD)
    assert status == 200 and json.loads(answer)["runs"]
    objects = s3_objects(storage)
    assert any(name.endswith(".safetensors") for name in objects), "artifacts lie on S3"
    everything = done.stdout + done.stderr + answer + server_log.read_text(errors="replace") + "".join(map(str, objects))
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (*PASSWORDS.values(), USER_PASSWORD, storage["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in everything and secret.encode() not in files


def s3_objects(storage):
    from pyarrow import fs

    store = fs.S3FileSystem(
        access_key=storage["AWS_ACCESS_KEY_ID"], secret_key=storage["AWS_SECRET_ACCESS_KEY"], region="us-east-1", endpoint_override=storage["AWS_ENDPOINT_URL"]
    )
    return [info.path for info in store.get_file_info(fs.FileSelector(BUCKET, recursive=True)) if info.type == fs.FileType.File]
