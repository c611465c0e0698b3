"""What all tests share: settings that no test may take from the machine, and the real servers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# before anything imports Ray or MLflow
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
    os.environ.pop(variable, None)
# A shell has what it runs in the background ignore Ctrl-C, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

from tests.servers import S3Server, s3_server  # noqa: E402


@pytest.fixture(scope="session")
def store() -> Iterator[S3Server]:
    """A real S3 server, one for the whole run; a test makes its own bucket."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process set up as its client."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A local Ray that the module's stages share; ended behind the module."""
    from infra import cluster

    cluster.connect(min_cpus=2)
    yield
    cluster.disconnect()
