"""Fetching shards of remote corpora before the batches that need them: in the order of need, a few at once,
and never more than the cache holds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from nst.corpus import Corpus

log = logging.getLogger(__name__)

NUM_DOWNLOADS = 4  # at once, for each training process
SHARE_OF_CACHE = (
    0.5  # the rest is for what is read without having been fetched ahead, and for what was just read
)


class ShardPrefetcher:
    """Threads that fetch what `want` was told, until `close`.

    What has been fetched counts as held until the last step that was announced for it is done; no more is
    fetched while that would exceed the budget. An error is left to whoever reads the shard, who tries again
    and raises his own.

    Args:
        corpora: shards are named by a place in here and a number.
        num_sharing: processes of this machine that share the cache.
    """

    def __init__(self, corpora: tuple[Corpus, ...], num_sharing: int) -> None:
        self._corpora = corpora
        limit = min(corpus.cache_limit() for corpus in corpora if corpus.is_remote)
        self._budget = SHARE_OF_CACHE * limit / num_sharing
        self._last_steps: dict[tuple[int, int], int] = {}  # of every shard that is wanted, in order of need
        self._held: dict[tuple[int, int], int] = {}  # bytes of those that were fetched, or are being fetched
        self._changed = threading.Condition()
        self._is_closed = False
        for number in range(NUM_DOWNLOADS):
            threading.Thread(target=self._run, name=f"prefetch-{number}", daemon=True).start()

    def want(self, step: int, shards: Iterable[tuple[int, int]]) -> None:
        """A step will need these shards, each the place of its corpus and its number. Steps come in order."""
        with self._changed:
            for shard in shards:
                self._last_steps[shard] = step
            self._changed.notify_all()

    def done(self, step: int) -> None:
        """A step has been read."""
        with self._changed:
            for shard in [shard for shard, last in self._last_steps.items() if last <= step]:
                del self._last_steps[shard]
                self._held.pop(shard, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Begins no further downloads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            corpus, number = self._corpora[shard[0]], shard[1]
            try:
                corpus.fetch_shard(number)
            except Exception as error:  # noqa: BLE001 - its reader will meet it
                log.info("%s, shard %d was not fetched ahead: %s", corpus.uri, number, error)

    def _next(self) -> tuple[int, int] | None:
        """The next shard to fetch, once there is one and room for it; None when all ends."""
        with self._changed:
            while not self._is_closed:
                shard = next((shard for shard in self._last_steps if shard not in self._held), None)
                if shard is not None:
                    num_bytes = self._corpora[shard[0]].manifest.shards[shard[1]].num_bytes
                    if not self._held or sum(self._held.values()) + num_bytes <= self._budget:
                        self._held[shard] = num_bytes
                        return shard
                self._changed.wait()
            return None
