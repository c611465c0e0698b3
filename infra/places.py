"""Strings that name a place: a path, `file:///path` or `s3://bucket/key`. Nothing here touches the place."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

BUCKET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{1,254}")


def is_remote(uri: str) -> bool:
    """Whether `uri` names a place in an object store."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`. Keys are untrusted: raises ValueError for one that would climb with `..`."""
    for part in parts:
        if ".." in part.split("/"):
            raise ValueError(f"{part!r}: a key with '..' in it would lead out of {uri}; rename that object")
    return "/".join([uri.rstrip("/"), *parts]) if uri != "/" else "/" + "/".join(parts)


def name(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


def local_path(uri: str) -> str:
    """The path that a local `uri` names. Raises ValueError for a scheme that we do not speak."""
    if "\0" in uri or not uri:
        raise ValueError(f"{uri!r} names no place; give a folder or s3://bucket/prefix")
    if uri.startswith("file:"):
        path = unquote(uri.removeprefix("file:").removeprefix("//"))
        if not path.startswith("/"):
            raise ValueError(f"{uri}: a file URI looks like file:///absolute/path")
        return path
    if "://" in uri or uri.startswith("s3:"):
        raise ValueError(f"{uri}: only folders, file:/// and s3:// are supported")
    return uri


def absolute(uri: str) -> str:
    """`uri` as any process on this machine understands it, wherever it runs."""
    return uri if is_remote(uri) else str(Path(local_path(uri)).absolute())


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not BUCKET_NAME.fullmatch(bucket):
        raise ValueError(f"{uri}: {bucket!r} is no bucket name; a place looks like s3://bucket/prefix")
    return bucket, key


def bucket_and_object(uri: str) -> tuple[str, str]:
    bucket, key = bucket_and_key(uri)
    if not key:
        raise ValueError(f"{uri} names a bucket, not an object in it")
    return bucket, key
