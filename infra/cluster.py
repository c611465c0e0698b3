"""The Ray cluster: joins the one that RAY_ADDRESS names, or starts a private one on this machine."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._raylet import (  # compiled, without stubs
    AuthenticationTokenLoader,  # pyright: ignore[reportAttributeAccessIssue]
    Config,  # pyright: ignore[reportAttributeAccessIssue]
)
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from infra import scratch

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parent.parent
OUR_PACKAGES = ("nst", "infra", "pipelines")
SECONDS_TO_CONNECT = 5.0
SECONDS_TO_GREET = 10.0
# Of a Ray on this machine alone. Ray would take the address at which others reach the machine, and be cut off
# from itself when that goes, as a laptop's does between two networks. (127.0.0.1 it would replace.)
LOOPBACK_ADDRESS = "127.0.0.254"
NUM_HANDSHAKES = 2  # Ray's own tries; by itself it takes 20, and says so each time
SECONDS_BETWEEN_NOTES = 60.0
SECONDS_WITHOUT_CPU = 900.0  # an autoscaler needs minutes for a machine; longer means that none will come


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """What can be scheduled now. An autoscaled cluster may have no CPU yet."""

    num_cpus: int
    num_gpus: int
    num_nodes: int
    is_local: bool


@dataclass
class _Local:
    """The instance that this process started; its logs, sockets and spilled objects are in `folder`, until
    `cleanup` is closed."""

    folder: str | None = None
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_local = _Local()


def connect(*, min_cpus: int = 1) -> ClusterInfo:
    """Joins the cluster of RAY_ADDRESS (inside a Ray job that is the job's), else starts one on this machine
    with no dashboard and at least `min_cpus` CPU slots. Again: the same cluster, but a local one with fewer
    slots is replaced by a larger one.

    Ray's token authentication is on for a local instance; its token is made in memory and written nowhere.
    Raises ValueError if nothing answers at RAY_ADDRESS within 30 s.
    """
    if ray.is_initialized() and _local.folder and info().num_cpus < min_cpus:
        disconnect()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray warns in every process unless this is said; tasks that ask for no GPU must not lose sight of it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options = {"log_to_driver": False, "logging_level": logging.WARNING}
        with _own_sigterm_handler():
            if address := remote_address():
                _join(address, options)
            else:
                _start(max(num_usable_cpus(), min_cpus), options)
    return info()


def info() -> ClusterInfo:
    """The joined cluster as it is now."""
    resources = ray.cluster_resources()
    return ClusterInfo(
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        is_local=_local.folder is not None,
    )


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Ray puts one in its place that ends the program; a program that has its own keeps it."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    if callable(former) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, former)


def disconnect() -> None:
    """Leaves the cluster; ends a local one and removes its files."""
    ray.shutdown()
    _local.folder = None
    _local.cleanup.close()


def remote_address() -> str | None:
    """RAY_ADDRESS if it names a cluster to join. Raises ValueError for one that cannot be joined."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS is {address}, where jobs are submitted: use `nst submit -- VERB …`, or unset it"
        )
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS is {address}: Ray Client is not supported, because the stage's files would be on "
            "another machine than its workers; use `nst submit --address http://HEAD:8265 -- VERB …`"
        )
    return None if address in {"", "local"} else address


def runtime_env_for_workers() -> dict[str, Any]:
    """What workers of a joined cluster need in order to import our packages; a job brought them already."""
    if not remote_address() or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    return {"py_modules": [str(REPOSITORY / package) for package in OUR_PACKAGES]}


def use_token_if_there_is_one() -> None:
    """For a cluster that somebody else started: RAY_AUTH_MODE, unless it is set, follows from whether we have
    a token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)."""
    has_token = _has_token_in_environment() or (Path.home() / ".ray" / "auth_token").exists()
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
    _take_up_auth_mode()


