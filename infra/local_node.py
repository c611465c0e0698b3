"""One node of a cluster on this machine, and the processes that are its own."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass, field

import psutil

from infra.local_servers import SECONDS_TO_STOP

# All that a node starts inherits it, whatever becomes of the parents: how a node's processes are found.
MARK = "NST_LOCAL_NODE"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the cluster: its address, its id in Ray (hex), its `ray start` and what that started."""

    address: str
    node_id: str
    raylet_process_id: int
    process: subprocess.Popen[bytes] = field(repr=False)
    mark: str = field(repr=False)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


def processes_of(node: Node) -> list[psutil.Process]:
    """All that runs on the node: Ray's own processes, workers, drivers of jobs and what those started."""
    return marked(node.mark)


def marked(mark: str) -> list[psutil.Process]:
    """The processes of a node, or of all nodes for the part of the mark that they share."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or somebody else's
            own = process.environ().get(MARK, "")
            if own == mark or own.startswith(f"{mark}/"):
                found.append(process)
    return found


def kill_all(mark: str) -> None:
    """Ends a mark's processes. All are frozen before the first one dies, so that none can start another."""
    frozen: set[psutil.Process] = set()
    while running := set(marked(mark)) - frozen:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        frozen |= running
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(frozen, timeout=SECONDS_TO_STOP)
