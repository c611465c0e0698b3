"""How the entries of a run's queues become requests to MLflow. Each may be sent twice and is stored once."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from PIL import Image

from infra import scratch
from infra.journal import Entry
from infra.run_history import IMAGES, RunHistory, image_name

MAX_METRICS_A_REQUEST = 1000  # MLflow's own limits
MAX_PARAMS_A_REQUEST = 100
MAX_DIGEST_CHARACTERS = 36


class RunDelivery:
    """Sends entries to one run.

    Of a resumed run, figures at steps that it is past, and images at steps that it has, are left out: a
    training that goes on from a checkpoint repeats them.
    """

    def __init__(self, client: MlflowClient, run_id: str, *, is_resumed: bool) -> None:
        self._client, self._run_id, self._is_resumed = client, run_id, is_resumed
        self.history = RunHistory(client, run_id)

    def records(self, kind: str, entries: list[Entry]) -> None:
        """Sends metrics, or one of: params, tags, corpus, status."""
        if kind == "metrics":
            self._deliver_metrics(entries)
            return
        (entry,) = entries
        given = entry.payload
        if kind == "params":
            self._deliver_params(given)
        elif kind == "tags":
            self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in given.items()])
        elif kind == "corpus":
            source = json.dumps({"uri": given["uri"], "digest": given["digest"]})
            place = "s3" if given["uri"].startswith("s3:") else "local"
            # MLflow keeps 36 characters of a digest; the whole one stands in the source.
            digest = given["digest"][:MAX_DIGEST_CHARACTERS]
            dataset = Dataset(name=given["name"], digest=digest, source_type=place, source=source)
            context = InputTag("mlflow.data.context", given["context"])
            self._client.log_inputs(self._run_id, datasets=[DatasetInput(dataset, [context])])
        elif given["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, status=given["status"], end_time=given["time"])

    def _deliver_metrics(self, entries: list[Entry]) -> None:
        metrics = [
            Metric(key, value, entry.payload["time"], entry.payload["step"])
            for entry in entries
            for key, value in entry.payload["values"].items()
        ]
        if entries[0].is_recovered:
            # Another node may have repeated some of these steps, but not those before its checkpoint.
            metrics = [metric for metric in metrics if not self.history.has_metric(metric)]
        elif self._is_resumed:
            metrics = [metric for metric in metrics if not self.history.is_past(metric)]
        for start in range(0, len(metrics), MAX_METRICS_A_REQUEST):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_METRICS_A_REQUEST])

    def _deliver_params(self, params: dict[str, str]) -> None:
        stored = self._client.get_run(self._run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in stored]
        for start in range(0, len(new), MAX_PARAMS_A_REQUEST):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_PARAMS_A_REQUEST])
        for key, value in params.items():
            if stored.get(key, value) != value:
                self._client.set_tag(self._run_id, f"changed.{key}", f"{stored[key]} -> {value}")

    def files(self, kind: str, entries: list[Entry]) -> None:
        """Sends one of: document, image."""
        (entry,) = entries
        given = entry.payload
        if kind == "document":
            self._client.log_text(self._run_id, given["text"], given["file"])
        else:
            self._deliver_image(entry, **given)

    def _deliver_image(self, entry: Entry, key: str, step: int, time: int, identifier: str) -> None:
        """What MLflow's own `log_image` stores, but under the same names at every attempt."""
        if not re.fullmatch(r"[\w\-./ ]+", key, re.ASCII):
            raise ValueError(f"the name of an image holds letters, digits, spaces and _-./ : {key!r}")
        may_repeat = entry.is_recovered or self._is_resumed
        if may_repeat and self.history.has_other_image(key, step, identifier):
            return
        name = image_name(key, step, time, identifier)
        data = io.BytesIO(entry.attachment or b"")
        with scratch.folder("nst-image-") as parent, Image.open(data) as image:
            folder = Path(parent) / IMAGES
            folder.mkdir()
            image.save(folder / f"{name}.png")
            compress_image_size(image).save(folder / f"{name}+compressed.webp")
            self._client.log_artifacts(self._run_id, str(folder), IMAGES)
        self._client.set_tag(self._run_id, MLFLOW_LOGGED_IMAGES, True)
        if entry.is_recovered:
            self.history.add_image(key, step, identifier)
