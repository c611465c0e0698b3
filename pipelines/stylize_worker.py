"""What one worker of `nst stylize` does with one picture: read, decode, stylize, encode, write."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from infra import storage
from nst.allocator import keep_freed_memory
from nst.images import ImageError, ImageFormat, decode_image, encode_image
from nst.networks.style_code import StyleCode
from nst.stylize import Stylizer
from pipelines.exif import kept_exif, with_exif
from pipelines.stylize_plan import Look

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODE_VERSION = 1  # raise it when the same settings give other pictures: reruns then do everything again


@dataclass(frozen=True, kw_only=True)
class StylizeSettings:
    """What an output depends on besides source, style and model. `quality` is the encoder's, 1 to 100."""

    strength: float = 1.0
    colors: str = "style"
    max_side: int | None = None
    format: ImageFormat = "jpg"
    quality: int = 92
    keeps_metadata: bool = False
    precision: str = "fp32"

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr([CODE_VERSION, *sorted(asdict(self).items())]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """An encoded picture; width and height in px."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one item. `reason` is empty if it went well."""

    reason: str = ""
    error: str = ""
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    sha256: str = ""
    num_bytes: int = 0


def render(data: bytes, stylizer: Stylizer, code: StyleCode, settings: StylizeSettings) -> Rendered:
    """The bytes of a picture file -> those of its stylization, upright, in sRGB, with its alpha.

    Raises ImageError for what is wrong with the file.
    """
    decoded = decode_image(data)
    pixels = decoded.rgb if decoded.alpha is None else np.dstack([decoded.rgb, decoded.alpha])
    done = stylizer(
        pixels, code, strength=settings.strength, colors=settings.colors, max_side=settings.max_side
    )
    alpha = None if decoded.alpha is None else done[:, :, 3]
    encoded = encode_image(np.ascontiguousarray(done[:, :, :3]), alpha, settings.format, settings.quality)
    if settings.keeps_metadata and (exif := kept_exif(data)) is not None:
        encoded = with_exif(encoded, exif, settings.format)
    return Rendered(data=encoded, width=done.shape[1], height=done.shape[0])


def stylizer_of(checkpoint_dir: str, settings: StylizeSettings) -> Stylizer:
    return Stylizer.load(checkpoint_dir, dtype=PRECISIONS[settings.precision])


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
        num_threads: int,
    ) -> None:
        keep_freed_memory()
        torch.set_num_threads(min(num_threads, os.cpu_count() or 1))
        with tempfile.TemporaryDirectory(prefix="nst-model-") as folder:
            for name, data in model_files.items():
                Path(folder, name).write_bytes(data)
            self._stylizer = stylizer_of(folder, settings)
        self._styles, self._settings = styles, settings
        self._codes: dict[int, StyleCode] = {}

    def stylize(self, source_uri: str, output_uri: str, look: Look) -> Report:
        """One item. Failures of the item are reported, not raised."""
        started = time.monotonic()
        try:
            rendered = render(
                storage.read_bytes(source_uri), self._stylizer, self._code(look), self._settings
            )
            storage.write_bytes(output_uri, rendered.data)
        except ImageError as error:
            return Report(reason=error.reason, error=error.detail, seconds=time.monotonic() - started)
        except (MemoryError, torch.OutOfMemoryError) as error:
            detail = f"not enough memory: {error}; --max-side makes it smaller"
            return Report(reason="out_of_memory", error=detail, seconds=time.monotonic() - started)
        except OSError as error:
            return Report(reason="storage", error=f"{error}", seconds=time.monotonic() - started)
        except Exception as error:  # noqa: BLE001 - one picture that finds a fault of ours must not stop the others
            detail = f"{type(error).__name__}: {error}"
            return Report(reason="internal", error=detail, seconds=time.monotonic() - started)
        return Report(
            width=rendered.width,
            height=rendered.height,
            seconds=time.monotonic() - started,
            sha256=hashlib.sha256(rendered.data).hexdigest(),
            num_bytes=len(rendered.data),
        )

    def _code(self, look: Look) -> StyleCode:
        for index in look.styles:
            if index not in self._codes:
                self._codes[index] = self._stylizer.encode_style(ray.get(self._styles[index], timeout=300))
        codes = [self._codes[index] for index in look.styles]
        return self._stylizer.encode_style(codes, look.weights) if len(codes) > 1 else codes[0]
