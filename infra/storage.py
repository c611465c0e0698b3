"""Object storage: the same few functions over a local folder and an S3 bucket. The one importer of boto3.

A place is a string: a path, `file:///path` or `s3://bucket/key`. Where S3 is and who we are comes from the
AWS chain and from AWS_ENDPOINT_URL, AWS_REGION. A write is seen whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import boto3.exceptions
import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra import local_files, places, s3_errors
from infra.places import is_remote, join, name

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

log = logging.getLogger(__name__)

MAX_SINGLE_PUT = 5 << 30  # bytes; what S3 takes in one request
NUM_CONFLICTS = 3
NUM_BODY_ATTEMPTS = 2  # botocore retries requests, but not the reading of an answer's body
DEFAULT_REGION = "us-east-1"  # what S3 itself takes where nothing is said
CREDENTIAL_VARIABLES = (
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
)


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object. `key` is its posix path relative to the root that was listed (the last part of the URI
    where nothing was listed); `etag` changes when the object is written again."""

    uri: str
    key: str
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class ObjectStorage:
    """What a corpus needs of a storage, as an object that can be pickled."""

    def read_bytes(self, uri: str) -> bytes:
        return read_bytes(uri)

    def download_file(self, uri: str, path: str) -> None:
        download_file(uri, path)


# Reading


def list_objects(
    uri: str, *, suffixes: tuple[str, ...] | None = None, include_hidden: bool = False
) -> Iterator[ObjectInfo]:
    """Every object below `uri` in plain string order of the keys, lazily; nothing there gives nothing.

    A `uri` that names one object gives that object. Hidden parts (`.name`) and keys below `_nst/` are left
    out unless `include_hidden`. `suffixes` are compared without case (".jpg"). Links that lead out of a
    local folder are not followed.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes) if suffixes else ("",)
    for found in (_list_s3 if is_remote(uri) else _list_local)(uri, include_hidden):
        if found.key.lower().endswith(wanted) and (include_hidden or not _is_hidden(found.key)):
            yield found


def _is_hidden(key: str) -> bool:
    return key.startswith(("_nst/", ".")) or "/." in key


def _list_local(uri: str, include_hidden: bool) -> Iterator[ObjectInfo]:
    root = places.local_path(uri)
    if (single := stat(uri)) is not None:
        yield single
    elif Path(root).is_dir():
        for key, status in local_files.walk(root, include_hidden=include_hidden):
            etag = local_files.etag_of(status)
            yield ObjectInfo(uri=join(root, key), key=key, num_bytes=status.st_size, etag=etag)


def _list_s3(uri: str, include_hidden: bool) -> Iterator[ObjectInfo]:
    bucket, key = places.bucket_and_key(uri)
    prefix = key if not key or key.endswith("/") else key + "/"
    is_empty = True
    with _s3_errors(uri):
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                is_empty = False
                if not item["Key"].endswith("/"):  # a folder that a console made
                    yield ObjectInfo(
                        uri=f"s3://{bucket}/{item['Key']}",
                        key=item["Key"].removeprefix(prefix),
                        num_bytes=item["Size"],
                        etag=item["ETag"].strip('"'),
                    )
    if is_empty and key and not key.endswith("/") and (single := stat(uri)) is not None:
        yield single


def stat(uri: str) -> ObjectInfo | None:
    """The object that `uri` names; None where there is none (a folder is none)."""
    if is_remote(uri):
        bucket, key = places.bucket_and_object(uri)
        try:
            with _s3_errors(uri):
                head = _client().head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return ObjectInfo(
            uri=uri, key=name(uri), num_bytes=head["ContentLength"], etag=head["ETag"].strip('"')
        )
    status = local_files.file_status(places.local_path(uri))
    if status is None:
        return None
    etag = local_files.etag_of(status)
    return ObjectInfo(uri=uri, key=name(uri), num_bytes=status.st_size, etag=etag)


def exists(uri: str) -> bool:
    """Whether `uri` names an object (a folder is none)."""
    return stat(uri) is not None


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError where there is none."""
    if not is_remote(uri):
        with local_files.naming(uri):
            return Path(places.local_path(uri)).read_bytes()
    bucket, key = places.bucket_and_object(uri)

    def fetch() -> bytes:
        return _client().get_object(Bucket=bucket, Key=key)["Body"].read()

    with _s3_errors(uri):
        return _again_if_cut(fetch)


def download_file(uri: str, path: str) -> None:
    """Copies the object to the local file `path`, which appears when it is complete."""
    if not is_remote(uri):
        with local_files.naming(uri), Path(places.local_path(uri)).open("rb") as source:
            local_files.write(path, source, if_absent=False)
        return
    bucket, key = places.bucket_and_object(uri)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = local_files.temporary_beside(target)
    try:
        with local_files.naming(path), _s3_errors(uri):
            _again_if_cut(lambda: _client().download_file(bucket, key, str(temporary)))
            local_files.publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def download_dir(uri: str, folder: str) -> None:
    """Copies every object below `uri` into `folder`. Raises FileNotFoundError where there is none."""
    is_empty = True
    for found in list_objects(uri, include_hidden=True):
        is_empty = False
        download_file(found.uri, join(folder, found.key))
    if is_empty:
        raise FileNotFoundError(errno.ENOENT, "nothing there", uri)


# Writing


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False) -> bool:
    """Writes the whole object at once. Returns False if `if_absent` and there was one, which then stays."""
    if not is_remote(uri):
        return local_files.write(places.local_path(uri), data, if_absent=if_absent)
    bucket, key = places.bucket_and_object(uri)
    with _s3_errors(uri):
        if if_absent:
            return _put_if_absent(bucket, key, data)
        _put(bucket, key, data)
        return True


