"""What a process and all that it starts take: CPU seconds and memory, by looking at them now and then."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass

import psutil

SECONDS_BETWEEN_LOOKS = 0.1
LOOKS_AT_MEMORY_EVERY = 3  # looks; the kernel goes through all pages for it


@dataclass(frozen=True)
class Usage:
    """Seconds by the clock and of CPU time until now; the highest memory so far, in bytes: the sum of the
    proportional set sizes, which counts shared pages once."""

    wall: float
    cpu: float
    memory: int


class ProcessTree:
    """A process and its descendants. A process that comes and goes between two looks is missed, and one that
    ends takes the CPU time since the last look with it (both at most a look's seconds)."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._cpu: dict[tuple[int, float], float] = {}
        self._memory = 0
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def usage(self) -> Usage:
        self._look(with_memory=True)
        return Usage(time.perf_counter(), sum(self._cpu.values()), self._memory)

    def forget_memory(self) -> None:
        """Starts anew with the highest memory."""
        with self._lock:
            self._memory = 0

    def close(self) -> None:
        """Ends the watching, and whatever of the tree is left."""
        self._has_ended.set()
        self._watcher.join()
        for process in self._processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _watch(self) -> None:
        number = 0
        while not self._has_ended.wait(SECONDS_BETWEEN_LOOKS):
            self._look(with_memory=number % LOOKS_AT_MEMORY_EVERY == 0)
            number += 1

    def _look(self, *, with_memory: bool) -> None:
        with self._lock:
            memory = 0
            for process in self._processes():
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
                    if with_memory:
                        memory += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
            self._memory = max(self._memory, memory)


def wait_for(process: subprocess.Popen[str], state: str) -> None:
    """Until the process prints this line. Raises EOFError if it ends without."""
    assert process.stdout is not None
    if not any(line.strip() == state for line in process.stdout):
        raise EOFError


def go_on(process: subprocess.Popen[str]) -> None:
    """Answers a process that waits for a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
