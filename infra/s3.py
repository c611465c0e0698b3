"""Requests to an object store: one client a process, patience with a store in trouble, its errors as ours.
The one importer of boto3."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, BinaryIO

import boto3.exceptions
import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra import s3_errors

log = logging.getLogger(__name__)

# botocore repeats a request within seconds; a store that restarts, or throttles for long, needs more.
SECONDS_OF_PATIENCE = 60.0
PATIENCE_VARIABLE = "NST_STORE_PATIENCE_S"
LONGEST_PAUSE = 15.0
MARK = "nst-put"  # in the metadata of what was put on a condition: whose it is
S3_ERRORS = (ClientError, BotoCoreError, boto3.exceptions.Boto3Error)
DEFAULT_REGION = "us-east-1"  # what S3 itself takes where nothing is said
CREDENTIAL_VARIABLES = (
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)
_answered: set[str | None] = set()  # the stores that have answered this process
_patience: ContextVar[float | None] = ContextVar("patience", default=None)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within it, in this thread, a store in trouble or silent is given up after about `seconds`."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def expect_answers() -> None:
    """The store is known to be there, though not to this process yet: it is waited for like one that has
    answered."""
    _answered.add(endpoint_url())


def endpoint_url() -> str | None:
    """The store's address if it is not AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _region() -> str | None:
    """AWS_REGION, which boto3 itself does not read, then AWS_DEFAULT_REGION (None: the profile says)."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def client() -> Any:
    """This process's client: one that was inherited by a fork would share its sockets."""
    chain = hash(tuple(os.environ.get(variable) for variable in CREDENTIAL_VARIABLES))  # not the secrets
    return _client_of(os.getpid(), endpoint_url(), _region(), chain, _patience.get())


@functools.lru_cache(maxsize=4)
def _client_of(
    process_id: int, endpoint: str | None, region: str | None, chain: int, patience_s: float | None
) -> Any:
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        raise ValueError(f"AWS_ENDPOINT_URL is {endpoint!r}; it looks like http://host:port")
    session = boto3.session.Session()
    style = {"addressing_style": "path"} if endpoint else {}  # other stores rarely have a host a bucket
    config = Config(
        retries={"mode": "standard", "max_attempts": 1 if patience_s else 2},
        connect_timeout=min(10, patience_s or 10),
        read_timeout=min(60, patience_s or 60),
        max_pool_connections=32,
        s3=style,
    )
    region = region or session.region_name or DEFAULT_REGION
    return session.client("s3", region_name=region, endpoint_url=endpoint, config=config)


def patiently(request: Callable[[], Any]) -> Any:
    """Repeats a request that meets an overloaded, restarting or cut-off store, until a minute (or what
    NST_STORE_PATIENCE_S says, or `patience`) is over. A store that never answered this process is not waited
    for: its address is probably wrong."""
    store, started, pause = endpoint_url(), time.monotonic(), 1.0
    seconds = _patience.get() or _usual_patience()
    while True:
        try:
            answer = request()
            _answered.add(store)
            return answer
        except S3_ERRORS as error:
            if s3_errors.is_an_answer(error):
                _answered.add(store)
            is_over = time.monotonic() - started > seconds
            if is_over or not s3_errors.is_transient(error, has_answered=store in _answered):
                raise
            log.info("asking again in %.0f s: %s", pause, error)
        time.sleep(pause * random.uniform(0.5, 1.0))  # many workers must not come back at the same moment
        pause = min(2 * pause, LONGEST_PAUSE)


def _usual_patience() -> float:
    text = os.environ.get(PATIENCE_VARIABLE)
    if not text:
        return SECONDS_OF_PATIENCE
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"{PATIENCE_VARIABLE} is {text!r}; give a number of seconds, such as 60")
    return float(text)


@contextlib.contextmanager
def errors(uri: str) -> Iterator[None]:
    """Within it, what boto3 raises becomes an error of ours that names `uri`."""
    try:
        yield
    except S3_ERRORS as error:
        store = endpoint_url()
        raise s3_errors.translate(error, uri, store, has_answered=store in _answered) from error


def put_if(bucket: str, key: str, body: bytes | BinaryIO, **condition: str) -> int:
    """Puts the object if the condition holds (IfNoneMatch="*"): 200 if the object is now this one, else the
    status that says why not: 412 it does not hold, 409 somebody writes it right now, 501 no such conditions.

    A put whose answer is lost is repeated, and then meets the object that it has made itself: a mark in the
    object's metadata tells that from somebody else's.
    """
    mark = secrets.token_hex(8)
    try:
        put(bucket, key, body, Metadata={MARK: mark}, **condition)
    except ClientError as error:
        status = s3_errors.status_of(error)
        if status not in (409, 412, 501):
            raise
        return 200 if status != 501 and _mark_of(bucket, key) == mark else status
    return 200


def _mark_of(bucket: str, key: str) -> str | None:
    try:
        head = patiently(lambda: client().head_object(Bucket=bucket, Key=key))
    except ClientError as error:
        if s3_errors.status_of(error) == 404:
            return None
        raise
    return head["Metadata"].get(MARK)


def put(bucket: str, key: str, body: bytes | BinaryIO, **options: Any) -> None:
    """Puts the object in one request."""

    def put_once() -> None:
        if not isinstance(body, bytes):
            body.seek(0)
        client().put_object(Bucket=bucket, Key=key, Body=body, **options)

    patiently(put_once)