def upload_file(path: str, uri: str, *, if_absent: bool = False) -> bool:
    """Copies a local file to `uri`, which appears when it is complete; `if_absent` as in `write_bytes`.

    Raises ValueError for more than 5 GiB with `if_absent` on S3.
    """
    if not is_remote(uri):
        with Path(path).open("rb") as source:
            return local_files.write(places.local_path(uri), source, if_absent=if_absent)
    bucket, key = places.bucket_and_object(uri)
    with _s3_errors(uri):
        if not if_absent:
            _client().upload_file(path, bucket, key)
            return True
        if Path(path).stat().st_size > MAX_SINGLE_PUT:
            raise ValueError(f"{path}: more than 5 GiB cannot be put at once to {uri}; choose smaller shards")
        with Path(path).open("rb") as source:
            return _put_if_absent(bucket, key, source)


def upload_dir(folder: str, uri: str) -> None:
    """Copies every file below `folder`. Raises FileNotFoundError if there is none."""
    is_empty = True
    for found in list_objects(folder, include_hidden=True):
        is_empty = False
        upload_file(found.uri, join(uri, found.key))
    if is_empty:
        raise FileNotFoundError(errno.ENOENT, "nothing to upload", folder)


def delete(uri: str) -> None:
    """Removes one object; none there is no error (object stores cannot tell)."""
    if not is_remote(uri):
        with local_files.naming(uri):
            Path(places.local_path(uri)).unlink(missing_ok=True)
        return
    bucket, key = places.bucket_and_object(uri)
    with _s3_errors(uri):
        _client().delete_object(Bucket=bucket, Key=key)


def check_access(uri: str) -> None:
    """Writes, reads back and deletes a small object below `uri`. Raises ValueError or OSError."""
    probe = join(uri, f".nst-check-{secrets.token_hex(8)}")
    data = secrets.token_bytes(64)
    write_bytes(probe, data)
    try:
        if read_bytes(probe) != data:
            raise OSError(errno.EIO, "reads back other bytes than were written", probe)
    finally:
        delete(probe)


# The store behind s3://


def endpoint_url() -> str | None:
    """The store's address if it is not AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region() -> str | None:
    """AWS_REGION, which boto3 itself does not read, then AWS_DEFAULT_REGION (None: the profile says)."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def pyarrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """(file system, path) for Ray Train and parquet, of the same settings. Holds no secret: every process
    that unpickles it reads the AWS chain itself."""
    import pyarrow.fs as arrow

    if not is_remote(uri):
        return arrow.LocalFileSystem(), str(Path(places.local_path(uri)).absolute())
    bucket, key = places.bucket_and_key(uri)
    options = {"region": region() or boto3.session.Session().region_name or DEFAULT_REGION}
    if endpoint := endpoint_url():
        scheme, _, host = endpoint.rpartition("://")
        options |= {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")}
    # pyarrow gives up after one second without a connection, which a busy store exceeds.
    filesystem = arrow.S3FileSystem(connect_timeout=10, request_timeout=60, **options)
    return filesystem, f"{bucket}/{key}".rstrip("/")


def _client() -> Any:
    """This process's client: one that was inherited by a fork would share its sockets."""
    chain = hash(tuple(os.environ.get(variable) for variable in CREDENTIAL_VARIABLES))  # not the secrets
    return _client_of(os.getpid(), endpoint_url(), region(), chain)


@functools.lru_cache(maxsize=4)
def _client_of(process_id: int, endpoint: str | None, region_name: str | None, chain: int) -> Any:
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        raise ValueError(f"AWS_ENDPOINT_URL is {endpoint!r}; it looks like http://host:port")
    session = boto3.session.Session()
    style = {"addressing_style": "path"} if endpoint else {}  # other stores rarely have a host a bucket
    config = Config(
        retries={"mode": "standard", "max_attempts": 4},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        s3=style,
    )
    region_name = region_name or session.region_name or DEFAULT_REGION
    return session.client("s3", region_name=region_name, endpoint_url=endpoint, config=config)


def _put_if_absent(bucket: str, key: str, body: bytes | BinaryIO) -> bool:
    uri = f"s3://{bucket}/{key}"
    for _ in range(NUM_CONFLICTS):
        try:
            _put(bucket, key, body, IfNoneMatch="*")
            return True
        except ClientError as error:
            status = s3_errors.status_of(error)
            if status == 501:
                _say_not_atomic(endpoint_url())
                if exists(uri):
                    return False
                _put(bucket, key, body)
                return True
            # 409: somebody writes or deletes it at this moment, so look what came of that.
            if status == 412 or (status == 409 and exists(uri)):
                return False
            if status != 409:
                raise
    raise OSError(errno.EBUSY, "others keep writing and deleting it", uri)


def _put(bucket: str, key: str, body: bytes | BinaryIO, **conditions: str) -> None:
    if not isinstance(body, bytes):
        body.seek(0)
    _client().put_object(Bucket=bucket, Key=key, Body=body, **conditions)


@functools.cache
def _say_not_atomic(endpoint: str | None) -> None:
    log.warning(
        "%s has no conditional writes: two writers of one name at the same moment both win", endpoint or "S3"
    )


def _again_if_cut(fetch: Callable[[], Any]) -> Any:
    for attempt in range(1, NUM_BODY_ATTEMPTS + 1):
        try:
            return fetch()
        except s3_errors.CUT_IN_THE_BODY:
            if attempt == NUM_BODY_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError, boto3.exceptions.Boto3Error) as error:
        raise s3_errors.translate(error, uri, endpoint_url()) from error
