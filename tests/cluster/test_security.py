"""What must not leave the user's machine, be printed, or be taken from an archive."""

import logging
import zipfile

import pytest

from cad_models.dataset import DatasetError
from cad_models.folder import Folder, without_credentials
from cad_models.images import sources
from rayjobs.tracking import Tracking, TrackingError
from tests.shared import REPOSITORY

SECRETS = (".env", "prod.env", "deploy.pem", "tls.key", "auth_token", "credentials.json", ".aws/credentials", ".ray/auth_token", "sub/auth_token")
WORKING = ("rayjobs/tune.py", "cad_models/task.py", "pyproject.toml", "sub/keys.py")


def test_job_submission_does_not_send_secrets_data_or_environments(tmp_path, monkeypatch):
    from ray._private.runtime_env.packaging import _zip_files

    monkeypatch.delenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", raising=False)
    project = tmp_path / "project"
    ignored = (".venv/bin/python", "outputs/mlflow/mlflow.db", "demo/dataset/manifest.json", "mlflow.db")
    for name in (*SECRETS, *WORKING, *ignored):
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name in (".gitignore", ".rayignore"):
        (project / name).write_text((REPOSITORY / name).read_text())
    _zip_files(str(project), [], str(tmp_path / "sent.zip"), include_gitignore=True, logger=logging.getLogger("test"))
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        names = set(sent.namelist())
    assert set(WORKING) <= names
    assert not names & {*SECRETS, *ignored}


@pytest.mark.parametrize(
    "uri, shown",
    [
        ("postgresql://mlflow:s3cret@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://user:p@ss@host/x", "https://***@host/x"),
        ("s3://KEY:SECRET@bucket/ds", "s3://***@bucket/ds"),
        ("cannot reach mysql+pymysql://u:p@h/d, nor http://a:b@c", "cannot reach mysql+pymysql://***@h/d, nor http://***@c"),
        ("s3://bucket/mail@example.com/ds", "s3://bucket/mail@example.com/ds"),
        ("models:/cad-alignment@champion", "models:/cad-alignment@champion"),
        ("http://host:5000/?q=a@b", "http://host:5000/?q=a@b"),
        ("/home/me@work/ds", "/home/me@work/ds"),
    ],
)
def test_credentials_in_a_uri_are_masked_and_nothing_else(uri, shown):
    assert without_credentials(uri) == shown


def test_folder_whose_uri_holds_credentials_is_refused_without_repeating_them():
    with pytest.raises(DatasetError, match="AWS_SECRET_ACCESS_KEY") as error:
        Folder("s3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/ds")
    assert "wJalrXUtnFEMI" not in str(error.value) and "AKIAEXAMPLE" not in str(error.value) and "bucket/ds" in str(error.value)
    assert Folder("s3://bucket/ds@2/x").uri == "s3://bucket/ds@2/x"


def test_store_that_fails_is_named_without_its_password(capsys):
    uri = "http://user:s3cret@127.0.0.1:9"
    tracking = Tracking(uri=uri, experiment="e", registered_model="m")

    def fails():
        raise OSError(f"cannot connect to {uri}/api")

    assert tracking.attempt("log", fails) is None
    with pytest.raises(TrackingError) as error:
        tracking.required("find", fails)
    told = str(error.value) + capsys.readouterr().err
    assert "s3cret" not in told and told.count("http://***@127.0.0.1:9") >= 2


def test_zip_member_that_unpacks_to_more_than_a_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_MEMBER_BYTES", 1_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fine.png", b"\0" * 1_000)
        archive.writestr("bomb.png", b"\0" * 1_001)
    source = sources.Source(str(tmp_path / "a.zip"))
    assert len(sources.read_uri(source.path("fine.png"))) == 1_000
    with pytest.raises(OSError, match="unpacks to 1,001 bytes"):
        sources.read_uri(source.path("bomb.png"))
