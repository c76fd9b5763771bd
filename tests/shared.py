"""Where the real meshes, broken files and golden values lie, for the tests that use them when they are present."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_path(relative: str) -> Path:
    """The path of ``relative`` in the data pack (``CAD_SHARED``, else ``../shared``); skips the test when it is not there."""
    root = Path(os.environ.get("CAD_SHARED", REPOSITORY.parent / "shared"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"the data pack has no {relative} under {root}: set CAD_SHARED to its folder to run this test")
    return path
