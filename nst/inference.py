"""Runs a generator: in a precision, compiled if that is wanted, and telling memory that ran out from other
errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator, pad_to_multiple

log = logging.getLogger(__name__)

MAX_COMPILED_SIZES = 8  # of pictures, each of which takes the compiler up to a minute; others run uncompiled


class Inference:
    """A generator's two calls without gradients, from and to the CPU.

    Args:
        generator: in eval mode.
        dtype: torch.bfloat16 computes convolutions in it; None and torch.float32 do not.
        compile: by torch.compile, once for each of the first 8 sizes that come more than once. Where it
            cannot, a warning says so and the generator runs as it is.
    """

    def __init__(self, generator: StyleGenerator, dtype: torch.dtype | None, compile: bool) -> None:
        self.generator = generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(generator.parameters()).device
        self.dtype = dtype
        self._compiled = torch.compile(self.generator, dynamic=False) if compile else None
        self._seen: set[torch.Size] = set()
        self._compiled_sizes: set[torch.Size] = set()

    def encode_style(self, style: Tensor) -> StyleCode:
        """float [M, 3, h, w] in [-1, 1] -> the codes of M styles, on the generator's device."""
        with self._settings():
            return self.generator.encode_style(style.to(self.device))

    def draw(self, batch: Tensor, code: StyleCode, *, may_compile: bool = True) -> Tensor:
        """float [N, 3, H, W] -> float [N, 3, H, W] on the CPU, within [-1, 1]; code of 1 or N styles.

        `may_compile`: not where the norms replay statistics, which a compiled network would not see change.
        """
        with self._settings():
            batch = batch.to(self.device, memory_format=torch.channels_last)
            padded, (height, width) = pad_to_multiple(batch, self.generator.stride)
            forward = self._try_compiled if may_compile else self.generator
            drawn = forward(padded, code.to(self.device))[:, :, :height, :width]
        # out here: what inference mode makes cannot be written into, nor used in a user's training
        return drawn.float().clamp(-1, 1).cpu()

    def _try_compiled(self, batch: Tensor, code: StyleCode) -> Tensor:
        if self._compiled is not None and self._is_worth_compiling(batch.shape):
            try:
                return self._compiled(batch, code)
            except Exception as error:  # whatever the compiler meets, the generator runs without it
                if is_out_of_memory(error):
                    raise
                log.warning("torch.compile cannot be used here, going on without it: %s", first_line(error))
                self._compiled = None
        return self.generator(batch, code)

    def _is_worth_compiling(self, size: torch.Size) -> bool:
        if len(self._compiled_sizes) < MAX_COMPILED_SIZES:
            if size in self._seen:
                self._compiled_sizes.add(size)
            self._seen.add(size)
        return size in self._compiled_sizes

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        is_reduced = self.dtype == torch.bfloat16
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=self.dtype, enabled=is_reduced):
            yield


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's and Python's own errors say it by their type, PyTorch's allocator on a CPU only in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
