"""Runs beside Ray on a machine that the cloud may take away, and says so to Ray in time.

    python -m infra.spot_agent --address $RAY_HEAD_IP:6379

Asks the cloud's metadata service every few seconds whether the machine is to go. Once it is, the machine's
nodes are drained in Ray for that reason: Ray gives them no new work, and a training that looks for it makes
a checkpoint before the end. Ray itself does not ask the clouds.
"""

# Ray's protobuf modules are generated, and come without stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

import click
import grpc
import requests
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader
from ray.core.generated import autoscaler_pb2, autoscaler_pb2_grpc, gcs_pb2, gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub, NodeResourceInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from infra import cluster

log = logging.getLogger("nst.spot_agent")

METADATA_URL = "http://169.254.169.254"  # of AWS and of GCP
SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 1.0, 2.0
SECONDS_FOR_RAY = 5.0
SECONDS_BETWEEN_TRIES = 1.0
SECONDS_BETWEEN_COMPLAINTS = 600.0
SECONDS_OF_A_TOKEN = 21600  # the longest that AWS gives
SECONDS_OF_AWS_NOTICE, SECONDS_OF_GCP_NOTICE = 120.0, 30.0
# Ray is told of an end a little before that, as the cloud is heard of a poll late; and of one in the future.
MARGIN_S, LEAST_SECONDS_TO_DRAIN = 5.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The machine is to go: `why` in words, at `ends_at` (Unix time in seconds) or soon after it."""

    why: str
    ends_at: float


class Cloud(Protocol):
    """Raises requests.RequestException where its metadata service gives no usable answer."""

    name: str

    def notice(self) -> Notice | None: ...


class _Metadata:
    """Requests to the machine's own metadata service: bounded, through no proxy, following no redirect."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False

    def ask(self, method: str, path: str, **headers: str) -> requests.Response:
        return self._session.request(
            method,
            f"{self._url}/{path}",
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            timeout=(SECONDS_TO_CONNECT, SECONDS_TO_ANSWER),
            allow_redirects=False,
        )


class Aws:
    """EC2: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html

    Args:
        heed_rebalance: take the recommendation to rebalance for a notice. It comes earlier than that, or in
            vain: the machine may well stay.
    """

    name = "aws"

    def __init__(self, url: str = METADATA_URL, *, heed_rebalance: bool = False) -> None:
        self._metadata = _Metadata(url)
        self._heed_rebalance = heed_rebalance
        self._token: str | None = None

    def notice(self) -> Notice | None:
        if action := self._read("spot/instance-action"):
            ends_at = datetime.fromisoformat(action["time"]).timestamp()
            return Notice(why=f"AWS: spot {action['action']} at {action['time']}", ends_at=ends_at)
        if self._heed_rebalance and (advice := self._read("events/recommendations/rebalance")):
            why = f"AWS: rebalance recommended at {advice['noticeTime']}"
            return Notice(why=why, ends_at=time.time() + SECONDS_OF_AWS_NOTICE)
        return None

    def _read(self, path: str) -> dict[str, str] | None:
        if self._token is None:
            answer = self._metadata.ask(
                "PUT", "latest/api/token", X_aws_ec2_metadata_token_ttl_seconds=str(SECONDS_OF_A_TOKEN)
            )
            answer.raise_for_status()
            self._token = answer.text
        answer = self._metadata.ask("GET", f"latest/meta-data/{path}", X_aws_ec2_metadata_token=self._token)
        if answer.status_code == requests.codes.not_found:
            return None
        if answer.status_code == requests.codes.unauthorized:
            self._token = None  # it has run out: the next poll gets another
        answer.raise_for_status()
        return answer.json()


class Gcp:
    """Compute Engine: https://cloud.google.com/compute/docs/instances/create-use-preemptible

    It tells no time; the machine has half a minute from the notice on.
    """

    name = "gcp"

    def __init__(self, url: str = METADATA_URL) -> None:
        self._metadata = _Metadata(url)

    def notice(self) -> Notice | None:
        answer = self._metadata.ask("GET", "computeMetadata/v1/instance/preempted", Metadata_Flavor="Google")
        answer.raise_for_status()
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise requests.RequestException("what answers there is not GCP's metadata service")
        if answer.text.strip() != "TRUE":
            return None
        return Notice(why="GCP: preempted", ends_at=time.time() + SECONDS_OF_GCP_NOTICE)


def wait_for_notice(clouds: Sequence[Cloud], *, poll_seconds: float) -> Notice:
    """Asks `clouds` in turn until one tells that the machine is to go; the first that answers is the one that
    is asked from then on. A service that is away is asked again, for as long as it takes."""
    last_complaint = -SECONDS_BETWEEN_COMPLAINTS
    while True:
        errors = []
        for candidate in clouds:
            try:
                notice = candidate.notice()
            except (requests.RequestException, KeyError, TypeError, ValueError) as error:
                errors.append(f"{candidate.name}: {error}")
                continue
            if len(clouds) > 1:
                log.info("this machine is on %s", candidate.name)
                clouds = [candidate]
            if notice is not None:
                return notice
            break
        else:
            if time.monotonic() - last_complaint >= SECONDS_BETWEEN_COMPLAINTS:
                last_complaint = time.monotonic()
                log.warning("no metadata service answers; asking on (%s)", "; ".join(errors))
        time.sleep(poll_seconds)


