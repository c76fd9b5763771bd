"""Running a function in a process that can be lost: native code that hangs, crashes or eats memory takes only the child with it.

The child is a fresh interpreter (no fork: threads and locks of the parent stay out of it), started once and used again for every call. Values
travel as pickles over a private socket pair that only the two processes hold. Unpickling runs what the sender says, so it is never done on
files or on what the network brings; here both ends are this program, and a function's own process could lie to its parent in any format.
"""

import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import IO

from cad_models.common.memory import keep_freed_memory

LOST_REASONS: tuple[str, ...] = ("timeout", "out_of_memory", "crashed")

_CHANNEL_BYTES = 2 << 20
_START_TIMEOUT_S = 120.0  # interpreter and imports on a busy machine
_CHILD_CODE = "import sys; sys.path[:0] = {path!r}; from cad_models.common.isolation import _serve; _serve({channel}, {lifeline}, {name!r}, {limit})"


class Lost(RuntimeError):
    """The child process was lost during a call; the next call starts another.

    Args:
        reason: one of :data:`LOST_REASONS`.
        detail: what happened, for a person.
    """

    def __init__(self, reason: str, detail: str):
        assert reason in LOST_REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Isolated:
    """``function`` in a child process; also a context manager, which ends the child.

    Calls are taken one at a time (a lock guards the channel). Exceptions of the function are raised here as they are; only the loss of the
    child becomes :class:`Lost`. The child ends with its parent, even when the parent is killed, and even inside native code.

    Args:
        function: "module:name", or a function that can be imported by that name (not a lambda, and not one of the script that was started).
        timeout_s: for one call, in seconds. The first call of a function that compiles or imports late includes that.
        memory_limit_bytes: of private memory that the calls may add to what the child has after importing the function's module. Late
            imports count. Enforced on Linux.

    Raises:
        ValueError: the function cannot be imported by name, or a limit is not positive.
    """

    def __init__(self, function: str | Callable, *, timeout_s: float | int, memory_limit_bytes: int):
        if timeout_s <= 0 or memory_limit_bytes <= 0:
            raise ValueError(f"limits must be positive: timeout_s={timeout_s}, memory_limit_bytes={memory_limit_bytes}")
        self._name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        if self._name.startswith("__main__:") or "<" in self._name:
            raise ValueError(f"{self._name} cannot be imported by another process: give a top-level function of a module")
        _resolve(self._name)
        self._timeout_s = timeout_s
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._channel: Connection | None = None
        self._lifeline = -1
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, *args):
        """Calls the function with ``args`` in the child.

        Returns:
            What the function returned.

        Raises:
            Lost: the time was over, the memory limit was met, or the process died.
            Exception: whatever the function raised.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end()  # died between two calls, which is nobody's loss
            if self._process is None:
                self._start()
            try:
                self._channel.send(args)
                return self._receive(time.monotonic() + self._timeout_s)
            except (EOFError, ConnectionError) as error:
                raise self._loss() from error

    def close(self) -> None:
        """Ends the child process, if there is one. A later call starts another."""
        with self._lock:
            self._end()

    def _receive(self, deadline: float):
        if not self._channel.poll(max(0.0, deadline - time.monotonic())):
            self._end()
            raise Lost("timeout", f"no result after {self._timeout_s:g} s")
        status, value = self._channel.recv()
        if status == "returned":
            return value
        if status == "raised":
            raise value
        self._end()  # out of memory: what the interpreter could not finish is unknown, so it is not used again
        raise Lost("out_of_memory", value)

    def _loss(self) -> Lost:
        """Ends a child whose channel broke, and says what its exit status and its last words tell."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        words = self._errors.read().decode(errors="replace").strip()
        killed = code == -signal.SIGKILL  # not by us, so most likely by the kernel for want of memory
        self._end()
        if killed or "bad_alloc" in words or "MemoryError" in words or "Cannot allocate memory" in words or "LLVM ERROR: out of memory" in words:
            return Lost("out_of_memory", "killed, most likely for want of memory" if killed else words[-300:])
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return Lost("crashed", f"the process ended with {how}" + (f": {words[-300:]}" if words else ""))

    def _start(self) -> None:
        parent_end, child_end = Pipe(duplex=True)
        for end in (parent_end, child_end):
            _widen(end)
        lifeline_read, self._lifeline = os.pipe()  # its end in this process closes when this process ends, however that happens
        self._errors = tempfile.TemporaryFile()
        code = _CHILD_CODE.format(
            path=[entry or os.getcwd() for entry in sys.path],
            channel=child_end.fileno(),
            lifeline=lifeline_read,
            name=self._name,
            limit=self._memory_limit_bytes,
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # native libraries print there
                stderr=self._errors,
                pass_fds=(child_end.fileno(), lifeline_read),
            )
        finally:
            child_end.close()
            os.close(lifeline_read)
        self._channel = parent_end
        try:
            ready = parent_end.poll(_START_TIMEOUT_S) and parent_end.recv() == "ready"
        except (EOFError, ConnectionError) as error:
            raise self._loss() from error
        if not ready:
            self._end()
            raise Lost("timeout", f"the child process did not start within {_START_TIMEOUT_S:g} s")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def __del__(self):
        if getattr(self, "_process", None) is not None:
            self._end()


def _resolve(name: str) -> Callable:
    """The function that "module:name" names."""
    module, colon, path = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is not of the form 'module:name'")
    try:
        target = importlib.import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    return target


def _widen(end: Connection) -> None:
    """Room for a whole message (the kernel gives what it allows), so that its sender need not wait, part by part, for its receiver's turn on a busy core."""
    with socket.socket(fileno=os.dup(end.fileno())) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHANNEL_BYTES)


# --- The child ----------------------------------------------------------------------------------------------------------------------------


def _serve(channel: int, lifeline: int, name: str, memory_limit_bytes: int) -> None:
    """The child's whole life: calls from the channel until it closes."""
    _die_with(lifeline)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function = _resolve(name)
    connection = Connection(channel)
    keep_freed_memory()  # it works on one file after the other, with arrays of much the same sizes
    _limit_memory(memory_limit_bytes)
    connection.send("ready")
    while True:
        try:
            args = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            reply = ("returned", function(*args))
        except MemoryError as error:
            reply = ("out_of_memory", f"the memory limit of {memory_limit_bytes} bytes was met: {error}")
        except Exception as error:
            reply = ("raised", error)
        del args
        try:
            connection.send(reply)
        except (EOFError, ConnectionError):
            return
        except MemoryError:
            connection.send(("out_of_memory", f"the result does not fit into the memory limit of {memory_limit_bytes} bytes"))
        except Exception as error:  # what cannot be pickled, result or exception, must not end the child
            connection.send(("raised", RuntimeError(f"{name} gave something that cannot be sent: {reply[1]!r:.300} ({error})")))
        del reply


def _die_with(lifeline: int) -> None:
    """Ends this process when the other end of the pipe ``lifeline`` closes.

    The kernel sends SIGIO then, whose default action ends a process even inside native code that holds the interpreter's lock, where no
    Python thread could act. (Linux's parent-death signal will not do: it fires when the parent's *thread* ends, and actors change threads.)
    """
    import fcntl
    import select

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # closed before the signal was asked for
        os._exit(1)


def _limit_memory(added_bytes: int) -> None:
    """Limits private memory to what is used now and ``added_bytes``. RLIMIT_DATA counts what is written, unlike RLIMIT_AS, which also
    counts the address space that interpreters, compilers and thread stacks reserve and never touch."""
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + added_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
