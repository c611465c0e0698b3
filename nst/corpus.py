"""A corpus of images in WebDataset tars: opened by its manifest, every shard checked, any sample at once.

corpus = Corpus.open("corpora/style")
rgb = corpus.decode(0)                       # uint8 [H, W, 3]
rows = corpus.rows_of(corpus.label_names.index("monet"))
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_jpeg

from nst.images import Pixels, open_image, over_white
from nst.label_runs import LabelRuns
from nst.manifest import MANIFEST_NAME, REMEDY, CorpusError, Manifest, ShardInfo
from nst.shard_cache import ShardCache, default_cache_dir
from nst.verified_files import LocalStorage, Storage, VerifiedFiles, is_remote

__all__ = ["Corpus", "CorpusError", "LocalStorage", "Manifest", "Sample", "ShardInfo", "Storage"]

NUM_INDEXES_AT_ONCE = 16
TAR_BLOCK = 512  # bytes; what is in a tar begins at a multiple of it


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

    Holds 8 bytes a sample. Can be pickled: the copy opens the corpus anew and insists on the same one. A
    child process that is started with it (a loader worker) shares what its parent holds.

    Attributes:
        label_runs: the label ids (places in `label_names`) as runs, which end where shards end.
    """

    def __init__(self, files: VerifiedFiles, manifest: Manifest, columns: Columns) -> None:
        self._files, self._columns = files, columns
        self.uri = files.uri
        self.is_remote = files.is_remote
        self.manifest = manifest
        self.label_names = list(manifest.labels)
        self.label_runs = columns.label_runs
        self._first_rows = np.cumsum([0] + [shard.num_samples for shard in manifest.shards])

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        storage: Storage | None = None,
        cache_dir: str | None = None,
        cache_bytes: int | None = None,
    ) -> Corpus:
        """Reads the manifest and the indexes; shards are checked when they are first read.

        Args:
            uri: a folder, or a place that `storage` knows.
            storage: needed for a place that is not local.
            cache_dir: where remote shards are kept, for all processes; None: in the temporary folder.
            cache_bytes: how much may be kept there; None: NST_CACHE_GB, else half of the free disk.

        Raises:
            ValueError: `uri` is no corpus, or one of another version.
            CorpusError: the manifest or an index is missing, cut or altered.
        """
        if storage is None and is_remote(uri):
            raise ValueError(f"{uri} is not on this machine; give the storage that knows it")
        cache = ShardCache(cache_dir or default_cache_dir(), cache_bytes)
        files = VerifiedFiles(uri, storage or LocalStorage(), cache)
        manifest = read_manifest(files.uri, files.storage)
        return cls(files, manifest, _load_columns(files, manifest))

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __repr__(self) -> str:
        return (
            f"Corpus({self.uri!r}, {len(self)} {self.manifest.role} images, {len(self.label_names)} labels)"
        )

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """[n] label ids; made when they are first asked for."""
        return self.label_runs.per_sample()

    @cached_property
    def widths(self) -> NDArray[np.int32]:
        """[n] in pixels; the indexes are read again when they are first asked for."""
        return self._read_column("width")

    @cached_property
    def heights(self) -> NDArray[np.int32]:
        """[n] in pixels; the indexes are read again when they are first asked for."""
        return self._read_column("height")

    def rows_of(self, label_id: int) -> NDArray[np.int64]:
        """The rows of one label (an index into `label_names`), ascending."""
        return self.label_runs.rows_of(label_id)

    def shards_of(self, rows: np.ndarray) -> NDArray[np.int64]:
        """Which shard of the manifest each of these rows is in."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def place(self, row: int) -> tuple[ShardInfo, int, int]:
        """Where a sample's image is: its shard, and in the shard's tar offset and size in bytes.

        Raises IndexError for a row that is not there.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} samples")
        shard = self.manifest.shards[int(np.searchsorted(self._first_rows, row, side="right")) - 1]
        block, size = self._columns.places[row].tolist()
        return shard, block * TAR_BLOCK, size

    def read(self, row: int) -> bytes:
        """The stored bytes of a sample's image: a JPEG, or what an adopted tar holds (PNG, WebP).

        Raises IndexError for a row that is not there, CorpusError if the shard is missing, cut or altered.
        """
        shard, offset, size = self.place(row)
        # Opened for each read: safe in threads and after a fork, and cheap beside the decoding.
        descriptor = self._files.open(shard.tar, num_bytes=shard.num_bytes, sha256=shard.sha256)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise CorpusError(f"{self.uri}/{shard.tar} ends before sample {row}; {REMEDY}")
        return data

    def fetch_shard(self, number: int) -> None:
        """Sees to it that a shard of a remote corpus is here before it is read; errors as those of `read`."""
        shard = self.manifest.shards[number]
        self._files.fetch_ahead(shard.tar, num_bytes=shard.num_bytes, sha256=shard.sha256)

    def cache_limit(self) -> int:
        """Bytes that the shards fetched to this machine may have together."""
        return self._files.cache.limit()

    def decode(self, row: int) -> Pixels:
        """uint8 [H, W, 3] in sRGB, upright; what is transparent in an adopted tar lies on white."""
        return self.decode_tensor(row).permute(1, 2, 0).contiguous().numpy()

    def decode_tensor(self, row: int) -> torch.Tensor:
        """`decode` as uint8 [3, H, W], the colours of a pixel being neighbours in memory."""
        data = self.read(row)
        if self.manifest.is_adopted:
            opened = open_image(data)
            return torch.from_numpy(np.array(over_white(opened.rgb, opened.alpha))).permute(2, 0, 1)
        try:
            # The same pixels as Pillow's (the decoder is the same), a third faster.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return cast(torch.Tensor, decode_jpeg(encoded, mode=ImageReadMode.RGB))
        except RuntimeError as error:
            raise CorpusError(f"{self.uri}, shard {self.place(row)[0].name}, row {row}: {error}") from error

    def sample(self, row: int) -> Sample:
        """What the index says about a sample (reads its shard's index again: not for every step)."""
        shard, _, _ = self.place(row)
        number = int(self.shards_of(np.array(row)))
        values = _read_index(self._files, shard).slice(row - int(self._first_rows[number]), 1).to_pylist()[0]
        names = ("key", "label", "source", "width", "height", "sha256", "phash")
        return Sample(shard=shard.name, **{name: values[name] for name in names})

    def hashes(self) -> Iterator[tuple[int, list[str], NDArray[np.uint64]]]:
        """Shard by shard: its first row, and of each of its samples the sha256 of the stored image (hex) and
        the difference hash, a bit for a bit of `phash`. Reads the indexes alone."""
        for first, shard in zip(self._first_rows.tolist(), self.manifest.shards, strict=False):
            table = _read_index(self._files, shard, ["sha256", "phash"])
            packed = bytes.fromhex("".join(table.column("phash").to_pylist()))
            yield first, table.column("sha256").to_pylist(), np.frombuffer(packed, ">u8").astype(np.uint64)

    def _read_column(self, name: str) -> NDArray[np.int32]:
        parts = [_read_index(self._files, shard, [name]).column(0) for shard in self.manifest.shards]
        return np.concatenate([part.to_numpy() for part in parts])

    def __reduce__(self) -> tuple[Any, ...]:
        cache = self._files.cache
        where = (self.uri, self._files.storage, cache.folder, cache.max_bytes)
        return _open_same, (*where, self.manifest.digest)


