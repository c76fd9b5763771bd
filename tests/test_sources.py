"""What rooms share in reading ``--source``."""

from pathlib import Path

import pytest

from cad_models.sources import generated_set, source_files, visible


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    for name in ("b.stl", "sub/a.stl", ".hidden.stl", ".cache/c.stl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    folder, names = source_files(str(tmp_path))
    assert names == ["b.stl", "sub/a.stl"]
    assert folder.read_bytes("b.stl") == b"x"
    assert visible(["a/.b/c", "a.b/c", ".x"]) == ["a.b/c"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--source .*nowhere: there is no such folder"):
        source_files(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("builtin:7", (7, 0, {})),
        ("builtin:7:seed=3", (7, 3, {})),
        ("builtin:7:seed=3:classes=all", (7, 3, {"classes": "all"})),
        ("builtin:7:classes=all", (7, 0, {"classes": "all"})),
    ],
)
def test_generated_sets(source: str, expected: tuple) -> None:
    assert generated_set(source, of="parts", options=("classes",)) == expected


@pytest.mark.parametrize("source", ["builtin:", "builtin:0", "builtin:-1", "builtin:7:seed=", "builtin:7:colour=red", "builtin:7 ", "builtin:7:classes="])
def test_generated_sets_written_wrongly(source: str) -> None:
    with pytest.raises(ValueError, match="write builtin:<number of parts>"):
        generated_set(source, of="parts", options=("classes",))
