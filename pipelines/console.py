"""What a person sees of a stage: the verb and its options, progress, the result, the exit code."""

from __future__ import annotations

import dis
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from tqdm import tqdm

from infra.printable import printable

PACKAGES = tuple(f"{Path(__file__).parent.parent / name}{os.sep}" for name in ("nst", "infra", "pipelines"))

JSON_WANTED = "nst_json"

EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
EXIT_GATE_REFUSED = 3
EXIT_INTERRUPTED = 130


class StageFailed(Exception):
    """The stage did its work and the work failed (or too much of it did).

    `message` is one line for a person; `result` is what `--json` prints all the same.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class GateRefused(StageFailed):
    """A promotion gate said no."""

    exit_code = EXIT_GATE_REFUSED


class Stage(click.Command):
    """A verb of `nst`: a function that returns its result as a dict which JSON can hold.

    Adds `--json`, and turns what goes wrong into the exit codes that users rely on: 1 failed, 2 the
    user's mistake, 3 a gate refused. Examples belong in the docstring, behind a line with `\\b`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--json", JSON_WANTED],
                is_flag=True,
                expose_value=False,  # the function knows nothing of it
                callback=lambda ctx, _, value: ctx.meta.__setitem__(JSON_WANTED, value),
                help="Print the result as one JSON object on the last line.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interruptible():
                result, exit_code = super().invoke(ctx) or {}, 0
        except StageFailed as error:
            result, exit_code = {**error.result, "error": str(error)}, error.exit_code
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            result, exit_code = {"error": "interrupted; the same command goes on from here"}, EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the edge of the program: everything gets an exit code
            exit_code = _exit_code_of(error)
            if exit_code == EXIT_FAILED or os.environ.get("NST_DEBUG"):
                _print_traceback(error)
            result = {
                "error": f"{error}" if exit_code == EXIT_USER_MISTAKE else f"{type(error).__name__}: {error}"
            }
        if "error" in result:
            click.echo(f"nst {self.name}: {printable(result['error'])}", err=True)
        if ctx.meta.get(JSON_WANTED):
            click.echo(json.dumps({**result, "exit_code": exit_code}, default=str))
            sys.stdout = (
                sys.stderr
            )  # Ray tells of workers that died whenever it likes; this was the last line
        ctx.exit(exit_code)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM (a job that is stopped, a node that drains) end as KeyboardInterrupt here, also
    where a library makes something else of them: DuckDB an error of its own, Ray Train the program's end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Exception, SystemExit) as error:
        if received or isinstance(error, SystemExit):
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _exit_code_of(error: Exception) -> int:
    """Our own code raises ValueError for a user's mistake and for nothing else; one that comes out of a
    library is a fault of ours and must look like one."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return EXIT_FAILED
    origin: TracebackType = error.__traceback__
    while origin.tb_next is not None:
        origin = origin.tb_next
    code = origin.tb_frame.f_code
    # a library written in C leaves no frame of its own: then ours is the last, but at a call, not a `raise`
    is_raised_here = code.co_code[origin.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return EXIT_USER_MISTAKE if is_raised_here and code.co_filename.startswith(PACKAGES) else EXIT_FAILED


def _print_traceback(error: Exception) -> None:
    if isinstance(error, OSError) and not os.environ.get("NST_DEBUG"):
        return  # the message names the file and the cause; the stack adds nothing
    traceback.print_exception(error)


def say(text: str = "") -> None:
    """One line for a person, above a progress bar where there is one. Where nobody reads any more (`| head`)
    the work goes on."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer too


class Progress:
    """A bar with rate and time left on a terminal; a line now and then where there is none.

        with Progress("shard", total=1000, unit="img") as progress:
            progress.advance(32, failed=1)

    `total` may be None when it is not known. Goes to standard error, so that results can be piped.
    """

    seconds_between_lines = 10.0

    def __init__(self, title: str, *, total: int | None, unit: str = "img", initial: int = 0) -> None:
        self.num_failed = 0
        self._title, self._total, self._unit = title, total, unit
        self._done = self._initial = initial
        self._started = self._last_line = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(desc=title, total=total, initial=initial, unit=f" {unit}", dynamic_ncols=True)
            if is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def advance(self, num: int = 1, *, failed: int = 0, **figures: str | float) -> None:
        """Counts `num` items done, `failed` of them without success; `figures` stand behind the bar."""
        self._done += num
        self.num_failed += failed
        if self.num_failed:
            figures = {"failed": self.num_failed, **figures}
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(num)
        elif time.monotonic() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.monotonic()
            print(self._line(figures), file=sys.stderr, flush=True)

    def _line(self, figures: dict[str, str | float]) -> str:
        rate = (self._done - self._initial) / max(time.monotonic() - self._started, 1e-6)
        parts = [f"{self._title}: {self._done}{f'/{self._total}' if self._total else ''} {self._unit}"]
        parts.append(f"{rate:.1f}/s")
        if self._total and rate > 0:
            parts.append(f"{tqdm.format_interval((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in figures.items())])

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
