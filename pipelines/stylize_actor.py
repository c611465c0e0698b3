"""The Ray actor of `nst stylize`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from infra import scratch
from nst.allocator import keep_freed_memory
from pipelines.stylize_plan import Item
from pipelines.stylize_worker import Report, StylizeSettings, stylizer_of
from pipelines.workshop import Workshop


@ray.remote(num_cpus=1, max_restarts=0)
class StylizeWorker:
    """Holds a model.

    Args:
        model_files: name -> bytes of the checkpoint's files: a worker may be on another machine.
        styles: references to uint8 [h, w, 3], fetched when they are first needed.
        num_threads: that PyTorch may use.
    """

    def __init__(
        self,
        model_files: dict[str, bytes],
        styles: list[Any],
        settings: StylizeSettings,
        *,
        source_uri: str,
        out_uri: str,
        num_threads: int,
    ) -> None:
        keep_freed_memory()
        with scratch.folder("nst-model-") as folder:
            for name, data in model_files.items():
                Path(folder, name).write_bytes(data)
            stylizer = stylizer_of(folder, settings)
        self._workshop = Workshop(
            stylizer,
            lambda index: ray.get(styles[index], timeout=300),
            settings,
            source_uri=source_uri,
            out_uri=out_uri,
            num_threads=min(num_threads, os.cpu_count() or 1),
        )

    def stylize(self, items: list[Item]) -> list[Report]:
        """A report for each."""
        return self._workshop.do(items)
