"""Many pictures through one model: reading and decoding, the model, and encoding and writing beside each
other, in threads (Pillow, PyTorch and the network let others run).

On a CPU the model takes one picture at a time: two at once are not faster (measured at 96 and 200 px), and
their last bits would depend on which came together. On a GPU those of equal size that are ready go together.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from infra import storage
from nst.image_headers import DEFAULT_LIMITS, ImageError, check_num_bytes, opened
from nst.networks.style_code import StyleCode
from nst.stylize import Stylizer
from pipelines.stylize_plan import Item, Look
from pipelines.stylize_worker import STORAGE, Kept, Report, StylizeSettings, decode, encode, stylize

MAX_PIXELS = 24_000_000  # decoded at a time; a larger picture is alone
MAX_IN_A_BATCH = 16  # on a GPU
NUM_READERS, NUM_WRITERS = 4, 8  # which mostly wait for the store, or for a disk to say that it has it

Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class _Picture:
    """An item on its way. `pixels` are the source's, then the stylized ones: memory has one of them."""

    item: Item
    started: float
    pixels: NDArray[np.uint8]
    kept: Kept
    num_pixels: int


class Workshop:
    """Holds a model. Several threads may call `do`; what is decoded at a time is bounded over all of them.

    Args:
        style: index -> uint8 [h, w, 3]; asked when a style is first needed.
        num_threads: that PyTorch may use.
    """

    def __init__(
        self,
        stylizer: Stylizer,
        style: Callable[[int], NDArray[np.uint8]],
        settings: StylizeSettings,
        *,
        source_uri: str,
        out_uri: str,
        num_threads: int,
    ) -> None:
        self._stylizer, self._style, self._settings = stylizer, style, settings
        self._source_uri, self._out_uri = source_uri, out_uri
        self._max_in_a_batch = MAX_IN_A_BATCH if stylizer.device.type == "cuda" else 1
        self._codes: dict[str, StyleCode] = {}
        self._room = _Room(MAX_PIXELS)
        self._readers = ThreadPoolExecutor(NUM_READERS, "read")
        self._writers = ThreadPoolExecutor(NUM_WRITERS, "write")
        # PyTorch's number of threads is one of the calling thread.
        self._model = ThreadPoolExecutor(1, "model", torch.set_num_threads, (num_threads,))

    def do(self, items: Sequence[Item]) -> list[Report]:
        """A report for each item, in their order. Failures are reported, not raised."""
        reports: dict[int, Future[Report] | Report] = {}
        reading = {self._readers.submit(self._read, item): place for place, item in enumerate(items)}
        while reading:
            ready, _ = wait(reading, return_when=FIRST_COMPLETED)
            pictures: list[tuple[int, _Picture]] = []
            for future in sorted(ready, key=reading.__getitem__):
                place, found = reading.pop(future), future.result()
                if isinstance(found, Report):
                    reports[place] = found
                else:
                    pictures.append((place, found))
            for group in self._groups(pictures):
                together = [picture for _, picture in group]
                failures = self._model.submit(self._stylize, together).result()
                for (place, picture), failure in zip(group, failures, strict=True):
                    reports[place] = self._writers.submit(self._write, picture, failure)
        found = (reports[place] for place in range(len(items)))
        return [one if isinstance(one, Report) else one.result() for one in found]

    def close(self) -> None:
        for threads in (self._readers, self._model, self._writers):
            threads.shutdown()

    def _groups(self, pictures: list[tuple[int, _Picture]]) -> Iterator[list[tuple[int, _Picture]]]:
        """Those that go through the model together: opaque, of one size and in one look."""
        alike: dict[object, list[tuple[int, _Picture]]] = {}
        for place, picture in pictures:
            shape, max_side = picture.pixels.shape, self._settings.max_side
            is_reduced = max_side is not None and max(shape[:2]) > max_side
            alone = self._max_in_a_batch == 1 or shape[2] == 4 or is_reduced
            alike.setdefault(place if alone else (shape, picture.item.look.name), []).append((place, picture))
        for group in alike.values():
            for start in range(0, len(group), self._max_in_a_batch):
                yield group[start : start + self._max_in_a_batch]

    def _read(self, item: Item) -> _Picture | Report:
        started = time.monotonic()
        num_pixels = 0

        def read() -> _Picture:
            nonlocal num_pixels
            check_num_bytes(item.source.num_bytes)
            data = storage.read_bytes(item.source.uri, within=self._source_uri)
            with opened(data, DEFAULT_LIMITS) as image:
                size = image.width * image.height
            self._room.take(size)
            num_pixels = size
            pixels, kept = decode(data, self._settings)
            return _Picture(item=item, started=started, pixels=pixels, kept=kept, num_pixels=num_pixels)

        found = _reported(read, started)
        if isinstance(found, Report):
            self._room.give_back(num_pixels)
        return found

    def _stylize(self, pictures: list[_Picture]) -> list[Report | None]:
        """What went wrong with each, if anything did."""
        if len(pictures) == 1:
            return [self._stylize_one(pictures[0])]
        stylized = _reported(lambda: self._batch(pictures), pictures[0].started)
        if isinstance(stylized, Report):  # which of them it was, each shows alone
            return [self._stylize_one(picture) for picture in pictures]
        for picture, pixels in zip(pictures, stylized, strict=True):
            picture.pixels = pixels
        return [None] * len(pictures)

    def _stylize_one(self, picture: _Picture) -> Report | None:
        def work() -> None:
            code = self._code(picture.item.look)
            picture.pixels = stylize(picture.pixels, self._stylizer, code, self._settings)

        return _reported(work, picture.started)

    def _batch(self, pictures: list[_Picture]) -> NDArray[np.uint8]:
        return self._stylizer.stylize_batch(
            np.stack([picture.pixels for picture in pictures]),
            self._code(pictures[0].item.look),
            strength=self._settings.strength,
            colors=self._settings.colors,
        )

    def _code(self, look: Look) -> StyleCode:
        if look.name not in self._codes:
            styles = [self._style(index) for index in look.styles]
            weights = look.weights if len(styles) > 1 else None
            self._codes[look.name] = self._stylizer.encode_style(styles, weights)
        return self._codes[look.name]

    def _write(self, picture: _Picture, failure: Report | None) -> Report:
        def write() -> Report:
            rendered = encode(picture.pixels, picture.kept, self._settings)
            uri = storage.join(self._out_uri, picture.item.output)
            storage.write_bytes(uri, rendered.data, within=self._out_uri)
            return Report(
                note=rendered.note,
                width=rendered.width,
                height=rendered.height,
                seconds=time.monotonic() - picture.started,
                sha256=hashlib.sha256(rendered.data).hexdigest(),
                num_bytes=len(rendered.data),
            )

        try:
            return failure or _reported(write, picture.started)
        finally:
            self._room.give_back(picture.num_pixels)


class _Room:
    """Pixels that may be held at a time; what needs more than all waits until it is alone."""

    def __init__(self, num_pixels: int) -> None:
        self._all = self._free = num_pixels
        self._changed = threading.Condition()

    def take(self, num: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: num <= self._free or self._free == self._all)
            self._free -= num

    def give_back(self, num: int) -> None:
        with self._changed:
            self._free += num
            self._changed.notify_all()


def _reported(work: Callable[[], Result], started: float) -> Result | Report:
    """What `work` returns, or what went wrong in it."""
    try:
        return work()
    except ImageError as error:
        reason, detail = error.reason, error.detail
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason, detail = "out_of_memory", f"not enough memory: {error}; --max-side makes it smaller"
    except OSError as error:
        reason, detail = STORAGE, f"{error}"
    except Exception as error:  # noqa: BLE001 - one picture that finds a fault of ours must not stop the others
        reason, detail = "internal", f"{type(error).__name__}: {error}"
    return Report(reason=reason, error=detail, seconds=time.monotonic() - started)