def num_usable_cpus() -> int:
    """CPUs that this process may use: its affinity, within a container's quota (cgroup v2)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, math.ceil(int(quota) / int(period)))
    return max(usable, 1)


def num_earlier_attempts() -> int:
    """How often Ray has tried the task that this runs in before. (Ray has no public name for it.)"""
    return ray._private.worker.global_worker.core_worker.get_current_task_attempt_number()  # pyright: ignore


class CallFailed(Exception):
    """A call of `run_bounded` failed for good: `name` tells which, `cause` why."""

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name
        self.cause = cause


def run_bounded(
    remote_function: Any,
    arguments: Iterable[tuple[Any, ...]],
    *,
    max_in_flight: int,
    name_of: Callable[..., str] | None = None,
) -> Iterator[Any]:
    """Calls `remote_function.remote(*tuple)` for every tuple and yields the results as they complete.

    `arguments` is consumed lazily: at most `max_in_flight` calls are pending. Ray repeats a call whose worker
    or node died. After an error that outlives that, or one that the function raised, no further call is made;
    those under way run to their end and their results are yielded before the error is raised, so that nothing
    that was done is lost. (And `ray.cancel` of a task that finishes at that moment aborts the driver in Ray
    2.60.)

    Args:
        name_of: gets a call's arguments; then errors are raised as CallFailed, but for a user's mistakes.
    """
    assert max_in_flight >= 1
    remaining = iter(arguments)
    pending: dict[Any, str] = {}
    failed: tuple[str, Exception] | None = None
    while True:
        while failed is None and len(pending) < max_in_flight and (call := next(remaining, None)) is not None:
            pending[remote_function.remote(*call)] = name_of(*call) if name_of else ""
        if not pending:
            break
        done = _wait_for_one(list(pending))
        name = pending.pop(done)
        try:
            result = ray.get(done)
        except RayError as error:
            failed = failed or (name, cause_of(error) if isinstance(error, RayTaskError) else error)
            continue
        yield result
    if failed is not None:
        name, cause = failed
        raise CallFailed(name, cause) if name_of and not isinstance(cause, ValueError) else cause


def _wait_for_one(pending: list[Any]) -> Any:
    started = time.monotonic()
    while True:
        done, _ = ray.wait(pending, num_returns=1, timeout=SECONDS_BETWEEN_NOTES)
        if done:
            return done[0]
        waited = time.monotonic() - started
        if info().num_cpus == 0:
            log.warning("the cluster has no CPU yet; waiting for one since %.0f s", waited)
            if waited > SECONDS_WITHOUT_CPU:
                raise TimeoutError(
                    f"the cluster had no CPU for {waited / 60:.0f} minutes; are its workers allowed to start?"
                )


def cause_of(error: RayTaskError) -> Exception:
    """What the function raised."""
    cause = error.cause
    if isinstance(cause, ValueError) and not was_raised_by_us(str(error)):
        return RuntimeError(f"in a worker: {error}")
    return cause if isinstance(cause, Exception) else error


def was_raised_by_us(traceback: str) -> bool:
    """Whether its last frame is a `raise` of our own. Only then is a ValueError the user's mistake."""
    frames = re.findall(r'^\s*File "([^"]+)", line \d+.*\n\s*(\S.*)$', traceback, flags=re.MULTILINE)
    path, line = frames[-1] if frames else ("", "")
    return _is_ours(path) and line.startswith("raise ")


def _is_ours(path: str) -> bool:
    """Whether a file on any node is of one of our packages: brought there, or installed (an image has them in
    site-packages, where other packages have folders of those names, too)."""
    names = "|".join(OUR_PACKAGES)
    *installed, below = re.split(r"/(?:site|dist)-packages/", path)
    return re.search(rf"^(?:{names})/" if installed else rf"/(?:{names})/", below) is not None


def _start(num_cpus: int, options: dict[str, Any]) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not _has_token_in_environment():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _take_up_auth_mode()
    # A short path: those of the sockets below it may have 107 characters. Its own: other users have theirs.
    folder = scratch.folder("nst-ray-", parent=os.environ.get("RAY_TMPDIR", "/tmp"))
    _local.folder = _local.cleanup.enter_context(folder)
    atexit.register(disconnect)
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with environment(PYTHONPATH=search_path):  # Ray's processes inherit it, and so do the workers
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            _temp_dir=_local.folder,
            # only Linux has all of 127.0.0.0/8; elsewhere Ray stays on loopback by itself
            _node_ip_address=LOOPBACK_ADDRESS if sys.platform.startswith("linux") else None,
            **options,
        )


def _join(address: str, options: dict[str, Any]) -> None:
    use_token_if_there_is_one()
    _check_reachable(address)
    try:
        with environment(RAY_gcs_server_port_wait_time_s=str(NUM_HANDSHAKES)):
            ray.init(address=address, runtime_env=runtime_env_for_workers() or None, **options)
    except (OSError, RuntimeError, AuthenticationError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"RAY_ADDRESS is {address}, but that cluster cannot be joined ({first_line}). Is it a head of "
            f"Ray {ray.__version__}, is RAY_AUTH_TOKEN its token, and is this machine one of its nodes? "
            "From elsewhere use `nst submit --address http://HEAD:8265 -- VERB …`"
        ) from error


def _check_reachable(address: str) -> None:
    host, separator, port = address.rpartition(":")
    if not separator:
        return  # "auto": Ray looks for a cluster of this machine
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            # Something listens. If it is no Ray head, Ray itself would find out after 41 s a try.
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(timeout=SECONDS_TO_GREET)
    except (OSError, ValueError, grpc.FutureTimeoutError) as error:
        what = "what answers there is no Ray head" if isinstance(error, grpc.FutureTimeoutError) else error
        raise ValueError(
            f"RAY_ADDRESS is {address}, but nothing usable answers there ({what}); start the cluster, "
            "correct the address, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _has_token_in_environment() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))


def _take_up_auth_mode() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported, and keeps the token of the first cluster; whoever did
    either did so before now."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables of this process for a while."""
    previous = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for variable, value in previous.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
