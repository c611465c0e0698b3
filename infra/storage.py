"""Object storage: the same few functions over a local folder and an S3 bucket.

A place is a string: a path, `file:///path` or `s3://bucket/key`. Where S3 is and who we are comes from the
AWS chain and from AWS_ENDPOINT_URL, AWS_REGION. A write is seen whole or not at all.
"""

from __future__ import annotations

import errno
import functools
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import REQUESTED_RANGE_NOT_SATISFIABLE
from pathlib import Path
from typing import Any, BinaryIO

from botocore.exceptions import ClientError

from infra import local_files, places, s3, s3_errors
from infra.places import is_remote, join, name
from infra.s3 import endpoint_url

log = logging.getLogger(__name__)

MAX_SINGLE_PUT = 5 << 30  # bytes; what S3 takes in one request
NUM_CONFLICTS = 3


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object. `key` is its posix path relative to the root that was listed (the last part of the URI
    where nothing was listed); `etag` changes when the object is written again. `is_unsafe`: not to be read,
    for it is a link out of the folder that was listed, to a folder or to nothing, or no file at all."""

    uri: str
    key: str
    num_bytes: int
    etag: str
    is_unsafe: bool = False


@dataclass(frozen=True)
class ObjectStorage:
    """What a corpus needs of a storage, as an object that can be pickled."""

    def read_bytes(self, uri: str) -> bytes:
        return read_bytes(uri)

    def download_file(self, uri: str, path: str) -> None:
        download_file(uri, path)


# Reading


def list_objects(
    uri: str,
    *,
    suffixes: tuple[str, ...] | None = None,
    include_hidden: bool = False,
    include_unsafe: bool = False,
) -> Iterator[ObjectInfo]:
    """Every object below `uri` in plain string order of the keys, lazily; nothing there gives nothing.

    A `uri` that names one object gives that object. Hidden parts (`.name`) and keys below `_nst/` are left
    out unless `include_hidden`; what is unsafe is counted in the log, unless `include_unsafe`. `suffixes` are
    compared without case (".jpg").
    """
    wanted, num_left_out = tuple(suffix.lower() for suffix in suffixes or ("",)), 0
    for found in (_list_s3 if is_remote(uri) else _list_local)(uri, include_hidden):
        if not found.key.lower().endswith(wanted) or (not include_hidden and _is_hidden(found.key)):
            continue
        if found.is_unsafe and not include_unsafe:
            num_left_out += 1
        else:
            yield found
    if num_left_out:
        log.warning("%s: left out %d links that lead to folders or out of it", uri, num_left_out)


def _is_hidden(key: str) -> bool:
    return key.startswith(("_nst/", ".")) or "/." in key


def _list_local(uri: str, include_hidden: bool) -> Iterator[ObjectInfo]:
    root = places.local_path(uri)
    if (single := stat(uri)) is not None:
        yield single
    elif Path(root).is_dir():
        for key, status in local_files.walk(root, include_hidden=include_hidden):
            if status is None:
                yield ObjectInfo(uri=join(root, key), key=key, num_bytes=0, etag="", is_unsafe=True)
            else:
                etag = local_files.etag_of(status)
                yield ObjectInfo(uri=join(root, key), key=key, num_bytes=status.st_size, etag=etag)


def _list_s3(uri: str, include_hidden: bool) -> Iterator[ObjectInfo]:
    bucket, key = places.bucket_and_key(uri)
    prefix = key if not key or key.endswith("/") else key + "/"
    is_empty = True
    with s3.errors(uri):
        for page in _pages(bucket, prefix):
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


def _pages(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The answers to a listing. Not boto3's paginator, which ends with the first page that fails."""
    token: dict[str, str] = {}
    while True:
        page = s3.patiently(lambda: s3.client().list_objects_v2(Bucket=bucket, Prefix=prefix, **token))  # noqa: B023
        yield page
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def stat(uri: str) -> ObjectInfo | None:
    """The object that `uri` names; None where there is none (a folder is none)."""
    if is_remote(uri):
        bucket, key = places.bucket_and_object(uri)
        try:
            with s3.errors(uri):
                head = s3.patiently(lambda: s3.client().head_object(Bucket=bucket, Key=key))
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


def read_bytes(uri: str, *, within: str | None = None) -> bytes:
    """The whole object. Raises FileNotFoundError where there is none.

    Args:
        within: a place above `uri`; an OSError is raised where a link leads out of that folder.
    """
    if not is_remote(uri):
        return local_files.read(places.local_path(uri), within=_local_or_none(within))
    bucket, key = places.bucket_and_object(uri)

    def fetch() -> bytes:
        return s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()

    with s3.errors(uri):
        return s3.patiently(fetch)


