"""Writing one shard: a plain WebDataset tar and its Parquet index, the same bytes whoever writes them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nst import jpeg
from nst.images import (
    ImageError,
    ImageLimits,
    difference_hash,
    encode_jpeg,
    open_image,
    over_white,
    shrink_shorter_side,
)
from nst.manifest import ShardInfo
from nst.planning import FORMAT_VERSION, ShardPlan, ShardSettings, SourceImage

LIMITS = ImageLimits()
TAR_BLOCK = 512
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("source", pa.string()),
    ]
)
METADATA_KEY = b"nst"
# The JPEG decoder shrinks to no less than this many times the wanted size: closer to it, the fine detail that
# styles are made of is lost (26 instead of 36 dB, and 5 to 11 % of the sharpness).
DECODER_GAP = 2
# Reads that are under way while one image is worked on; what hides the waiting for an object store.
NUM_READS_AHEAD = 4
MAX_BYTES_AHEAD = 64 << 20
# The code of an input that may be there next time: it is tried again by the next run, unlike the others.
UNREADABLE = "unreadable"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An input that was not taken: a code that can be counted and a text for a person."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What there is to know of a written shard. `labels` counts its samples by label; the tar has `num_bytes`
    and `sha256`, the index those with `index_` before them; `plan` is the digest of the shard's plan."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_num_bytes: int
    index_sha256: str
    plan: str
    labels: dict[str, int]
    failures: tuple[Failure, ...] = ()

    def info(self, tar: str = "", index: str = "") -> ShardInfo:
        """What the manifest says of it; `tar` and `index` are relative to the corpus ("": where ours are)."""
        return ShardInfo(
            name=self.name,
            num_samples=self.num_samples,
            num_bytes=self.num_bytes,
            sha256=self.sha256,
            tar=tar or f"shards/{self.name}.tar",
            index=index or f"shards/{self.name}.parquet",
            index_num_bytes=self.index_num_bytes,
            index_sha256=self.index_sha256,
            plan=self.plan,
        )


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """A sample as it is stored: JPEG bytes and what its index row says."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    phash: str


def prepare_image(data: bytes, settings: ShardSettings, limits: ImageLimits) -> PreparedImage:
    """The bytes of an image file -> an upright sRGB JPEG whose shorter side is at most the settings' size;
    what is transparent lies on white. Raises ImageError.

    With `keep_bytes`, a file that is such a JPEG already is stored byte for byte, so that its sha256 remains
    the file's own. What it says of where and by whom it was taken is stored with it, while a re-encoded image
    has no metadata. It is decoded all the same: a broken one is no sample.
    """
    opened = open_image(data, limits=limits, shorter_side=DECODER_GAP * settings.image_size)
    flat = over_white(opened.rgb, opened.alpha)
    image = shrink_shorter_side(flat, settings.image_size, full_size=opened.full_size)
    is_kept = settings.keep_bytes and image is opened.rgb and opened.is_as_stored and jpeg.is_plain(data)
    return PreparedImage(
        jpeg=data if is_kept else encode_jpeg(image, settings.jpeg_quality),
        width=image.width,
        height=image.height,
        original_width=opened.original_width,
        original_height=opened.original_height,
        phash=difference_hash(image),
    )


Prepare = Callable[[bytes, ShardSettings, ImageLimits], PreparedImage]


