"""One local Ray for the tests that need a cluster in their own process."""

import os
import shutil
import tempfile

import pytest

from tests.shared import REPOSITORY


@pytest.fixture(scope="module")
def local_ray():
    """A local Ray with 6 logical CPUs and no dashboard. It ends with the module: what runs in the process later must not find it."""
    import ray

    from rayjobs.resources import set_defaults

    changed = {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": None}
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    set_defaults()
    # Ray's sockets live below it, and their names may not be long.
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=6,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=200_000_000,
            _temp_dir=scratch,
        )
        yield
    finally:
        ray.shutdown()
        _set_environment(before)
        shutil.rmtree(scratch, ignore_errors=True)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
