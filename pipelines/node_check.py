"""What one node of the cluster can do for a training, looked at from there. Imports only what that takes."""

from __future__ import annotations

import importlib
import logging
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import ray

from infra import s3, storage
from nst.manifest import MANIFEST_NAME, REMEDY, CorpusError, Manifest, ShardInfo
from pipelines import lineage

log = logging.getLogger(__name__)

SECONDS_OF_PATIENCE = 5.0  # with an object store
MAX_NAMED = 3  # files of a corpus that are missing or cut
TAR_HEADER = 512  # bytes
CREDENTIALS_THERE = "the node's own AWS_… variables count, where Ray is started there, or its role"


@dataclass(frozen=True, kw_only=True)
class Marker:
    """An object that the driver has written below `uri`, for every node to find, and the nodes' answers."""

    uri: str
    token: str

    @property
    def of_driver(self) -> str:
        return storage.join(self.uri, f".nst-check-{self.token}")

    def of_node(self, node_id: str) -> str:
        return f"{self.of_driver}-{node_id}"


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What a node is to try and to compare itself with; holds no secret.

    Attributes:
        versions: the driver's, as `versions()` gives them.
        code_digest: the driver's; None where Ray itself has brought the node the driver's code.
        marker: where a training will write; None: nowhere.
        corpora: place -> digest of the manifest that the driver has read.
        tracking_uri: the MLflow server, without its password; None: none to ask.
        has_own_tracking_uri: whether the node must know the server by itself, because of the password.
        artifacts_on: id of the one node that also tries MLflow's artifacts: all at once are too much for a
            server.
        timeout_s: how long a single check may take.
    """

    versions: dict[str, str]
    code_digest: str | None
    marker: Marker | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None
    has_own_tracking_uri: bool = False
    artifacts_on: str | None = None
    timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """`problems`: what was tried (the place, say) -> a line with its remedy."""

    versions: dict[str, str]
    problems: dict[str, str]


def look_at_node(errand: Errand) -> NodeReport:
    """Runs on a node: tries there what a worker of a training would do."""
    here = versions()
    checks: dict[str, Callable[[], None]] = {"its code": lambda: check_versions(errand, here)}
    if marker := errand.marker:
        checks[marker.uri] = lambda: _on_a_node(marker.uri, lambda: answer_marker(marker))
    for uri, digest in errand.corpora.items():
        checks[uri] = lambda uri=uri, digest=digest: _on_a_node(uri, lambda: check_corpus(uri, digest))
    if errand.tracking_uri is not None:
        importlib.import_module("infra.tracking")  # takes seconds, which are not the server's
        checks[errand.tracking_uri] = lambda: check_tracking(errand)
    return NodeReport(versions=here, problems=problems_of(checks, errand.timeout_s))


def _on_a_node(uri: str, check: Callable[[], object]) -> None:
    """The remedy for a bucket is not where the driver runs."""
    try:
        check()
    except ValueError as error:
        raise ValueError(f"{error} ({CREDENTIALS_THERE})" if storage.is_remote(uri) else error) from error


def problems_of(checks: Mapping[str, Callable[[], object]], timeout_s: float) -> dict[str, str]:
    """Runs the checks at once, for `timeout_s` seconds at most; name -> a line for each that failed. Raises
    what is neither a ValueError nor an OSError: that is a fault of the program."""
    outcomes: dict[str, Exception | None] = {}

    def run(name: str, check: Callable[[], object]) -> None:
        try:
            with s3.patience(SECONDS_OF_PATIENCE):
                check()
            outcomes[name] = None
        except Exception as error:  # noqa: BLE001 - is told, or raised again, by the thread that waits
            outcomes[name] = error

    # not a pool: its threads would hold the process until a folder that hangs comes back
    threads = [threading.Thread(target=run, args=check, daemon=True) for check in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    problems = {}
    for name in checks:
        silence = TimeoutError(f"{name} gives no answer within {timeout_s:.0f} s; is its disk or server up?")
        if (error := outcomes.get(name, silence)) is not None:
            problems[name] = told(error)
    return problems


def told(error: Exception) -> str:
    """One line with a remedy; raises what is no finding."""
    if not isinstance(error, ValueError | OSError):
        raise error
    text = re.sub(r"/\.nst-[0-9a-z.-]+", "", one_line(error))  # the place, not what was tried there
    if isinstance(error, ValueError | CorpusError | TimeoutError):
        return text
    if storage.is_remote(str(error.filename or "")):
        return f"{text}; try again when the store answers, or correct AWS_ENDPOINT_URL"
    return f"{text}; let the user of this process read and write there, or choose another place"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def versions() -> dict[str, str]:
    """What has to be the same everywhere. The build of a package ("+cu128") is not part of it: a driver
    without GPUs may have another."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"Python": python}
    for name in ("ray", "torch"):
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def check_versions(errand: Errand, here: dict[str, str]) -> None:
    for name, version in errand.versions.items():
        if here[name] != version:
            raise ValueError(f"it has {name} {here[name]}, the driver {version}; install the same everywhere")
    if errand.code_digest not in (None, lineage.code_digest()):
        raise ValueError(
            f"its code is another than the driver's ({lineage.code_digest()[:12]}, not "
            f"{errand.code_digest[:12]}); install the same everywhere, or let `nst submit` bring it"
        )


