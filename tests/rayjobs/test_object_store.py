"""Dataset, runs and checkpoints on S3: the same bytes and figures as in a local folder, with nothing but the environment to reach it."""

from pathlib import Path

import pytest
import torch

from cad_models.alignment.recipe import SMOKE
from cad_models.config import replace_all
from cad_models.folder import Folder
from cad_models.tasks import TASKS
from rayjobs import prepare, train
from rayjobs.cli import parse_job, run_job
from rayjobs.resources import ScaleConfig
from tests.object_store import BUCKET, SECRET, s3_server
from tests.rayjobs import in_process
from tests.rayjobs.scripted_task import ScriptedTask
from tests.rayjobs.test_loop import assert_same_run
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "log.txt") as environment, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


def content(folder):
    return {name: folder.read_bytes(name) for name in folder.files()}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_folder_keeps_and_finds_its_files(where, bucket, tmp_path):
    folder = Folder(str(tmp_path / "f") if where == "local" else f"{bucket}/folder")
    assert not folder.exists() and not folder.exists("a/b.txt") and folder.names("a") == [] and folder.state("a/b.txt") == ""
    folder.write_bytes("a/b.txt", b"one")
    folder.write_bytes("a/deep/c.bin", b"\0" * 1000)
    folder.write_json("d.json", {"z": 1, "a": "é"})
    assert folder.exists() and folder.exists("a") and folder.exists("a/b.txt")
    assert folder.names() == ["a", "d.json"] and folder.names("a") == ["b.txt", "deep"]
    assert folder.files() == ["a/b.txt", "a/deep/c.bin", "d.json"]
    assert folder.read_json("d.json") == {"z": 1, "a": "é"}
    before = folder.state("a/b.txt")
    folder.write_bytes("a/b.txt", b"longer")
    assert folder.read_bytes("a/b.txt") == b"longer" and folder.state("a/b.txt") != before
    with folder.open("a/deep/c.bin") as file:
        file.seek(990)
        assert file.read() == b"\0" * 10
    with (folder / "a").fetched("deep") as directory:
        assert [p.name for p in directory.iterdir()] == ["c.bin"]
    folder.delete("a/deep")
    folder.delete("a/b.txt")
    folder.delete("was never there")
    assert folder.files() == ["d.json"]
    for name in ("a/b.txt", "nothing/here"):
        with pytest.raises(FileNotFoundError):
            folder.read_bytes(name)


def test_published_folder_on_s3_has_the_files_of_the_directory(bucket, tmp_path):
    folder = Folder(f"{bucket}/published")
    for text in ("first", "second"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "x.txt").write_text(text)
        (tmp_path / "sub/y.txt").write_text(text)
        folder.publish("last", tmp_path)
        assert content(folder / "last") == {"x.txt": text.encode(), "sub/y.txt": text.encode()}


# --- jobs ---------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def scripted(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "scripted", ScriptedTask())
    in_process.use(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    for i in range(9):
        (source / f"a{i}.txt").write_text(f"size={i + 1}")
    (source / "bad.txt").write_text("inspect:reject")
    return source


def prepared(source, dataset, tmp_path, *flags):
    arguments = ["--task", "scripted", "--source", str(source), "--dataset", dataset, "--objects-per-part", "4", "--progress-file", str(tmp_path / "p.jsonl")]
    return prepare.main(parse_job(prepare.PrepareJob, [*arguments, *flags]))


def test_prepare_writes_the_same_dataset_to_s3_and_resumes_there(scripted, bucket, tmp_path, capsys):
    assert prepared(scripted, str(tmp_path / "ds"), tmp_path) == prepared(scripted, f"{bucket}/ds", tmp_path) == 0
    local, remote = content(Folder(str(tmp_path / "ds"))), content(Folder(f"{bucket}/ds"))
    assert remote == local and len(local) > 6
    capsys.readouterr()
    (scripted / "a3.txt").write_text("size=30")
    assert prepared(scripted, f"{bucket}/ds", tmp_path) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parts"))
    assert "1 computed" in told and "0 reused" not in told


RECIPE = replace_all(SMOKE, {"data.num_points": 64, "model.num_points": 64, "model.embed_dim": 32})


def trained(dataset, output):
    """The run's folder, after a training in this process, without MLflow."""
    loop = train.loop_config(
        task_name="alignment", recipe=RECIPE, dataset_uri=dataset, output=output, name="run", scale=ScaleConfig(num_workers=0), plan=None
    )
    assert train.fit(loop, None, quiet=True)
    return Folder(loop.run_folder)


@pytest.mark.slow
def test_training_on_s3_gives_the_run_of_a_local_folder(bucket, tmp_path):
    local, remote = (trained(make_dataset(f"{where}/boxes", 40, recipe=RECIPE).uri, f"{where}/runs") for where in (str(tmp_path), bucket))
    assert remote.files() == local.files()
    with remote.fetched("") as directory:
        assert_same_run(Path(local.uri), directory)
    assert SECRET.encode() not in b"".join(content(remote).values())


@pytest.mark.slow
def test_training_killed_within_its_first_checkpoint_on_s3_starts_again(bucket, monkeypatch):
    dataset = make_dataset(f"{bucket}/boxes2", 40, recipe=RECIPE).uri
    write = Folder.write_bytes

    def killed(self, name, data):
        if name.endswith("trainer_state.pt"):
            raise KeyboardInterrupt
        write(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write_bytes", killed)
        trained(dataset, f"{bucket}/killed")
    assert Folder(f"{bucket}/killed/run").exists("last")
    with trained(dataset, f"{bucket}/killed").fetched("last") as directory:
        torch.load(directory / "trainer_state.pt", weights_only=True)


# --- mistakes -----------------------------------------------------------------------------------------------------------------------------
def told_error(job_type, main, arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_job(job_type, main, arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return ended.value.code, [line for line in (captured.err + captured.out).splitlines() if line.startswith("error:")]


def test_bucket_that_is_not_there_is_told_in_one_line(scripted, bucket, tmp_path, capsys):
    arguments = ["--task", "scripted", "--source", str(scripted), "--dataset", "s3://no-such-bucket/ds", "--progress-file", str(tmp_path / "p.jsonl")]
    status, (line,) = told_error(prepare.PrepareJob, prepare.main, arguments, capsys)
    assert status == 1 and "no-such-bucket" in line


def test_dataset_that_is_not_there_is_told_in_one_line(bucket, capsys):
    arguments = ["--task", "alignment", "--smoke", "--scale.num-workers", "0", "--dataset", f"{bucket}/nothing"]
    status, (line,) = told_error(train.TrainJob, train.main, arguments, capsys)
    assert status == 1 and f"{bucket}/nothing" in line
