"""What a run of `nst stylize` tells: one ledger row an item, progress, a summary, and whether it failed."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import TYPE_CHECKING, Any

from infra import storage
from pipelines.console import Progress, StageFailed, say
from pipelines.ledger import DONE, FAILED, IGNORED, Ledger, LedgerRow
from pipelines.stylize_plan import Item, LeftOut
from pipelines.stylize_worker import STORAGE, Report

if TYPE_CHECKING:
    from pipelines.stylize_run import BucketRun

NUM_SHOWN = 10  # failures on the terminal; all are in the ledger
NUM_WITHOUT_STORE = 20  # pictures in a row that cannot be read or written, before the store is looked at


class GrowingProgress(Progress):
    """Progress whose total is not known at first."""

    def __enter__(self) -> GrowingProgress:
        return self

    def expect(self, total: int) -> None:
        """From now on the time left is shown too."""
        self._total = total
        if self._bar is not None and self._bar.total != total:
            self._bar.total = total
            self._bar.refresh()


class Recorder:
    """Counts, and one row in the ledger for each item.

    Args:
        planned: what the plan counts of that which needs no worker; it may still grow.
    """

    def __init__(self, run: BucketRun, ledger: Ledger, planned: Counter[str]) -> None:
        self._run, self.ledger, self._planned = run, ledger, planned
        self._counts: Counter[str] = Counter()
        self._num_without_store = 0
        self._last_done: str | None = None  # a source that could be read
        self._lost_store: str | None = None
        self.progress: GrowingProgress | None = None

    @property
    def counts(self) -> Counter[str]:
        return self._counts + self._planned

    def item(self, item: Item, report: Report, num_tries: int) -> None:
        """What a worker made of an item."""
        status = FAILED if report.reason else DONE
        self._counts[status] += 1
        if report.reason == STORAGE:
            self._num_without_store += 1
            if self._num_without_store % NUM_WITHOUT_STORE == 0 and self._lost_store is None:
                self._lost_store = self._trouble_of_the_store(report.error)
        else:
            self._num_without_store = 0
            self._last_done = item.source.uri if status == DONE else self._last_done
        if report.reason:
            self._say_failed(f"{item.source.key}: {report.reason}: {report.error}")
        row = self._row(item.source, status, report.reason, report.error)
        self.ledger.append(
            LedgerRow(
                **row,
                output=item.output,
                style=item.look.name,
                style_digest=item.look.digest,
                model=self._run.model.name,
                model_digest=self._run.model.digest,
                settings_digest=self._run.settings.digest,
                note=report.note,
                width=report.width,
                height=report.height,
                seconds=report.seconds,
                output_sha256=report.sha256,
                output_num_bytes=report.num_bytes,
                num_tries=num_tries,
            )
        )
        self._advance(status == FAILED)

    def left_out(self, entry: LeftOut) -> None:
        """A source that no worker saw."""
        status = FAILED if entry.is_failure else IGNORED
        if entry.is_failure:
            self._counts[FAILED] += 1
            self._say_failed(f"{_printable(entry.source.key)}: {entry.reason}: {entry.detail}")
        row = self._row(entry.source, status, entry.reason, entry.detail)
        blank = dict.fromkeys(
            ("output", "style", "style_digest", "model", "model_digest", "settings_digest"), ""
        )
        self.ledger.append(LedgerRow(**row, **blank))
        self._advance(entry.is_failure)

    @property
    def num_failed(self) -> int:
        return self._counts[FAILED]

    def _trouble_of_the_store(self, error: str) -> str | None:
        """Why no other picture needs to be tried; None if it was those alone: a folder that nobody may read
        is no reason to leave the others."""
        if self._run.max_failures is not None:
            return None  # then that is how many may fail
        if self._last_done is None:
            return error
        try:
            storage.read_part(self._last_done, 0, 1)
            storage.check_access(storage.join(self._run.out_uri, "_nst"))
        except (OSError, ValueError) as trouble:
            return str(trouble)
        return None

    @property
    def has_given_up(self) -> bool:
        """Whether no other picture is to be begun."""
        return self._lost_store is not None or self._has_failed_too_often

    @property
    def _has_failed_too_often(self) -> bool:
        # with those of earlier runs: a rerun that skips them must not turn failure into success
        return self._run.max_failures is not None and self.num_failed_ever > self._run.max_failures

    @property
    def num_failed_ever(self) -> int:
        return self.num_failed + self._planned["failed_before"]

    @property
    def failure(self) -> str | None:
        """Why the run as a whole failed; None if it did not."""
        failed, limit = self.num_failed_ever, self._run.max_failures
        if self._lost_store is not None:
            return (
                f"stopped: {NUM_WITHOUT_STORE} pictures in a row could not be read or written "
                f"({self._lost_store}); mend that, run again, then once more with --retry-failed"
            )
        if self._has_failed_too_often:
            return f"{failed} pictures failed, more than --max-failures {limit}"
        if failed and not self._counts[DONE] and not self._planned["done_before"]:
            return f"none of {failed} pictures succeeded"
        return None

    def conclude(self, gallery_uri: str) -> dict[str, Any]:
        """Says what happened; raises StageFailed if that is a failure."""
        counts, out_uri = self.counts, self._run.out_uri
        result = {
            "done": counts[DONE],
            "failed": self.num_failed,
            "done_before": counts["done_before"],
            "failed_before": counts["failed_before"],
            "ignored": counts[IGNORED],
            "out": out_uri,
            "ledger": self.ledger.uri,
            "gallery": gallery_uri,
        }
        if self.num_failed > NUM_SHOWN:
            say(f"… and {self.num_failed - NUM_SHOWN} more; all are in the ledger")
        say(_summary(counts, self.num_failed))
        say(f"  pictures  {out_uri}")
        say(f"  gallery   {gallery_uri}")
        say(f"  ledger    {self.ledger.uri}")
        if self.failure is not None:
            raise StageFailed(self.failure, result)
        return result

    def _advance(self, has_failed: bool) -> None:
        if self.progress is not None:
            self.progress.advance(failed=int(has_failed))

    def _row(self, source: storage.ObjectInfo, status: str, reason: str, error: str) -> dict[str, Any]:
        return {
            "key": _printable(source.key),
            "source": _printable(source.uri),
            "etag": source.etag,
            "num_bytes": source.num_bytes,
            "status": status,
            "reason": reason,
            "error": _printable(error),
            "finished_at": datetime.datetime.now(datetime.UTC),
        }

    def _say_failed(self, line: str) -> None:
        if self.num_failed <= NUM_SHOWN:
            say(f"failed: {_visible(line)}")


def _visible(line: str) -> str:
    """A name must not move a terminal's cursor, nor read like another."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _printable(text: str) -> str:
    """Keys may hold what is no text; the ledger holds UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _summary(counts: Counter[str], num_failed: int) -> str:
    parts = [f"{counts[DONE]} stylized", f"{num_failed} failed"]
    texts = {
        "done_before": "done before",
        "failed_before": "failed before (--retry-failed tries them again)",
        "left_for_later": "left alone by --retry-failed",
        IGNORED: "files that are no pictures",
    }
    return ", ".join(parts + [f"{counts[name]} {text}" for name, text in texts.items() if counts[name]])
