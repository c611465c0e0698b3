"""Before a training: what would fail after the GPUs are paid for is found within half a minute."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from infra import cluster, cluster_nodes, s3, storage
from infra.cluster_nodes import Demand, Node, Room
from pipelines import lineage
from pipelines.console import say
from pipelines.node_check import (
    SECONDS_OF_PATIENCE,
    Errand,
    Marker,
    NodeReport,
    check_corpus,
    check_files,
    look_at_node,
    one_line,
    problems_of,
    told,
    versions,
)

if TYPE_CHECKING:
    from nst.corpus import Corpus

SECONDS_TO_OPEN = 10.0  # for a store that says nothing to who opens a corpus
SECONDS_FOR_ALL = 27.0  # for `check`, but for the waiting for nodes
SECONDS_HERE = 8.0  # of those, for what the driver looks at itself
SECONDS_FOR_FILES = 6.0  # of those, for the sizes of all files of a corpus
SECONDS_TO_SETTLE = 3.0  # until what an ended training had taken is free again
MAX_NAMED_NODES = 3


@contextlib.contextmanager
def promptly() -> Iterator[None]:
    """Within it (corpora are opened, say) a store that gives no answer is given up soon, whether a training
    begins or goes on: the store itself would have to say which, and `check` waits no longer either.

    Raises:
        ValueError: one line for what did not work, with its remedy.
    """
    try:
        with s3.patience(SECONDS_TO_OPEN):
            yield
    except OSError as error:
        raise ValueError(told(error)) from error


def check(
    training_uri: str,
    *,
    corpora: Mapping[str, Corpus],
    demand: Demand,
    wait_for_nodes_s: float = 0.0,
    with_tracking: bool = True,
) -> set[str]:
    """Looks whether a training can run on the joined cluster, cheap things first: the storage and all files
    of the corpora from here, then room for the fewest workers, then from every node that could run one the
    storage, the corpora and MLflow, and whether its code is this one. Takes less than 30 s, and
    `wait_for_nodes_s` at most.

    Args:
        training_uri: where the checkpoints will go.
        corpora: by role, as this process has opened them.
        demand: what the workers ask for.
        wait_for_nodes_s: how long to wait for room, in seconds; an autoscaler is asked for it meanwhile.
        with_tracking: whether MLflow has to answer from the nodes, and to keep artifacts.

    Returns:
        The ids of the nodes that were looked at, for `check_new_nodes`.

    Raises:
        ValueError: one line with all that was found, each with its remedy.
    """
    started = time.monotonic()
    is_local = cluster.info().is_local
    has_time = wait_for_nodes_s > 0 and not is_local  # no other node comes to this machine's own Ray
    problems = _look_here(training_uri, corpora)
    _refuse(problems if has_time else problems + _shortage(demand, is_local))
    seconds_left = SECONDS_FOR_ALL - (time.monotonic() - started)
    if has_time:
        _wait_for_room(demand, wait_for_nodes_s)
    digests = {corpus.uri: corpus.manifest.digest for corpus in corpora.values()}
    seen = check_new_nodes(
        set(), training_uri, digests, demand=demand, timeout_s=seconds_left, with_tracking=with_tracking
    )
    _refuse(_shortage(demand, is_local))  # one may have died meanwhile
    return seen


def check_new_nodes(
    seen: set[str],
    training_uri: str,
    digests: Mapping[str, str],
    *,
    demand: Demand,
    timeout_s: float = SECONDS_FOR_ALL,
    with_tracking: bool = True,
) -> set[str]:
    """Looks at the nodes that could run a worker and are not among `seen` (ids), as `check` does: those that
    an autoscaler brought or that stand in for dead ones. Where none is new that takes milliseconds.

    Args:
        training_uri: where the checkpoints go.
        digests: of the corpora's manifests, by their places.
        timeout_s: until all have to have answered.

    Returns:
        The ids of all that need not be looked at any more.

    Raises:
        ValueError: one line with all that was found, each with its remedy.
        OSError: the store does not answer this process.
    """
    if cluster.info().is_local:  # the workers have what this process has
        return seen
    nodes = [node for node in cluster_nodes.nodes_for(demand) if node.node_id not in seen]
    if nodes:
        reports = look_at_nodes(
            nodes, training_uri, digests, timeout_s=timeout_s, with_tracking=with_tracking
        )
        # one that has died since is no finding
        still_there = {node.address for node in cluster_nodes.nodes_for(demand)}
        _refuse(_grouped({address: report for address, report in reports.items() if address in still_there}))
    return seen | {node.node_id for node in nodes}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _look_here(training_uri: str, corpora: Mapping[str, Corpus]) -> list[str]:
    """What this process finds: the training's place can be written, read and tidied; the corpora are still
    those that it has opened, and all their files are there in full."""

    def look_at(corpus: Corpus) -> None:
        manifest = check_corpus(corpus.uri, corpus.manifest.digest)
        check_files(corpus.uri, manifest.shards, timeout_s=SECONDS_FOR_FILES)

    checks: dict[str, Callable[[], None]] = {training_uri: lambda: storage.check_access(training_uri)}
    for corpus in corpora.values():
        checks[corpus.uri] = lambda corpus=corpus: look_at(corpus)
    return list(problems_of(checks, SECONDS_HERE).values())


# Room for the workers


def _shortage(demand: Demand, is_local: bool) -> list[str]:
    """What is missing for the fewest workers; nothing if they can be placed now. What another training has
    just let go of may count as taken for a moment, and is waited for."""
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    num_wanted, room = demand.num_workers[0], cluster_nodes.room_for(demand)
    while room.now < num_wanted <= room.ever and time.monotonic() < deadline:
        time.sleep(0.2)
        room = cluster_nodes.room_for(demand)
    return [] if room.now >= num_wanted else [_missing(demand, room, is_local)]


def _missing(demand: Demand, room: Room, is_local: bool) -> str:
    num_wanted = demand.num_workers[0]
    share = " and ".join(f"{amount:g} {name}" for name, amount in demand.bundle.items())
    wanted = f"{num_wanted} workers need {share} each"
    remedies = [] if is_local else ["--wait-for-nodes SECONDS"]
    if room.ever >= num_wanted:
        fewer = [f"--num-workers {room.now}"] if room.now else []
        text = f"{wanted}; there is room for {room.ever}, but in use by other jobs: now for {room.now}"
        return f"{text}; try {_alternatives([*remedies, *fewer])}"
    remedies.append(f"--num-workers {room.ever}" if room.ever else "other --num-workers")
    remedies += ["--device cpu"] if demand.gpus_per_worker else []
    where = "this machine" if is_local else f"the cluster of {room.num_nodes} nodes"
    return f"{wanted}; {where} has room for {room.ever}; try {_alternatives(remedies)}"


def _alternatives(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), *options[-1:]])) or "again later"


def _wait_for_room(demand: Demand, timeout_s: float) -> None:
    """Raises ValueError if the fewest workers cannot be placed within `timeout_s` seconds."""

    def missing() -> str:
        return _missing(demand, cluster_nodes.room_for(demand), is_local=False)

    def tell(waited_s: float) -> None:
        say(f"waiting for nodes, {waited_s:.0f} of {timeout_s:.0f} s: {missing()}")

    if not cluster_nodes.wait_for_room(demand, timeout_s, tell=tell):
        raise ValueError(f"waited {timeout_s:.0f} s for nodes, in vain: {missing()}")


# The nodes


def look_at_nodes(
    nodes: list[Node],
    storage_uri: str | None,
    digests: Mapping[str, str],
    *,
    timeout_s: float = SECONDS_FOR_ALL,
    with_tracking: bool = True,
) -> dict[str, NodeReport | Exception]:
    """What each node finds, by its address; an exception where it gives no report.

    Args:
        storage_uri: a place that all nodes and this process are to share; None: none.
        digests: of corpora, by their places.
        timeout_s: until all have to have answered, the start of a worker there included.
        with_tracking: whether MLflow is asked, too; its artifacts are tried by the first of the nodes.
    """
    from infra import tracking_server

    tracking_uri = tracking_server.tracking_uri()
    is_asked = with_tracking and not tracking_uri.startswith("sqlite:")
    is_brought = bool(cluster.runtime_env_for_workers())  # Ray brings every node the code of this process
    with _marked(storage_uri, nodes) as marker:
        errand = Errand(
            versions=versions(),
            code_digest=None if is_brought else lineage.code_digest(),
            marker=marker,
            corpora=dict(digests),
            tracking_uri=tracking_server.shown(tracking_uri) if is_asked else None,
            has_own_tracking_uri=tracking_server.shown(tracking_uri) != tracking_uri,
            artifacts_on=nodes[0].node_id if nodes else None,
        )
        reports = cluster_nodes.call_on_nodes(nodes, look_at_node, errand, timeout_s=timeout_s)
        return _with_answers(reports, marker, nodes) if marker else reports


@contextlib.contextmanager
def _marked(uri: str | None, nodes: list[Node]) -> Iterator[Marker | None]:
    """A marker below `uri` for the nodes to find; in the end it goes, and their answers with it."""
    if uri is None:
        yield None
        return
    marker = Marker(uri=uri, token=secrets.token_hex(8))
    with s3.patience(SECONDS_OF_PATIENCE):
        storage.write_bytes(marker.of_driver, marker.token.encode())
    try:
        yield marker
    finally:
        places = [marker.of_driver, *(marker.of_node(node.node_id) for node in nodes)]
        with contextlib.suppress(OSError, ValueError):  # a few bytes may stay where the storage fails by now
            list(_at_once(storage.delete, places))


def _with_answers(
    reports: dict[str, NodeReport | Exception], marker: Marker, nodes: list[Node]
) -> dict[str, NodeReport | Exception]:
    """The reports, with a problem more where a node's answer to the marker does not arrive here."""
    answers = _at_once(storage.exists, [marker.of_node(node.node_id) for node in nodes])
    for node, has_arrived in zip(nodes, answers, strict=True):
        report = reports[node.address]
        if isinstance(report, NodeReport) and marker.uri not in report.problems and not has_arrived:
            problem = f"what it writes below {marker.uri} is not seen here; use a shared folder or s3://"
            reports[node.address] = replace(report, problems=report.problems | {marker.uri: problem})
    return reports


def _at_once(function: Callable[[str], Any], uris: list[str]) -> Iterator[Any]:
    def impatiently(uri: str) -> Any:
        with s3.patience(SECONDS_OF_PATIENCE):
            return function(uri)

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(impatiently, uris)


def problems_on(report: NodeReport | Exception) -> list[str]:
    """A line for each problem of a node, its silence included. Raises a fault of the program."""
    if isinstance(report, NodeReport):
        return list(report.problems.values())
    if not isinstance(report, OSError | ImportError | RuntimeError | RayError):
        raise report
    return [f"{one_line(report)}; is it up, with the same packages and network as the others?"]


def _grouped(reports: Mapping[str, NodeReport | Exception]) -> list[str]:
    """A line for each problem, with the nodes that have it."""
    addresses: dict[str, list[str]] = {}
    for address, report in reports.items():
        for problem in problems_on(report):
            addresses.setdefault(problem, []).append(address)
    lines = []
    for problem, found in addresses.items():
        more = f" and {len(found) - MAX_NAMED_NODES} more" if len(found) > MAX_NAMED_NODES else ""
        lines.append(f"node{'s' * (len(found) > 1)} {', '.join(found[:MAX_NAMED_NODES])}{more}: {problem}")
    return lines
