"""OUT/_nst/run.json: what a stylized bucket says about where it comes from, and what MLflow is told of it."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from infra import places, storage
from infra.usage import BUCKET_ID, BackgroundNote, Status, Use

RunStatus = Literal["running", "done", "failed", "interrupted"]

STATUSES: dict[str, Status] = {
    "running": "RUNNING",
    "done": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
NUM_STYLES_NAMED = 10


def record_uri(out_uri: str) -> str:
    return places.join(out_uri, "_nst", "run.json")


def read_record(out_uri: str) -> dict[str, Any] | None:
    """What is written there; None where nothing is.

    Raises:
        OSError: it cannot be read, or is no record of a stylized bucket.
    """
    try:
        return parse_record(storage.read_bytes(record_uri(out_uri)), record_uri(out_uri))
    except FileNotFoundError:
        return None


def parse_record(data: bytes, uri: str) -> dict[str, Any]:
    """Raises OSError if `data` is no record of a stylized bucket."""
    try:
        content = json.loads(data)
        _ = content["model"]["digest"], content["started_at"], settings_line(content), use_of(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{uri} is no record of a stylized bucket ({error!r}); stylize into it again") from None
    return content


class BucketRecord:
    """The record of a run into `out_uri`, written as the run goes on.

    The bucket's identity is kept from run to run, as long as it stays where it is: a copy is another bucket.

    Args:
        facts: what does not change while the run goes on. `facts["model"]` has `name`, `version` (None if it
            is not registered: then MLflow is told nothing) and `digest`.
    """

    def __init__(self, out_uri: str, facts: Mapping[str, Any]) -> None:
        self._out_uri, self._uri = out_uri, record_uri(out_uri)
        try:
            self._before = read_record(out_uri)
        except OSError:
            self._before = None  # it is written anew
        self._content = {
            "bucket": self._identity(self._before) or secrets.token_hex(16),
            **facts,
            "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def begin(self) -> None:
        """Says that the run goes on; MLflow hears of it meanwhile."""
        if not self._put("running", {}, 0.0, if_absent=self._before is None):
            with contextlib.suppress(OSError):  # another first run has just drawn one
                self._content["bucket"] = (
                    self._identity(read_record(self._out_uri)) or self._content["bucket"]
                )
            self._put("running", {}, 0.0)
        if (use := use_of(self._content)) is not None:
            BackgroundNote(use)

    def end(self, status: RunStatus, counts: Mapping[str, int]) -> None:
        """Says how the run ended, to MLflow too; waits for that a few seconds at most."""
        started = datetime.datetime.fromisoformat(self._content["started_at"])
        seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
        self._conclude(status, counts, round(seconds, 1))

    def catch_up(self, status: RunStatus, counts: Mapping[str, int]) -> None:
        """Where nothing was left to do: says what an earlier run could not say, or did not live to say."""
        before, model = self._before, self._content["model"]
        if before is None or before["model"]["digest"] != model["digest"]:
            return
        is_told = model["version"] is None or before.get("tracking") is not None
        if before["status"] == status and before["model"] == model and is_told:
            return
        self._content = {**self._content, **before, "bucket": self._content["bucket"], "model": model}
        self._conclude(status, counts, before["seconds"])

    def _conclude(self, status: RunStatus, counts: Mapping[str, int], seconds: float) -> None:
        self._put(status, counts, seconds)
        if (use := use_of(self._content)) is None:
            return
        if (noted := BackgroundNote(use).result()) is not None:
            self._content["tracking"] = dataclasses.asdict(noted)
            self._write()

    def _identity(self, record: Mapping[str, Any] | None) -> str | None:
        """The bucket's, as a record in its place has it."""
        if record is None or record["arguments"].get("out", "").rstrip("/") != self._out_uri.rstrip("/"):
            return None
        identity = str(record.get("bucket", ""))
        return identity if BUCKET_ID.fullmatch(identity) else None

    def _put(
        self, status: RunStatus, counts: Mapping[str, int], seconds: float, *, if_absent: bool = False
    ) -> bool:
        self._content |= {"status": status, "seconds": seconds, "counts": dict(counts), "tracking": None}
        return self._write(if_absent=if_absent)

    def _write(self, *, if_absent: bool = False) -> bool:
        content = json.dumps(self._content, indent=2, ensure_ascii=False).encode()
        return storage.write_bytes(self._uri, content, if_absent=if_absent, within=self._out_uri)


def use_of(record: Mapping[str, Any]) -> Use | None:
    """The record as MLflow is told it; None for a model that is not registered."""
    model, arguments, code = record["model"], record["arguments"], record.get("code", {})
    if model.get("version") is None:
        return None
    counts = record["counts"]
    return Use(
        bucket=record.get("bucket", ""),
        model=model["name"],
        version=model["version"],
        model_digest=model["digest"],
        source=arguments["source"],
        out=arguments["out"],
        status=STATUSES[record["status"]],
        started_at=record["started_at"],
        seconds=record["seconds"],
        num_done=counts.get("done", 0) + counts.get("done_before", 0),
        num_failed=counts.get("failed", 0) + counts.get("failed_before", 0),
        settings=settings_line(record),
        settings_digest=record["settings_digest"],
        code_commit=code.get("commit", ""),
        code_digest=code.get("digest", ""),
    )


def settings_line(record: Mapping[str, Any]) -> str:
    """What was asked for, in a line: the styles, then the settings."""
    names = [style["name"] for style in record.get("styles", ())]
    more = len(names) - NUM_STYLES_NAMED
    styles = ", ".join(names[:NUM_STYLES_NAMED]) + (f" and {more} more" if more > 0 else "")
    left_out = ("source", "out", "retry_failed", "max_failures")
    settings = [
        f"{key} {value}"
        for key, value in record["arguments"].items()
        if key not in left_out and value not in (None, False)
    ]
    return "; ".join([f"style {styles}", *settings])