def drain(address: str, node_ip_address: str, notice: Notice) -> bool:
    """Tells Ray that every node at `node_ip_address` goes, and tries again until the notice's end while Ray's
    head does not answer. A node that is draining already, and by then, is left alone. Returns whether Ray
    took it."""
    ends_at = max(notice.ends_at - MARGIN_S, time.time() + LEAST_SECONDS_TO_DRAIN)
    while True:
        try:
            if _drain_once(address, node_ip_address, why=notice.why, ends_at=ends_at):
                return True
            trouble = f"Ray knows no living node at {node_ip_address}"
        except (grpc.RpcError, RuntimeError) as error:
            reason = error.details() if isinstance(error, grpc.Call) else error
            trouble = f"Ray's head at {address} does not take it ({reason})"
        if time.time() > ends_at:
            log.error("not drained: %s", trouble)
            return False
        log.warning("trying again: %s", trouble)
        time.sleep(SECONDS_BETWEEN_TRIES)


def _drain_once(address: str, node_ip_address: str, *, why: str, ends_at: float) -> bool:
    """Returns whether there is a node to drain, or one that drains already. Raises grpc.RpcError if the head
    gives no answer, RuntimeError if it refuses.

    Speaks to the head as `ray drain-node` does, but over a channel of its own: Ray's client would end the
    process if the head stays away.
    """
    connection: Any = init_grpc_channel(address)  # with Ray's token, and its TLS where that is set up
    with connection as channel:
        here = gcs_service_pb2.GetAllNodeInfoRequest.NodeSelector(node_ip_address=node_ip_address)
        living = gcs_service_pb2.GetAllNodeInfoRequest(
            node_selectors=[here], state_filter=gcs_pb2.GcsNodeInfo.ALIVE
        )
        nodes = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(living, timeout=SECONDS_FOR_RAY).node_info_list
        draining = NodeResourceInfoGcsServiceStub(channel).GetDrainingNodes(
            gcs_service_pb2.GetDrainingNodesRequest(), timeout=SECONDS_FOR_RAY
        )
        deadlines_ms = {node.node_id: node.draining_deadline_timestamp_ms for node in draining.draining_nodes}
        end_ms = int(1000 * ends_at)
        for node in nodes:
            # 0: it drains, but is in no hurry (an autoscaler found it idle)
            if 0 < deadlines_ms.get(node.node_id, 0) <= end_ms:
                log.info("node %s is draining already", node.node_id.hex())
                continue
            request = autoscaler_pb2.DrainNodeRequest(
                node_id=node.node_id,
                reason=autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
                reason_message=why,
                deadline_timestamp_ms=end_ms,
            )
            service = autoscaler_pb2_grpc.AutoscalerStateServiceStub(channel)
            reply = service.DrainNode(request, timeout=SECONDS_FOR_RAY)
            if not reply.is_accepted:
                raise RuntimeError(reply.rejection_reason_message)
            log.info("node %s drains, for %.0f s", node.node_id.hex(), ends_at - time.time())
    return bool(nodes)


def _stop(number: int, _: object) -> NoReturn:
    log.info("stopped by %s", signal.Signals(number).name)
    sys.exit(0)


@click.command()
@click.option("--address", envvar="RAY_ADDRESS", required=True, help="Ray's head: HOST:PORT.")
@click.option("--node-ip-address", help="The address of this machine's Ray node [default: found as Ray does]")
@click.option("--provider", type=click.Choice(["auto", "aws", "gcp"]), default="auto", show_default=True)
@click.option("--poll-seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True)
@click.option("--heed-rebalance", is_flag=True, help="AWS: drain at a rebalance recommendation already.")
@click.option("--aws-url", envvar="AWS_EC2_METADATA_SERVICE_ENDPOINT", default=METADATA_URL, hidden=True)
@click.option("--gcp-host", envvar="GCE_METADATA_HOST", default="169.254.169.254", hidden=True)
def main(
    address: str,
    node_ip_address: str | None,
    provider: str,
    poll_seconds: float,
    heed_rebalance: bool,
    aws_url: str,
    gcp_host: str,
) -> None:
    """Drain this machine's Ray node when the cloud is about to take the machine.

    Ends with 0 when the node drains, or when it is stopped; 1 if Ray could not be told in time; 2 for a
    mistake on the command line.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    host, separator, port = address.rpartition(":")
    if not (host and separator and port.isdecimal()):
        raise click.UsageError(f"--address is {address!r}, but Ray's head is needed as HOST:PORT")
    cluster.use_token_if_there_is_one()
    try:
        AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError as error:
        raise click.UsageError("RAY_AUTH_MODE is token, but there is none; set RAY_AUTH_TOKEN") from error
    clouds = {"aws": Aws(aws_url, heed_rebalance=heed_rebalance), "gcp": Gcp(f"http://{gcp_host}")}
    here = node_ip_address or services.get_node_ip_address(address)
    log.info("watching over the Ray node at %s", here)
    asked = list(clouds.values()) if provider == "auto" else [clouds[provider]]
    notice = wait_for_notice(asked, poll_seconds=poll_seconds)
    log.warning("%s; %.0f s are left", notice.why, notice.ends_at - time.time())
    if not drain(address, here, notice):
        sys.exit(1)


if __name__ == "__main__":
    main()