@dataclass(frozen=True)
class Columns:
    """What reading needs of the indexes.

    Attributes:
        places: uint32 [n, 2] of each sample: the block of its tar that it begins at, its size in bytes.
        label_runs: the label ids, in runs that end where shards end.
    """

    places: NDArray[np.uint32]
    label_runs: LabelRuns


def read_manifest(uri: str, storage: Storage) -> Manifest:
    """Raises ValueError if `uri` has none or one of another version, CorpusError if it is damaged."""
    try:
        text = storage.read_bytes(f"{uri}/{MANIFEST_NAME}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{uri} has no {MANIFEST_NAME}: it is no corpus; make one with `nst shard`"
        ) from None
    return Manifest.from_json(text, f"{uri}/{MANIFEST_NAME}")


def _open_same(uri: str, storage: Storage, cache_dir: str, cache_bytes: int | None, digest: str) -> Corpus:
    corpus = Corpus.open(uri, storage=storage, cache_dir=cache_dir, cache_bytes=cache_bytes)
    if corpus.manifest.digest != digest:
        raise CorpusError(f"{uri} has changed since it was opened; start again with the corpus as it is now")
    return corpus


def _share(corpus: Corpus) -> tuple[Any, ...]:
    """For a child process of this machine: the columns stay where they are, in shared memory from now on."""
    files, columns = corpus._files, corpus._columns
    shared = torch.from_numpy(columns.places.view(np.int32))
    try:
        shared.share_memory_()
    except RuntimeError:  # containers often have next to none
        return corpus.__reduce__()
    corpus._columns = Columns(shared.numpy().view(np.uint32), columns.label_runs)
    where = (files.uri, files.storage, files.cache)
    return _from_shared, (*where, corpus.manifest, shared, columns.label_runs)


