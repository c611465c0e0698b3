"""One logical training: what is trained on what, and where it lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.cluster import REPOSITORY
from infra.packaging import commit_of
from nst.config import TrainConfig, to_dict
from nst.corpus import Corpus
from nst.sampling import DynamicBatchSampler, largest_world_size


@dataclass(frozen=True, kw_only=True)
class Training:
    """One logical training: what is trained on what, and where it lives. OUT/NAME/run.json holds it
    (`pipelines.training_claim`), so that the same name goes on with the same thing, in the same MLflow run.
    """

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


def code_version() -> str:
    """NST_COMMIT (a job has no repository), else the commit of the working tree, "unknown" outside of one."""
    return os.environ.get("NST_COMMIT") or commit_of(str(REPOSITORY)) or "unknown"