def read_part(uri: str, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` (1 or more) of an object from `offset` on; fewer, or none, where it ends before."""
    if not is_remote(uri):
        with local_files.naming(uri), Path(places.local_path(uri)).open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
    bucket, key = places.bucket_and_object(uri)
    wanted = f"bytes={offset}-{offset + num_bytes - 1}"

    def fetch() -> bytes:
        try:
            return s3.client().get_object(Bucket=bucket, Key=key, Range=wanted)["Body"].read()
        except ClientError as error:
            if s3_errors.status_of(error) == REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            raise

    with s3.errors(uri):
        return s3.patiently(fetch)


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
        with local_files.naming(path), s3.errors(uri):
            s3.patiently(lambda: s3.client().download_file(bucket, key, str(temporary)))
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


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False, within: str | None = None) -> bool:
    """Writes the whole object at once. Returns False if `if_absent` and there was one, which then stays.

    Args:
        within: a place above `uri`; an OSError is raised where a link leads elsewhere from below that folder.
    """
    if not is_remote(uri):
        path, folder = places.local_path(uri), _local_or_none(within)
        return local_files.write(path, data, if_absent=if_absent, within=folder)
    bucket, key = places.bucket_and_object(uri)
    with s3.errors(uri):
        if if_absent:
            return _put_if_absent(bucket, key, data)
        s3.put(bucket, key, data)
        return True


def replace_bytes(uri: str, data: bytes, *, expected: bytes | None) -> bool:
    """Compare and swap: writes the whole object if it still holds `expected` (None: if there is none).

    Returns False if it holds something else, which then stays; True if it holds `data`, whoever wrote it.
    """
    if expected is None:
        return write_bytes(uri, data, if_absent=True) or read_bytes(uri) == data
    if not is_remote(uri):
        return local_files.replace(places.local_path(uri), data, expected=expected)
    bucket, key = places.bucket_and_object(uri)
    for _ in range(NUM_CONFLICTS):
        try:
            with s3.errors(uri):
                found, etag = s3.patiently(lambda: _get_with_etag(bucket, key))
                if found != expected:
                    return found == data
                status = s3.put_if(bucket, key, data, IfMatch=etag)
                if status == 501:
                    _say_not_atomic(endpoint_url())
                    s3.put(bucket, key, data)
        except FileNotFoundError:
            return False
        if status in (200, 501):
            return True
    raise OSError(errno.EBUSY, "others keep writing it", uri)


def upload_file(path: str, uri: str, *, if_absent: bool = False) -> bool:
    """Copies a local file to `uri`, which appears when it is complete; `if_absent` as in `write_bytes`.

    Raises ValueError for more than 5 GiB with `if_absent` on S3.
    """
    if not is_remote(uri):
        with Path(path).open("rb") as source:
            return local_files.write(places.local_path(uri), source, if_absent=if_absent)
    bucket, key = places.bucket_and_object(uri)
    with s3.errors(uri):
        if not if_absent:
            s3.patiently(lambda: s3.client().upload_file(path, bucket, key))
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
    with s3.errors(uri):
        s3.patiently(lambda: s3.client().delete_object(Bucket=bucket, Key=key))


def remove_abandoned(uri: str) -> None:
    """Removes what killed writers left unfinished below `uri`. An object store has nothing of that kind: an
    object is there when it is complete."""
    if not is_remote(uri):
        local_files.remove_abandoned(places.local_path(uri))


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


def _local_or_none(uri: str | None) -> str | None:
    return None if uri is None else places.local_path(uri)


# The store behind s3://


def _put_if_absent(bucket: str, key: str, body: bytes | BinaryIO) -> bool:
    uri = f"s3://{bucket}/{key}"
    for _ in range(NUM_CONFLICTS):
        status = s3.put_if(bucket, key, body, IfNoneMatch="*")
        if status == 501:
            _say_not_atomic(endpoint_url())
            if exists(uri):
                return False
            s3.put(bucket, key, body)
            return True
        # 409: somebody writes or deletes it at this moment, so look what came of that.
        if status != 409 or exists(uri):
            return status == 200
    raise OSError(errno.EBUSY, "others keep writing and deleting it", uri)


def _get_with_etag(bucket: str, key: str) -> tuple[bytes, str]:
    answer = s3.client().get_object(Bucket=bucket, Key=key)
    return answer["Body"].read(), answer["ETag"]


@functools.cache
def _say_not_atomic(endpoint: str | None) -> None:
    log.warning(
        "%s has no conditional writes: two writers of one name at the same moment both win", endpoint or "S3"
    )
