"""One logical training: what is trained on what, where it lives, and how far it is."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil

from infra import storage
from infra.cluster import REPOSITORY
from infra.packaging import commit_of
from nst.config import TrainConfig, to_dict
from nst.corpus import Corpus
from nst.sampling import DynamicBatchSampler, largest_world_size

RECORD_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """One logical training: what is trained on what, and where it lives. Written to OUT/NAME/run.json, so
    that the same name goes on with the same thing, in the same MLflow run."""

    name: str
    out_uri: str
    config: TrainConfig
    content: Corpus
    style: Corpus

    @property
    def uri(self) -> str:
        return storage.join(self.out_uri, self.name)

    @property
    def checkpoint_uri(self) -> str:
        return storage.join(self.uri, "checkpoint")

    @property
    def checkpoints_uri(self) -> str:
        return storage.join(self.uri, "checkpoints")

    def identity(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "content": {"uri": self.content.uri, "digest": self.content.manifest.digest},
            "style": {"uri": self.style.uri, "digest": self.style.manifest.digest},
        }

    def sizes(self, num_workers: tuple[int, int]) -> tuple[int, ...]:
        """The numbers of workers among those wanted (least, most) that can share a batch, in rising order.

        Raises:
            ValueError: there is none, or the corpora have no samples.
        """
        least, most = num_workers
        labels, batch = self.style.label_runs, self.config.batch
        sizes = {largest_world_size(labels, batch, size) for size in range(least, most + 1)}
        wanted = tuple(sorted(size for size in sizes if size >= least))
        # says why where there is none
        DynamicBatchSampler.for_corpora(
            self.content, self.style, batch, self.config.seed, wanted[0] if wanted else least
        )
        return wanted


def read_known_run(training: Training) -> dict[str, Any]:
    """What OUT/NAME/run.json says of an earlier start, {} if there was none.

    Raises:
        ValueError: the name belongs to a training of something else.
    """
    uri = storage.join(training.uri, RECORD_FILE)
    if not storage.exists(uri):
        return {}
    try:
        known = json.loads(storage.read_bytes(uri))
        identity, status, driver = known["identity"], known["status"], known["driver"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{uri} is no record of this version's trainings ({error!r}); give this training another --name"
        ) from None
    for part, value in training.identity().items():
        if identity.get(part) != value:
            raise ValueError(
                f"{training.uri} was started with another {part}; give this training another --name"
            )
    if status == "RUNNING" and is_alive(driver):
        raise ValueError(f"{training.uri} is being trained now, by process {known['driver']['pid']} here")
    return known


def write_known_run(
    training: Training, run_id: str, status: str, num_threads: int, result: dict[str, Any] | None = None
) -> None:
    record = {
        "identity": training.identity(),
        "run_id": run_id,
        "status": status,
        "num_threads": num_threads,
        "driver": this_process(),
        "result": result,
    }
    storage.write_bytes(storage.join(training.uri, RECORD_FILE), json.dumps(record, indent=2).encode())


def this_process() -> dict[str, Any]:
    """What tells this process from every other."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def is_alive(process: dict[str, Any]) -> bool:
    """Whether it runs on this machine. Of others nothing is known: they count as gone."""
    if process.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(process.get("pid")).create_time() == process.get("started")
    except (psutil.NoSuchProcess, ValueError, TypeError):
        return False


def code_version() -> str:
    """NST_COMMIT (a job has no repository), else the commit of the working tree, "unknown" outside of one."""
    return os.environ.get("NST_COMMIT") or commit_of(str(REPOSITORY)) or "unknown"
