"""Versions stand in constraints.txt and pyproject.toml; everything else repeats them, and is compared with them here."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster.manifests import CLUSTER
from tests.shared import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKED = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in (REPOSITORY / "constraints.txt").read_text().split()}
IMAGE_TAG = f"{PROJECT['version']}-ray{LOCKED['ray']}"
# `cluster/` and the pages that a reader follows.
TEXTS = [*sorted(p for p in CLUSTER.rglob("*") if p.is_file() and "__pycache__" not in p.parts), REPOSITORY / "README.md"]


def requirements():
    """All of others: an extra may name another extra of this project."""
    every = [Requirement(text) for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in texts]
    return [requirement for requirement in every if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_locked_version_satisfies_what_the_project_asks_for(requirement):
    assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_text_names_the_image_and_ray_of_the_lock(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"cad-search:([\w.-]+)", text)) <= {IMAGE_TAG}
    assert set(re.findall(r"\d+\.\d+\.\d+-ray[\d.]+\d", text)) <= {IMAGE_TAG}
    assert set(re.findall(r"rayVersion: \"?([\d.]+)", text)) <= {LOCKED["ray"]}
    assert set(re.findall(r"\bray[=~<>]=([\d.]+)", text)) <= {LOCKED["ray"]}
    assert "cad-search:latest" not in text


def test_every_manifest_names_an_image():
    named = [path.name for path in TEXTS if re.search(rf"image: \S+/cad-search:{re.escape(IMAGE_TAG)}", path.read_text(encoding="utf-8"))]
    assert {"raycluster.yaml", "rayjob-tune.yaml", "mlflow.yaml", "aws.yaml", "gcp.yaml"} <= set(named)


def test_rayversion_of_both_ray_manifests_is_the_lock():
    cluster = next(yaml.safe_load_all((CLUSTER / "kuberay" / "raycluster.yaml").read_text()))
    assert cluster["spec"]["rayVersion"] == LOCKED["ray"]


def test_containerfile_installs_the_lock_for_a_plain_user():
    lines = (CLUSTER / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    installs = [what for step, what in steps if step == "RUN" and "pip install" in what]
    assert installs and all("--constraint constraints.txt" in what for what in installs)
    assert [what for step, what in steps if step == "USER"][-1] == "1000:1000"
    (base,) = [what for step, what in steps if step == "FROM"]
    assert re.fullmatch(rf"docker\.io/library/python:{re.escape(PROJECT['requires-python'].removeprefix('>='))}-slim-\w+", base)
    assert not any(step == "ADD" for step, _ in steps)
    for step, what in steps:
        if step == "COPY":
            for source in what.split()[:-1]:
                assert (REPOSITORY / source).exists() and source != ".", "only what is named: a folder of secrets or data must not slip in"
        if step in ("ARG", "ENV"):
            assert not re.search(r"PASSWORD|SECRET|TOKEN=|KEY", what)