def answer_marker(marker: Marker) -> None:
    """Finds the driver's marker below the place, tries to write there, and leaves an answer."""
    try:
        is_there = storage.read_bytes(marker.of_driver) == marker.token.encode()
    except (FileNotFoundError, NotADirectoryError):
        is_there = False
    if not is_there:
        raise ValueError(f"{marker.uri} is not visible, or another of that name; {_shared(marker.uri)}")
    storage.check_access(marker.uri)
    answer = marker.of_node(ray.get_runtime_context().get_node_id())
    storage.write_bytes(answer, marker.token.encode())
    if not storage.exists(marker.of_driver):  # the driver has given up on this node, and tidied up before
        storage.delete(answer)


def check_corpus(uri: str, digest: str) -> Manifest:
    """The corpus is the one that the driver has opened, and its first shard can be read."""
    manifest_uri = storage.join(uri, MANIFEST_NAME)
    try:
        manifest = Manifest.from_json(storage.read_bytes(manifest_uri), manifest_uri)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{manifest_uri} is not there (any more); {_shared(uri)}") from None
    if manifest.digest != digest:
        raise ValueError(
            f"{uri} is another corpus than the one that was opened ({manifest.digest[:12]}, not "
            f"{digest[:12]}); start again when nobody writes to it, with the same place on every node"
        )
    if manifest.shards:
        first = manifest.shards[0]
        check_files(uri, (first,))
        storage.read_part(storage.join(uri, first.tar), 0, TAR_HEADER)
    return manifest


def _shared(uri: str) -> str:
    """What makes a place the same for every node."""
    return "set the same AWS_ENDPOINT_URL" if storage.is_remote(uri) else "use a shared folder or s3://"


def check_files(uri: str, shards: tuple[ShardInfo, ...], *, timeout_s: float | None = None) -> None:
    """All tars and indexes of these shards are there, with the sizes of the manifest. What cannot be looked
    at within `timeout_s` seconds is left to the readers, who check everything, and said.

    Raises:
        ValueError: names the first that are missing or cut.
    """
    wanted = {shard.tar: shard.num_bytes for shard in shards}
    wanted |= {shard.index: shard.index_num_bytes for shard in shards}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    wrong, missing = [], dict(wanted)
    for num_seen, (key, num_bytes) in enumerate(_sizes(uri, list(wanted)), start=1):
        if num_bytes is not None and missing.pop(key, None) is not None and num_bytes != wanted[key]:
            wrong.append(f"{key} has {num_bytes:,} bytes instead of {wanted[key]:,}")
        if deadline is not None and time.monotonic() > deadline:
            log.warning("%s: only %d objects looked at within %.0f s", uri, num_seen, timeout_s)
            missing.clear()
            break
    wrong += [f"{key} is missing" for key in missing]
    if wrong:
        more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise ValueError(f"{uri}: {', '.join(wrong[:MAX_NAMED])}{more}; {REMEDY}")


def _sizes(uri: str, keys: list[str]) -> Iterator[tuple[str, int | None]]:
    """Sizes in bytes: one listing of a bucket (unless a few requests do), a look at each file of a folder."""
    if storage.is_remote(uri) and len(keys) > 2:
        yield from ((found.key, found.num_bytes) for found in storage.list_objects(uri, include_hidden=True))
        return
    for key in keys:
        found = storage.stat(storage.join(uri, key))
        yield key, found.num_bytes if found else None


def check_tracking(errand: Errand) -> None:
    """MLflow answers here; any node may run the worker that writes to it."""
    from infra import tracking, tracking_server

    if errand.has_own_tracking_uri:
        here = tracking_server.shown(tracking_server.tracking_uri())
        if here != errand.tracking_uri:
            raise ValueError(
                f"its MLFLOW_TRACKING_URI leads to {here}, not to {errand.tracking_uri}; set it where Ray is "
                "started there (one with a password is not passed on)"
            )
    uri = None if errand.has_own_tracking_uri else errand.tracking_uri
    tracking_server.check(uri)
    if errand.artifacts_on == ray.get_runtime_context().get_node_id():
        tracking_server.check_artifacts(tracking.DEFAULT_EXPERIMENT, uri)
