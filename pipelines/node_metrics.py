"""How busy the nodes of a training are, for MLflow's page of system metrics."""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError

from infra.system_metrics import SystemMetrics
from infra.tracking import TrackedRun
from nst.train import TrainState

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SAMPLES = 10.0


class NodeMetrics:
    """Samples this node in the background, on one rank of each node; rank 0 collects and logs them all.

    Args:
        board: the `ProgressBoard`, through which the samples of other nodes come to rank 0.
        run: on rank 0, None elsewhere.
        state: of the training, for the steps.
    """

    def __init__(self, board: Any, run: TrackedRun | None, state: TrainState) -> None:
        self._board, self._run, self._state = board, run, state
        context = ray.train.get_context()
        self._node = f"node_{context.get_node_rank()}"  # as MLflow's page knows nodes
        self._is_on = run is not None or context.get_local_rank() == 0
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="node-metrics", daemon=True)

    def __enter__(self) -> NodeMetrics:
        if self._is_on:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        if self._is_on:
            self._thread.join(timeout=SECONDS_BETWEEN_SAMPLES)

    def _work(self) -> None:
        metrics = SystemMetrics(self._node)
        while not self._has_ended.wait(SECONDS_BETWEEN_SAMPLES):
            try:
                sample = metrics.sample()
                if self._run is None:
                    self._board.add_sample.remote(sample)
                else:
                    others: dict[str, float] = ray.get(self._board.take_samples.remote(), timeout=5)
                    self._run.log_metrics({**others, **sample}, step=self._state.num_images_seen)
            except (RayError, OSError) as error:  # a comfort: its loss must not end a training
                log.warning("a sample of system metrics from %s is lost: %s", self._node, error)
