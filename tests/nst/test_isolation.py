"""An image that kills the process which decodes it is one failure, and the work goes on."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from nst.images import ImageError
from nst.isolation import apart


def half_of(number: int) -> tuple[int, int]:
    """Dies of 13, refuses odd numbers."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number % 2:
        raise ImageError("corrupt", f"{number} is odd")
    return number // 2, os.getpid()


def test_a_crash_is_one_failure() -> None:
    children = set(psutil.Process().children())
    with apart(half_of) as half:
        first, process = half(4)
        assert (first, half(number=6)) == (2, (3, process))
        assert process != os.getpid()
        with pytest.raises(ImageError, match="odd"):
            half(5)
        assert half(8) == (4, process)
        with pytest.raises(ImageError) as caught:
            half(13)
        assert caught.value.reason == "crash"
        assert half(10)[0] == 5
    assert {child for child in psutil.Process().children() if "spawn_main" in child.cmdline()} <= children
