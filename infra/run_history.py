"""What a run has already, so that a training which goes on from a checkpoint does not log its steps twice."""

from __future__ import annotations

from functools import cached_property
from pathlib import PurePosixPath

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

IMAGES = "images"  # MLflow's folder for series of images, and what their names are made of
SEPARATOR = "+"


class RunHistory:
    """What the server knew of a run when it was first asked. A question that fails is asked again."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._steps: dict[str, set[int]] = {}
        self._images: dict[tuple[str, str], str] | None = None

    def is_past(self, metric: Metric) -> bool:
        """The run has this figure at this step or a later one."""
        return metric.step <= self._latest_steps.get(metric.key, metric.step - 1)

    def has_metric(self, metric: Metric) -> bool:
        """The run has this figure at this very step. Slower: reads all its steps."""
        steps = self._steps.get(metric.key)
        if steps is None:
            history = self._client.get_metric_history(self._run_id, metric.key)
            steps = self._steps[metric.key] = {point.step for point in history}
        return metric.step in steps

    def has_other_image(self, key: str, step: int, identifier: str) -> bool:
        """The run has an image of this series and step that is not the one with this identifier."""
        return self._known_images().get((_series(key), str(step)), identifier) != identifier

    def add_image(self, key: str, step: int, identifier: str) -> None:
        self._known_images()[_series(key), str(step)] = identifier

    def forget(self) -> None:
        """Steps and images are asked for anew: the run goes on, and so does what they are compared with."""
        self._steps, self._images = {}, None

    def _known_images(self) -> dict[tuple[str, str], str]:
        images = self._images
        if images is None:
            found = self._client.list_artifacts(self._run_id, IMAGES)
            names = (PurePosixPath(entry.path).name.split(SEPARATOR) for entry in found)
            images = {(name[0], name[2]): PurePosixPath(name[5]).stem for name in names if len(name) > 5}
            self._images = images
        return images

    @cached_property
    def _latest_steps(self) -> dict[str, int]:
        """Of a run MLflow gives each metric's last value; only the message behind it tells the step."""
        latest = self._client.get_run(self._run_id).data.to_proto().metrics
        return {metric.key: metric.step for metric in latest}


def image_name(key: str, step: int, time_ms: int, identifier: str) -> str:
    """The name, without its ending, by which MLflow's page knows an image of a series, its step and time."""
    parts = (_series(key), "step", str(step), "timestamp", str(time_ms), identifier)
    return SEPARATOR.join(parts)


def _series(key: str) -> str:
    return key.replace("/", "~")