def write_shard(
    plan: ShardPlan,
    read: Callable[[SourceImage], bytes],
    folder: str,
    *,
    limits: ImageLimits = LIMITS,
    prepare: Prepare = prepare_image,
) -> ShardRecord:
    """Writes `folder/NAME.tar` and `folder/NAME.parquet` and reads them back.

    Images that cannot be taken become failures of the record. `read` may raise FileNotFoundError and
    PermissionError for one image; any other error of it ends the shard, because it speaks of the storage and
    not of the image. `prepare` is `prepare_image` or the same in another process (`nst.isolation`).

    Holds one decoded image, MAX_BYTES_AHEAD of encoded ones and some 2 kB a sample.
    """
    tar_path, index_path = Path(folder, f"{plan.name}.tar"), Path(folder, f"{plan.name}.parquet")
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    with (
        tar_path.open("wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for image, data in _read_ahead(plan.images, read, limits):
            try:
                if isinstance(data, ImageError):
                    raise data
                prepared = prepare(data, plan.settings, limits)
            except ImageError as error:
                failures.append(Failure(source=image.source, reason=error.reason, detail=error.detail))
            else:
                row = _describe(image, prepared, key=f"{plan.name}-{len(rows):05d}")
                rows.append(_add_sample(tar, row, prepared))
    sha256 = _checked_back(tar_path, rows)
    metadata = {
        "format_version": FORMAT_VERSION,
        "plan": plan.digest(),
        "tar": {"num_bytes": tar_path.stat().st_size, "sha256": sha256},
        "failures": [asdict(failure) for failure in failures],
    }
    index = encode_index(rows, metadata)
    index_path.write_bytes(index)
    return read_record(plan.name, index)


def _read_ahead(
    images: Iterable[SourceImage], read: Callable[[SourceImage], bytes], limits: ImageLimits
) -> Iterator[tuple[SourceImage, bytes | ImageError]]:
    """Every image with its bytes, in order; a few are read while one is worked on."""
    pending: deque[tuple[SourceImage, Future[bytes | ImageError]]] = deque()
    with ThreadPoolExecutor(NUM_READS_AHEAD, thread_name_prefix="read-ahead") as pool:
        for image in images:
            num_bytes_ahead = sum(other.num_bytes for other, _ in pending)
            while pending and (
                len(pending) > NUM_READS_AHEAD or num_bytes_ahead + image.num_bytes > MAX_BYTES_AHEAD
            ):
                first, result = pending.popleft()
                num_bytes_ahead -= first.num_bytes
                yield first, result.result()
            pending.append((image, pool.submit(_read_one, image, read, limits)))
        while pending:
            first, result = pending.popleft()
            yield first, result.result()


def _read_one(
    image: SourceImage, read: Callable[[SourceImage], bytes], limits: ImageLimits
) -> bytes | ImageError:
    if image.num_bytes > limits.max_bytes:  # never fetched
        detail = f"{image.num_bytes:,} bytes; at most {limits.max_bytes:,} are read"
        return ImageError("too_many_bytes", detail)
    try:
        data = read(image)
    except (FileNotFoundError, PermissionError) as error:
        return ImageError(UNREADABLE, f"{type(error).__name__}: {error}")
    if len(data) != image.num_bytes:
        detail = f"had {image.num_bytes:,} bytes when it was listed and {len(data):,} when it was read"
        return ImageError(UNREADABLE, detail)
    return data


def _describe(image: SourceImage, prepared: PreparedImage, *, key: str) -> dict[str, Any]:
    return {
        "key": key,
        "label": image.label,
        "source": image.source,
        "width": prepared.width,
        "height": prepared.height,
        "original_width": prepared.original_width,
        "original_height": prepared.original_height,
        "sha256": hashlib.sha256(prepared.jpeg).hexdigest(),
        "phash": prepared.phash,
    }


def _add_sample(tar: tarfile.TarFile, row: dict[str, Any], prepared: PreparedImage) -> dict[str, Any]:
    """Appends KEY.jpg and KEY.json; returns the index row."""
    description = {name: value for name, value in row.items() if name != "key"}
    offset = tar.offset + TAR_BLOCK
    _add_member(tar, f"{row['key']}.jpg", prepared.jpeg)
    _add_member(
        tar, f"{row['key']}.json", json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
    )
    indexed = {name: row[name] for name in INDEX_SCHEMA.names if name in row}
    return {**indexed, "offset": offset, "size": len(prepared.jpeg)}


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, user and group stay 0: equal inputs give equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all


def _checked_back(tar_path: Path, rows: list[dict[str, Any]]) -> str:
    """sha256 of the tar, after every sample was found in it where the index says. Raises OSError if the disk
    did not keep what was written."""
    with tarfile.open(tar_path, "r:") as tar, tar_path.open("rb") as file:
        for row in rows:
            image, description = tar.next(), tar.next()
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            file.seek(row["offset"])
            if (
                (image is None or description is None)
                or (image.name, image.offset_data, image.size)
                != (f"{row['key']}.jpg", row["offset"], row["size"])
                or hashlib.sha256(file.read(row["size"])).hexdigest() != row["sha256"]
            ):
                raise OSError(f"{tar_path}: {row['key']} does not read back as it was written")
        if tar.next() is not None:
            raise OSError(f"{tar_path}: holds more than was written")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_index(rows: list[dict[str, Any]], metadata: dict[str, Any]) -> bytes:
    """Index rows -> the bytes of a Parquet file that carries `metadata` in its schema."""
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA).replace_schema_metadata(
        {METADATA_KEY: text.encode()}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def index_metadata(index: bytes) -> dict[str, Any] | None:
    """What `encode_index` put into the schema; None for a Parquet file (or other bytes) that is not ours."""
    try:
        text = (pq.read_schema(pa.BufferReader(index)).metadata or {}).get(METADATA_KEY)
    except pa.ArrowInvalid:
        return None
    return None if text is None else json.loads(text)


def read_record(name: str, index: bytes) -> ShardRecord:
    """The record of a shard, from the bytes of its index (one that `index_metadata` knows)."""
    metadata = index_metadata(index)
    assert metadata is not None, name
    table = pq.read_table(pa.BufferReader(index), columns=["label"])
    counts = table.column("label").value_counts().to_pylist()
    return ShardRecord(
        name=name,
        num_samples=table.num_rows,
        num_bytes=metadata["tar"]["num_bytes"],
        sha256=metadata["tar"]["sha256"],
        index_num_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        plan=metadata["plan"],
        labels={item["values"]: item["counts"] for item in sorted(counts, key=lambda item: item["values"])},
        failures=tuple(Failure(**failure) for failure in metadata["failures"]),
    )
