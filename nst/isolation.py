"""Work on untrusted images in a process of its own, where one that crashes a decoder ends nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import ParamSpec, TypeVar

from nst.images import ImageError

P = ParamSpec("P")
T = TypeVar("T")

# The system may have ended the process for another reason, such as memory that others took.
NUM_TRIES = 2


@contextlib.contextmanager
def apart(function: Callable[P, T]) -> Iterator[Callable[P, T]]:
    """`function` as one that runs in another process, which lives as long as the context and as its parent.

    Arguments, results and ImageErrors go through a pipe. Raises ImageError ("crash") where the process dies
    of a call, twice; the next call gets a new one. Calls of several threads wait for each other.
    """
    lock, workers = threading.Lock(), contextlib.ExitStack()

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal worker
        with lock:
            for _ in range(NUM_TRIES):
                if worker is None:
                    worker = workers.enter_context(_worker(function))
                try:
                    worker.send((args, kwargs))
                    result = worker.recv()
                    break
                except (EOFError, OSError):
                    worker = None
                    workers.close()
            else:
                raise ImageError("crash", f"the process that decoded it died, {NUM_TRIES} times")
        if isinstance(result, ImageError):
            raise result
        return result

    worker: Connection | None = None
    with workers:
        yield call


@contextlib.contextmanager
def _worker(function: Callable[..., object]) -> Iterator[Connection]:
    # Not a fork: a process with threads (Ray's, ours) may leave its copy with locks that nobody holds.
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process: BaseProcess = context.Process(target=_serve, args=(its, function), daemon=True)
    process.start()
    its.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, function: Callable[..., object]) -> None:
    with contextlib.suppress(EOFError):
        while True:
            args, kwargs = connection.recv()
            try:
                connection.send(function(*args, **kwargs))
            except ImageError as error:
                connection.send(error)
