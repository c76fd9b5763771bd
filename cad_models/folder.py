"""A folder on a local disk or behind any URI that ``pyarrow.fs`` knows; every file appears whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs

# They have no folders: creating one costs requests, and leaves an empty object behind.
_OBJECT_STORES = ("s3", "gcs", "abfs")
# What names a user stands between :// and the last @ before the host ends; a password may itself hold an @.
_USER_INFO = re.compile(r"([a-zA-Z][\w+.-]*://)[^/?#\s]*@")


class DatasetError(ValueError):
    """The dataset folder is not what the job needs; the message names the file and the remedy."""


def without_credentials(text: str) -> str:
    """The text with ``***`` for what stands before the ``@`` of each URI in it: ``postgresql://***@host/db``."""
    return _USER_INFO.sub(r"\1***@", text)


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or behind a URI; all names below it are relative, with ``/``. Picklable."""

    uri: str

    def __post_init__(self) -> None:
        if without_credentials(self.uri) != self.uri:
            # It would be printed, tracked and stored in manifests.
            raise DatasetError(
                f"{without_credentials(self.uri)}: credentials do not belong into a URI; give them in the environment, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        if "://" not in self.uri:
            # Train workers run elsewhere than the driver: only absolute paths mean the same to both.
            object.__setattr__(self, "uri", os.path.abspath(os.path.expanduser(self.uri)))

    @cached_property
    def _filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        if self.is_local:
            return pyarrow.fs.LocalFileSystem(), self.uri.rstrip("/")
        filesystem, root = pyarrow.fs.FileSystem.from_uri(self.uri)
        return filesystem, root.rstrip("/")

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether plain file functions reach it."""
        return "://" not in self.uri

    def path(self, name: str) -> str:
        """The full name of a file below the folder, for messages and for plain file functions when local."""
        return f"{self.uri.rstrip('/')}/{name}"

    def _inner(self, name: str) -> str:
        return f"{self._filesystem[1]}/{name}" if name else self._filesystem[1]

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        info = self._filesystem[0].get_file_info(self._inner(name))
        return info.type != pyarrow.fs.FileType.NotFound

    def names(self, name: str = "") -> list[str]:
        """Sorted names of the files and folders directly below ``name``; empty when it is not there."""
        selector = pyarrow.fs.FileSelector(self._inner(name), allow_not_found=True)
        return sorted(info.base_name for info in self._filesystem[0].get_file_info(selector))

    def files(self) -> list[str]:
        """Sorted names, relative to the folder, of all files below it at any depth."""
        selector = pyarrow.fs.FileSelector(self._inner(""), recursive=True)
        start = len(self._inner("")) + 1
        return sorted(info.path[start:] for info in self._filesystem[0].get_file_info(selector) if info.type == pyarrow.fs.FileType.File)

    def state(self, name: str) -> str:
        """Size and modification time of a file, which tell whether it changed; empty when it is not there."""
        info = self._filesystem[0].get_file_info(self._inner(name))
        return f"{info.size}:{info.mtime_ns}" if info.type == pyarrow.fs.FileType.File else ""

    def open(self, name: str) -> pyarrow.NativeFile:
        """A file, to be read at any position. Raises FileNotFoundError."""
        return self._filesystem[0].open_input_file(self._inner(name))

    def read_bytes(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError."""
        with self._filesystem[0].open_input_stream(self._inner(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all: temporary name, flush to disk, rename."""
        filesystem = self._filesystem[0]
        target = self._inner(name)
        parent, _, base = target.rpartition("/")
        if filesystem.type_name not in _OBJECT_STORES:
            filesystem.create_dir(parent, recursive=True)
        if not self.is_local:
            # Object stores publish an object when its upload completes: already all or nothing.
            with filesystem.open_output_stream(target) as stream:
                stream.write(data)
            return
        temporary = f"{parent}/.{base}.tmp-{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def publish(self, name: str, directory: Path) -> None:
        """Make a finished local directory appear as ``name``, replacing what was there. Locally a reader sees the old or the new folder;
        a kill between the two renames is mended by :meth:`recover`. On an object store the files follow each other in the order of their
        names: whoever reads several must be able to tell from the last one that all are there."""
        if not self.is_local:
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                self.write_bytes(f"{name}/{path.relative_to(directory).as_posix()}", path.read_bytes())
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh, old = target.parent / f".{target.name}.new", target.parent / f".{target.name}.old"
        self.recover(name)
        shutil.rmtree(fresh, ignore_errors=True)
        # Copied, then flushed: the scratch folder may lie on another disk.
        try:
            shutil.copytree(directory, fresh)
        except shutil.Error as error:  # a list of every file that failed, in words
            shutil.rmtree(fresh, ignore_errors=True)
            reason = str(error.args[0][0][2]).split(": '")[0]
            raise OSError(f"cannot write {target}: {reason}; what was there is as it was") from error
        for path in fresh.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old, ignore_errors=True)

    def recover(self, name: str) -> None:
        """Put back the folder that :meth:`publish` had moved away when it was killed. Nothing happens otherwise."""
        if not self.is_local:
            return
        target = Path(self.path(name))
        old = target.parent / f".{target.name}.old"
        if old.exists():
            if target.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, target)

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The folder ``name`` as a local directory; a remote one is copied for the time of the ``with`` block.

        Raises:
            FileNotFoundError: it is not there.
        """
        if not self.exists(name):
            raise FileNotFoundError(f"{self.path(name)} is not there")
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory() as scratch:
            inner = self / name
            for file in inner.files():
                target = Path(scratch) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(inner.read_bytes(file))
            yield Path(scratch)

    def remove_leftovers(self, name: str = "") -> None:
        """Delete temporary files that a killed writer left directly below ``name``. Only for a folder's single owner."""
        for base in self.names(name):
            if base.startswith(".") and ".tmp-" in base:
                self.delete(f"{name}/{base}" if name else base)

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all below it; nothing happens when it is not there."""
        filesystem = self._filesystem[0]
        info = filesystem.get_file_info(self._inner(name))
        if info.type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(self._inner(name))
        elif info.type == pyarrow.fs.FileType.File:
            filesystem.delete_file(self._inner(name))

    def read_json(self, name: str) -> Any:
        """A JSON file. Raises FileNotFoundError, or DatasetError naming the file when it is not JSON."""
        try:
            return json.loads(self.read_bytes(name))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DatasetError(f"{self.path(name)} is not valid JSON ({error}): delete it and run the job that writes it again") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON, with sorted keys, so that equal values are equal bytes."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