def _from_shared(
    uri: str,
    storage: Storage,
    cache: ShardCache,
    manifest: Manifest,
    places: torch.Tensor,
    label_runs: LabelRuns,
) -> Corpus:
    columns = Columns(places.numpy().view(np.uint32), label_runs)
    return Corpus(VerifiedFiles(uri, storage, cache), manifest, columns)


ForkingPickler.register(Corpus, _share)


def _read_index(files: VerifiedFiles, shard: ShardInfo, columns: list[str] | None = None) -> pa.Table:
    descriptor = files.open(shard.index, num_bytes=shard.index_num_bytes, sha256=shard.index_sha256)
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        data = file.read()
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)


def _load_columns(files: VerifiedFiles, manifest: Manifest) -> Columns:
    """The columns that reading needs, all shards one behind the other; labels as ids."""
    label_ids = {label: number for number, label in enumerate(manifest.labels)}
    places = np.empty((manifest.num_samples, 2), np.uint32)
    runs, row = [], 0
    caller = contextvars.copy_context()  # a storage may look there for how long to wait

    def load(shard: ShardInfo) -> tuple[NDArray[np.int64], LabelRuns]:
        return caller.copy().run(_load_index, files, shard, label_ids)

    with ThreadPoolExecutor(NUM_INDEXES_AT_ONCE if files.is_remote else 1) as pool:
        for found, labels in pool.map(load, manifest.shards):
            places[row : row + len(found)] = found
            row += len(found)
            runs.append(labels)
    label_runs = LabelRuns.join(runs)
    if label_runs.counts(len(label_ids)).tolist() != list(manifest.labels.values()):
        raise CorpusError(f"{files.uri}: the indexes hold other labels than {MANIFEST_NAME} says; {REMEDY}")
    return Columns(places, label_runs)


def _load_index(
    files: VerifiedFiles, shard: ShardInfo, label_ids: dict[str, int]
) -> tuple[NDArray[np.int64], LabelRuns]:
    """[n, 2] blocks and sizes of a shard's samples, and their label ids."""
    uri = f"{files.uri}/{shard.index}"
    table = _read_index(files, shard, ["label", "offset", "size"])
    names = table.column("label").combine_chunks().dictionary_encode()
    try:
        ids = np.array([label_ids[label] for label in names.dictionary.to_pylist()], dtype=np.int64)
    except KeyError as error:
        raise CorpusError(f"{uri}: {MANIFEST_NAME} does not know its label {error}; {REMEDY}") from None
    offsets, sizes = table.column("offset").to_numpy(), table.column("size").to_numpy()
    fits = (offsets >= 0) & (sizes > 0) & (offsets + sizes <= shard.num_bytes)
    fits &= (offsets % TAR_BLOCK == 0) & (offsets // TAR_BLOCK < 2**32) & (sizes < 2**32)
    if table.num_rows != shard.num_samples or not fits.all():
        raise CorpusError(f"{uri} does not fit shard {shard.name} of {MANIFEST_NAME}; {REMEDY}")
    return np.stack([offsets // TAR_BLOCK, sizes], axis=1), LabelRuns.of(ids[names.indices.to_numpy()])
