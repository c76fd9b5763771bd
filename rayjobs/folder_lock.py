"""One writer a folder: a second job on the same local folder is refused while the first lives."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from cad_models.dataset import Folder


@contextlib.contextmanager
def locked(folder: Folder, name: str, job: str) -> Iterator[None]:
    """Hold the lock file ``name`` of a local folder for the time of the ``with`` block, then remove it. Folders behind URIs are not locked.

    The kernel holds the lock, so it ends with its owner however that dies; the file's text only tells people who it is.

    Raises:
        ValueError: another process holds it; the message names process and machine.
    """
    if not folder.is_local:
        yield
        return
    path = folder.path(name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        # Ray and the child processes must not inherit it: Python opens files close-on-exec.
        handle = open(path, "a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            handle.close()
            raise ValueError(f"{folder.uri} is being written by {owner}: wait until it ends, or stop it; the same command then goes on") from None
        try:
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # its former owner removed it between our open and our lock: take a fresh one
        handle.close()
    try:
        handle.truncate(0)
        handle.write(f"{job}, process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield
    finally:
        os.remove(path)
        handle.close()
