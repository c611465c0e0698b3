"""The nodes of the joined cluster: what fits on them, waiting for more of them, a call on each."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state  # which has no public name
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.cluster import cause_of

SECONDS_BETWEEN_NOTES = 30.0
TOLERANCE = 1e-4  # what Ray's own arithmetic with resources is exact to


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the workers of a training ask for: the fewest that can begin and the most that are wanted, and
    what each of them takes of one node."""

    num_workers: tuple[int, int]
    gpus_per_worker: float
    cpus_per_worker: float

    @property
    def bundle(self) -> dict[str, float]:
        """One worker's share, as Ray names it."""
        wanted = {"GPU": self.gpus_per_worker, "CPU": self.cpus_per_worker}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def num_that_fit(self, resources: Mapping[str, float]) -> int:
        """How many workers one node with these resources has room for."""
        shares = [(resources.get(name, 0.0) + TOLERANCE) / amount for name, amount in self.bundle.items()]
        return min((math.floor(share) for share in shares), default=self.num_workers[1])


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node. `address` tells it from the others; `total` and `free` are its resources (CPU, GPU), all
    of them and those that nobody uses now. Nothing new is placed on one that `is_draining`."""

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    is_draining: bool


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many workers can be placed: beside what runs `now`, and were nothing else there, on `num_nodes`
    nodes that take new work."""

    now: int
    ever: int
    num_nodes: int


def living_nodes() -> list[Node]:
    """Every node that is alive, the head too, in order of the addresses."""
    draining, free = state.get_draining_nodes(), state.available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    num_at = Counter(node["NodeManagerAddress"] for node in alive)
    nodes = []
    for node in alive:
        node_id, address = node["NodeID"], node["NodeManagerAddress"]
        if num_at[address] > 1:
            address = f"{address} ({node_id[:8]})"
        nodes.append(
            Node(
                node_id=node_id,
                address=address,
                total=node["Resources"],
                free=free.get(node_id, {}),
                is_draining=node_id in draining,
            )
        )
    return sorted(nodes, key=lambda node: node.address)


def nodes_for(demand: Demand) -> list[Node]:
    """Those that could run a worker, were nothing else on them."""
    return [node for node in living_nodes() if not node.is_draining and demand.num_that_fit(node.total) > 0]


def room_for(demand: Demand) -> Room:
    """A worker has its whole share from one node: resources that are scattered make no room."""
    nodes = [node for node in living_nodes() if not node.is_draining]
    return Room(
        now=sum(demand.num_that_fit(node.free) for node in nodes),
        ever=sum(demand.num_that_fit(node.total) for node in nodes),
        num_nodes=len(nodes),
    )


def wait_for_room(demand: Demand, timeout_s: float, *, tell: Callable[[float], None]) -> bool:
    """Waits until the fewest workers of `demand` can be placed; an autoscaler sees what is missing and starts
    nodes for it. Returns False if that does not come within `timeout_s` seconds.

    `tell` is called with the seconds waited, at first and now and then. The request ends with this call, or
    with this process. It is a placement group: Ray's `request_resources` holds one request for a whole
    cluster, which other trainings (Ray Train too) overwrite, and counts what others use as there.
    """
    group = placement_group([demand.bundle] * demand.num_workers[0], strategy="PACK")
    started = time.monotonic()
    next_note = started
    try:
        while not group.wait(1.0):
            now = time.monotonic()
            if now - started >= timeout_s:
                return False
            if now >= next_note:
                next_note = now + SECONDS_BETWEEN_NOTES
                tell(now - started)
        return True
    finally:
        remove_placement_group(group)


def call_on_nodes(
    nodes: Iterable[Node], function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0
) -> dict[str, Any | Exception]:
    """Calls `function(*arguments)` once on each of the nodes, busy or not: address -> result or what it
    raised; TimeoutError for one that gives no answer within `timeout_s` seconds from now."""
    remote_function = ray.remote(num_cpus=0, max_retries=0)(function)
    calls = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False)
        calls[node.address] = remote_function.options(scheduling_strategy=there).remote(*arguments)
    if not calls:
        return {}
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    silence = TimeoutError(f"it gives no answer within {timeout_s:.0f} s")
    return {address: _outcome(call) if call in done else silence for address, call in calls.items()}


def _outcome(call: Any) -> Any | Exception:
    try:
        return ray.get(call)
    except RayTaskError as error:
        return cause_of(error)
    except RayError as error:  # the node died, or cannot run our code
        return error
