"""A corpus of images in WebDataset tars: opened by its manifest, every shard checked, any sample at once.

corpus = Corpus.open("corpora/style")
rgb = corpus.decode(0)                       # uint8 [H, W, 3]
rows = corpus.rows_of(corpus.label_names.index("monet"))
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_jpeg

from nst.images import Pixels, open_image, over_white
from nst.manifest import MANIFEST_NAME, REMEDY, CorpusError, Manifest, ShardInfo
from nst.verified_files import LocalStorage, Storage, VerifiedFiles, default_cache_dir, is_remote

__all__ = ["Corpus", "CorpusError", "LocalStorage", "Manifest", "Sample", "ShardInfo", "Storage"]

NUM_INDEXES_AT_ONCE = 16
READ_COLUMNS = ("label", "offset", "size", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of an index. `sha256` is that of the stored image, `phash` its 64-bit difference hash, `source`
    the input it was made from; width and height in pixels."""

    key: str
    label: str
    source: str
    width: int
    height: int
    sha256: str
    phash: str
    shard: str


class Corpus:
    """Random access to the samples of a corpus. Rows count from 0 in the order of the manifest.

    Holds some 30 bytes a sample. Can be pickled: the copy opens the corpus anew and insists on the same one.
    """

    def __init__(self, files: VerifiedFiles, manifest: Manifest) -> None:
        self._files = files
        self.uri = files.uri
        self.manifest = manifest
        self.label_names = list(manifest.labels)
        columns = _load_indexes(files, manifest)
        self.labels: NDArray[np.int32] = columns["label"]
        self.widths: NDArray[np.int32] = columns["width"]
        self.heights: NDArray[np.int32] = columns["height"]
        self._offsets: NDArray[np.int64] = columns["offset"]
        self._sizes: NDArray[np.int64] = columns["size"]
        self._first_rows = np.cumsum([0] + [shard.num_samples for shard in manifest.shards])
        counts = np.bincount(self.labels, minlength=len(self.label_names)).tolist()
        if counts != list(manifest.labels.values()):
            raise CorpusError(
                f"{self.uri}: the indexes hold other labels than {MANIFEST_NAME} says; {REMEDY}"
            )

    @classmethod
    def open(cls, uri: str, *, storage: Storage | None = None, cache_dir: str | None = None) -> Corpus:
        """Reads the manifest and the indexes; shards are checked when they are first read.

        Args:
            uri: a folder, or a place that `storage` knows.
            storage: needed for a place that is not local.
            cache_dir: where remote shards are kept, for all processes; None: in the temporary folder.

        Raises:
            ValueError: `uri` is no corpus, or one of another version.
            CorpusError: the manifest or an index is missing, cut or altered.
        """
        if storage is None and is_remote(uri):
            raise ValueError(f"{uri} is not on this machine; give the storage that knows it")
        files = VerifiedFiles(uri, storage or LocalStorage(), cache_dir or default_cache_dir())
        return cls(files, read_manifest(files.uri, files.storage))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __repr__(self) -> str:
        return (
            f"Corpus({self.uri!r}, {len(self)} {self.manifest.role} images, {len(self.label_names)} labels)"
        )

    def rows_of(self, label_id: int) -> NDArray[np.int64]:
        """The rows of one label (an index into `label_names`), ascending."""
        return np.flatnonzero(self.labels == label_id)

    def read(self, row: int) -> bytes:
        """The stored bytes of a sample's image: a JPEG, or what an adopted tar holds (PNG, WebP).

        Raises IndexError for a row that is not there, CorpusError if the shard is missing, cut or altered.
        """
        shard = self.manifest.shards[self._shard_number(row)]
        path = self._files.path(shard.tar, num_bytes=shard.num_bytes, sha256=shard.sha256)
        # Opened for each read: safe in threads and after a fork, and cheap beside the decoding.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, int(self._sizes[row]), int(self._offsets[row]))
        finally:
            os.close(descriptor)
        if len(data) != self._sizes[row]:
            raise CorpusError(f"{path} ends before sample {row}; {REMEDY}")
        return data

    def decode(self, row: int) -> Pixels:
        """uint8 [H, W, 3] in sRGB, upright; what is transparent in an adopted tar lies on white."""
        data = self.read(row)
        if self.manifest.is_adopted:
            opened = open_image(data)
            return np.array(over_white(opened.rgb, opened.alpha))
        try:
            # The same pixels as Pillow's (the decoder is the same), a third faster.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = cast(torch.Tensor, decode_jpeg(encoded, mode=ImageReadMode.RGB))  # [3, H, W]
        except RuntimeError as error:
            shard = self.manifest.shards[self._shard_number(row)]
            raise CorpusError(f"{self.uri}, shard {shard.name}, row {row}: {error}") from error
        return pixels.permute(1, 2, 0).contiguous().numpy()

    def sample(self, row: int) -> Sample:
        """What the index says about a sample (reads its shard's index again: not for every step)."""
        number = self._shard_number(row)
        shard = self.manifest.shards[number]
        table = pq.ParquetFile(_index_path(self._files, shard)).read(use_threads=False)
        values = table.slice(row - int(self._first_rows[number]), 1).to_pylist()[0]
        names = ("key", "label", "source", "width", "height", "sha256", "phash")
        return Sample(shard=shard.name, **{name: values[name] for name in names})

    def _shard_number(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} samples")
        return int(np.searchsorted(self._first_rows, row, side="right")) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        files = self._files
        return _open_same, (self.uri, files.storage, files.cache_dir, self.manifest.digest)


