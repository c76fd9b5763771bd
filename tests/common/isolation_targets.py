"""Functions that the tests of isolation call in a child process; some are fatal."""

import ctypes
import os
import signal
import time

import numpy as np

from cad_models.common.meshes import BadMesh


def add(a, b):
    return a + b


def process_id():
    return os.getpid()


def loop_forever():
    while True:
        pass


def sleep_holding_the_interpreter_lock(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL, unlike CDLL, keeps the lock


def allocate(num_bytes):
    return int(np.ones(num_bytes, np.uint8).sum())


def large_result(num_bytes):
    return np.ones(num_bytes, np.uint8)


def exit_without_a_word(code):
    os._exit(code)


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(10)


def raise_bad_mesh():
    raise BadMesh("truncated", "cut off at byte 7")


def raise_what_cannot_be_sent():
    error = ValueError("with a function inside")
    error.function = lambda: None
    raise error


def return_what_cannot_be_sent():
    return lambda: None


def load(path):
    from cad_models.common.meshes import mesh_facts, read_mesh

    return mesh_facts(read_mesh(path))
