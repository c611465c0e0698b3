"""An evaluation set as files, for a team that measures on the same pairs for years: it outlives the corpora
that it was made from, and the decoder and resizer that made its pictures.

    SET/evaluation_set.json     format version, size, seed, digests of the sources and of every picture
    SET/pairs-DIGEST.tar        WebDataset: KEY.content.png, KEY.style.png, KEY.json, a pair a key

The same sources, options and libraries give the same bytes. The tar is named by its content and the manifest
comes last: whatever a crash leaves is no evaluation set.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from typing import Any

import numpy as np
import torch

from infra import places, storage
from nst.images import ImageError, encode_image, open_image
from pipelines.console import say
from pipelines.evaluation_set import (
    NUM_PAIRS,
    SEED,
    SIZE,
    EvaluationSet,
    Reference,
    make_evaluation_set,
    open_pictures,
    picture_of,
    pixels_of,
)

MANIFEST_NAME = "evaluation_set.json"
FORMAT_VERSION = 2
TAR_NAME = re.compile(r"pairs-[0-9a-f]{16}\.tar")  # one that leads elsewhere is not followed


def find_or_make_set(
    set_uri: str | None,
    content_uri: str | None,
    style_uri: str | None,
    pairs: int | None,
    size: int | None,
    seed: int | None,
) -> EvaluationSet:
    """The published set if there is one, else one made of the sources (and published, if it has a place). Of
    a published set's sources nothing is read; where they are given they are listed.

    Raises:
        ValueError: the sources are missing, or what was asked for is not what was published.
    """
    published = read_set(set_uri) if set_uri else None
    if published is not None:
        assert set_uri is not None
        _check_published(set_uri, published, content_uri, style_uri, pairs, size, seed)
        return published
    if not content_uri or not style_uri:
        remedy = f"{set_uri} holds no {MANIFEST_NAME} yet: to make it, give" if set_uri else "give"
        raise ValueError(f"{remedy} --content URI and --style URI, corpora or folders of pictures")
    chosen = make_evaluation_set(
        open_pictures(content_uri),
        open_pictures(style_uri),
        num_pairs=pairs or NUM_PAIRS,
        size=size or SIZE,
        seed=SEED if seed is None else seed,
    )
    if set_uri is None:
        return chosen
    publish_set(chosen, set_uri)
    published = read_set(set_uri)
    if published is None or published.identity() != chosen.identity():
        raise ValueError(f"somebody else published another set at {set_uri} just now; start again to use it")
    say(f"pairs     {set_uri}, {len(published)} pairs, digest {published.digest[:12]}")
    return published


def _check_published(
    set_uri: str,
    published: EvaluationSet,
    content_uri: str | None,
    style_uri: str | None,
    pairs: int | None,
    size: int | None,
    seed: int | None,
) -> None:
    """Raises ValueError where an option that was given says otherwise than the published set."""
    num_pairs = None if pairs is None else min(pairs, published.num_contents * published.num_styles)
    for option, asked, found in (
        ("--content", content_uri and open_pictures(content_uri).digest, published.content_digest),
        ("--style", style_uri and open_pictures(style_uri).digest, published.style_digest),
        ("--pairs", num_pairs, len(published)),
        ("--size", size, published.size),
        ("--seed", seed, published.seed),
    ):
        if asked is not None and asked != found:
            raise ValueError(
                f"{set_uri} was made with another {option}: {str(found)[:12]}, not {str(asked)[:12]}; leave "
                f"{option} out to use the set as it is, or name another --evaluation-set"
            )


def publish_set(chosen: EvaluationSet, uri: str) -> None:
    """Writes `chosen` below `uri`; one that somebody else published there in the meantime stays."""
    described, members = [], []
    for row in range(len(chosen)):
        key = f"{row:06d}"
        pictures = {
            f"{key}.{role}.png": encode_image(pixels_of(picture), None, "png")
            for role, picture in (("content", chosen.content[row]), ("style", chosen.style[row]))
        }
        pair = {
            "content": _described(chosen.content_names[row], chosen.content_references[row]),
            "style": _described(chosen.style_names[row], chosen.style_references[row]),
        }
        files = {**pictures, f"{key}.json": _json(pair)}
        members += files.items()
        described.append({"key": key, "sha256": {name: _sha256(data) for name, data in files.items()}})
    tar = _tar(members)
    name = f"pairs-{_sha256(tar)[:16]}.tar"
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_pairs": len(chosen),
        "size": chosen.size,
        "seed": chosen.seed,
        "content": {"digest": chosen.content_digest, "num_pictures": chosen.num_contents},
        "style": {"digest": chosen.style_digest, "num_pictures": chosen.num_styles},
        "digest": chosen.digest,
        "tar": {"name": name, "num_bytes": len(tar), "sha256": _sha256(tar)},
        "pairs": described,
    }
    storage.write_bytes(places.join(uri, name), tar)
    storage.write_bytes(places.join(uri, MANIFEST_NAME), _json(manifest), if_absent=True)


def read_set(uri: str) -> EvaluationSet | None:
    """The evaluation set at `uri`, every byte checked; None if there is none.

    Raises:
        ValueError: what is there is no evaluation set, or one of another format version.
        OSError: it is damaged, or a file of it is missing.
    """
    manifest_uri = places.join(uri, MANIFEST_NAME)
    try:
        text = storage.read_bytes(manifest_uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest_uri} is no manifest of an evaluation set; name another place") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{uri} has format version {version}, this program reads {FORMAT_VERSION}: it was published by "
            "another version of nst; publish the set anew, at another --evaluation-set"
        )
    try:
        return _set_of(manifest, _read_tar(uri, manifest))
    except (KeyError, TypeError, ValueError, ImageError) as error:
        raise OSError(f"{manifest_uri} does not fit its tar ({error!r}); publish the set anew") from error


def _set_of(manifest: dict[str, Any], files: dict[str, bytes]) -> EvaluationSet:
    keys = [pair["key"] for pair in manifest["pairs"]]
    described = [json.loads(files[f"{key}.json"]) for key in keys]

    def pictures(role: str) -> torch.Tensor:
        opened = [open_image(files[f"{key}.{role}.png"]).rgb for key in keys]
        return torch.stack([picture_of(np.array(picture)) for picture in opened])

    found = EvaluationSet(
        content=pictures("content"),
        style=pictures("style"),
        content_names=[pair["content"]["name"] for pair in described],
        style_names=[pair["style"]["name"] for pair in described],
        content_references=[_reference_of(pair["content"]) for pair in described],
        style_references=[_reference_of(pair["style"]) for pair in described],
        content_digest=manifest["content"]["digest"],
        style_digest=manifest["style"]["digest"],
        num_contents=manifest["content"]["num_pictures"],
        num_styles=manifest["style"]["num_pictures"],
        seed=manifest["seed"],
        size=manifest["size"],
    )
    expected = (manifest["num_pairs"], manifest["digest"], manifest["size"])
    if (len(found), found.digest, found.content.shape[-1]) != expected:
        raise ValueError("other pictures than the manifest names")
    return found


def _described(name: str, reference: Reference) -> dict[str, Any]:
    bits = None if reference.near_hash is None else f"{reference.near_hash:016x}"
    return {
        "name": name,
        "label": reference.label,
        "sha256": reference.sha256,
        "near_hash": bits,
        "phash": reference.phash,
    }


def _reference_of(described: dict[str, Any]) -> Reference:
    bits = described["near_hash"]
    return Reference(
        label=described["label"],
        sha256=described["sha256"],
        near_hash=None if bits is None else int(bits, 16),
        phash=described["phash"],
    )


def _read_tar(uri: str, manifest: dict[str, Any]) -> dict[str, bytes]:
    """name -> bytes of every member, checked against the manifest."""
    if not TAR_NAME.fullmatch(manifest["tar"]["name"]):
        raise ValueError(f"its tar is called {manifest['tar']['name']!r}")
    tar_uri = places.join(uri, manifest["tar"]["name"])
    data = storage.read_bytes(tar_uri)
    if _sha256(data) != manifest["tar"]["sha256"]:
        raise OSError(
            f"{tar_uri} is not what {MANIFEST_NAME} names ({len(data):,} bytes with another sha256): it was "
            "cut or altered; bring it back, or publish the set at another place"
        )
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        found = {name: file.read() for name, file in files.items() if file is not None}
    for pair in manifest["pairs"]:
        for name, digest in pair["sha256"].items():
            if name not in found or _sha256(found[name]) != digest:
                raise OSError(f"{tar_uri}: {name} is missing or altered; publish the set at another place")
    return found


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    """Time, user and group stay 0: equal members give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