def read_manifest(uri: str, storage: Storage) -> Manifest:
    """Raises ValueError if `uri` has none or one of another version, CorpusError if it is damaged."""
    try:
        text = storage.read_bytes(f"{uri}/{MANIFEST_NAME}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{uri} has no {MANIFEST_NAME}: it is no corpus; make one with `nst shard`"
        ) from None
    return Manifest.from_json(text, f"{uri}/{MANIFEST_NAME}")


def _open_same(uri: str, storage: Storage, cache_dir: str, digest: str) -> Corpus:
    corpus = Corpus.open(uri, storage=storage, cache_dir=cache_dir)
    if corpus.manifest.digest != digest:
        raise CorpusError(f"{uri} has changed since it was opened; start again with the corpus as it is now")
    return corpus


def _index_path(files: VerifiedFiles, shard: ShardInfo) -> str:
    return files.path(shard.index, num_bytes=shard.index_num_bytes, sha256=shard.index_sha256)


def _load_indexes(files: VerifiedFiles, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The columns that reading needs, all shards one behind the other; labels as ids."""
    label_ids = {label: number for number, label in enumerate(manifest.labels)}
    with ThreadPoolExecutor(NUM_INDEXES_AT_ONCE if is_remote(files.uri) else 1) as pool:
        parts = list(pool.map(lambda shard: _load_index(files, shard, label_ids), manifest.shards))
    return {name: np.concatenate([part[name] for part in parts]) for name in READ_COLUMNS} if parts else {}


def _load_index(files: VerifiedFiles, shard: ShardInfo, label_ids: dict[str, int]) -> dict[str, NDArray[Any]]:
    path = _index_path(files, shard)
    table = pq.ParquetFile(path).read(columns=list(READ_COLUMNS), use_threads=False)
    columns = {name: table.column(name).to_numpy() for name in READ_COLUMNS if name != "label"}
    names = table.column("label").combine_chunks().dictionary_encode()
    try:
        ids = np.array([label_ids[label] for label in names.dictionary.to_pylist()], dtype=np.int32)
    except KeyError as error:
        raise CorpusError(f"{path}: {MANIFEST_NAME} does not know its label {error}; {REMEDY}") from None
    columns["label"] = ids[names.indices.to_numpy()]
    fits = (columns["offset"] >= 0) & (columns["size"] > 0)
    fits &= columns["offset"] + columns["size"] <= shard.num_bytes
    if table.num_rows != shard.num_samples or not fits.all():
        raise CorpusError(f"{path} does not fit shard {shard.name} of {MANIFEST_NAME}; {REMEDY}")
    return columns
