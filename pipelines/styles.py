"""The style pictures that a command line names: files, or all pictures of a folder or prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from infra import places, storage
from nst.images import SUFFIXES, ImageError, open_image, over_white, shrink_shorter_side
from nst.stylize import MAX_STYLE_SIDE

MAX_STYLES = 1000  # about 1 MB each in memory


@dataclass(frozen=True, kw_only=True)
class StylePicture:
    """`name` is the file's without its suffix, `digest` the sha256 of its bytes, `rgb` uint8 [h, w, 3],
    reduced to 512 px on the shorter side, on white where it is transparent."""

    name: str
    uri: str
    digest: str
    rgb: NDArray[np.uint8]


def read_styles(uris: Iterable[str]) -> list[StylePicture]:
    """The pictures of all `uris`, in their order and within a folder by name.

    Raises ValueError for a place without pictures, a picture that cannot be used, or more than 1000.
    """
    found = [picture for uri in uris for picture in _pictures_at(places.absolute(uri))]
    if len(found) > MAX_STYLES:
        raise ValueError(f"--style names {len(found)} pictures; give at most {MAX_STYLES}")
    return [_read(uri) for uri in found]


def _pictures_at(uri: str) -> list[str]:
    listed = list(storage.list_objects(uri))
    if len(listed) == 1 and listed[0].uri == uri:
        return [uri]
    pictures = [found.uri for found in listed if found.key.lower().endswith(SUFFIXES)]
    if not pictures:
        what = f"holds {len(listed)} files, but no picture" if listed else "does not exist or is empty"
        raise ValueError(f"--style {uri} {what}; give a picture, or a folder or prefix with pictures")
    return pictures


def _read(uri: str) -> StylePicture:
    data = storage.read_bytes(uri)
    try:
        opened = open_image(data, shorter_side=MAX_STYLE_SIDE)
    except ImageError as error:
        raise ValueError(f"--style {uri} cannot be used ({error}); take it away or replace it") from None
    rgb = shrink_shorter_side(over_white(opened.rgb, opened.alpha), MAX_STYLE_SIDE)
    return StylePicture(
        name=PurePosixPath(uri).stem, uri=uri, digest=hashlib.sha256(data).hexdigest(), rgb=np.array(rgb)
    )
