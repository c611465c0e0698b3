"""What somebody hostile can put into a bucket: refused, listed with its reason, and nothing outside of OUT is
written, read or shown."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from infra import storage
from nst.images import ImageLimits
from pipelines.stylize_bucket import stylize
from tests.bad_images import bad_files, encoded, picture, png_with_header
from tests.checkpoints import tiny_checkpoint
from tests.servers import S3Server

HTML = b"<!doctype html><html><script>alert(document.cookie)</script></html>"
HTML_NAME = "<img src=x onerror=alert(1)>.jpg"
PHOTO = encoded(picture(), "JPEG")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "style.png").write_bytes(encoded(picture(seed=9), "PNG"))
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    return ["--style", str(folder / "style.png"), "--model", checkpoint, "--num-workers", "1", "--json"]


@pytest.fixture(scope="module")
def ray_and_store(store: S3Server, request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """Ray's workers know the store, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        request.getfixturevalue("ray_here")
        yield store


def run(source: object, out: object, options: list[str], *more: str) -> Result:
    return CliRunner().invoke(stylize, [str(source), str(out), *options, *more])


def ledger(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "_nst" / "ledger").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# What a file says and is


def bombs() -> dict[str, bytes]:
    """Small files that say they are gigabytes of pixels, or of text."""
    jpeg = bytearray(PHOTO)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    webp = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", 16_383 << 14 | 16_383) + bytes(5)
    fields = [(256, 100_000), (257, 100_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (279, 9)]
    tiff = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in fields)
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)
    png = encoded(picture(), "PNG")
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    gif = bytearray(encoded(picture().convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    return {
        "bombs/a.png": png_with_header(60_000, 60_000),
        "bombs/b.jpg": bytes(jpeg),
        "bombs/c.webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "bombs/d.tif": b"II*\0" + struct.pack("<I", 8) + tiff + bytes(4),
        "bombs/e.gif": bytes(gif),
        "bombs/f.png": png[:33] + chunk + png[33:],
        "bombs/g.jpg": bad_files()["broken/scans.jpg"][0],
    }


def polyglots() -> dict[str, bytes]:
    """Good pictures that other programs take for something else."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("payload.html", HTML)
    return {
        "polyglots/zip.jpg": PHOTO + archive.getvalue(),
        "polyglots/html.png": encoded(picture(seed=1), "PNG") + HTML,
        "polyglots/comment.jpg": encoded(picture(seed=2), "JPEG", comment=HTML),
        "polyglots/pdf.jpg": encoded(picture(seed=3), "JPEG", comment=b"%PDF-1.4\n" + HTML),
        "polyglots/exif.webp": encoded(picture(seed=4), "WEBP", exif=b"Exif\0\0" + HTML, xmp=HTML),
    }


NO_PICTURES = {
    "lies/page.jpg": HTML,
    "lies/drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "lies/program.jpg": b"\x7fELF" + bytes(100),
    "lies/archive.png": b"PK\x03\x04" + bytes(100),
    "lies/script.gif": b"GIF89a/*" + bytes(4) + b"*/=1;alert(1)",
    "lies/document.jpg": b"%PDF-1.7\n" + bytes(100),
    "lies/postscript.tif": b"%!PS-Adobe-3.0 EPSF\n(%pipe%id) (w) file",
}


@pytest.mark.slow
def test_a_hostile_folder(ray_and_store: S3Server, options: list[str], tmp_path: Path) -> None:
    """Also OUT holds links that somebody has planted there."""
    source, out, outside = tmp_path / "in", tmp_path / "out", tmp_path / "outside"
    good = {"good.jpg": PHOTO, "sub/good.jpg": PHOTO, HTML_NAME: PHOTO, **polyglots()}
    hidden = {".hidden.jpg": PHOTO, ".git/a.jpg": PHOTO, "sub/.b.png": PHOTO}
    unsafe = {"line\nbreak.jpg": PHOTO, "back\\slash.jpg": PHOTO, "C:/windows.jpg": PHOTO}
    planted = {"planted/a.jpg": PHOTO, "planted/deeper/a.jpg": PHOTO}
    write(source, {"_nst/results.jpg": PHOTO})  # of an earlier run into this very folder: no input
    write(source, {**good, **hidden, **unsafe, **planted, **bombs(), **NO_PICTURES, "empty.jpg": b""})
    with (source / "huge.jpg").open("wb") as file:
        file.truncate(ImageLimits().max_bytes + 1)  # takes no room
    write(outside, {"private.jpg": PHOTO, "folder/private.jpg": PHOTO, "victim.jpg": b"as it was"})
    links = {"link.jpg": "private.jpg", "link-folder": "folder", "link-gone.jpg": "nothing.jpg"}
    for name, target in links.items():
        (source / name).symlink_to(outside / target)
    (source / "link-inside.jpg").symlink_to(source / "good.jpg")
    os.mkfifo(source / "pipe.jpg")
    out.mkdir()
    (out / "planted").symlink_to(outside / "folder")
    (out / "good.jpg").symlink_to(outside / "victim.jpg")

    result = run(source, out, options)

    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    rows = {row["key"]: row for row in ledger(out)}
    assert len(rows) == len(ledger(out))
    done = {key for key, row in rows.items() if row["status"] == "done"}
    assert done == {*good, "link-inside.jpg"}
    reasons = {key: row["reason"] for key, row in rows.items() if key not in done}
    assert reasons == {
        **dict.fromkeys(hidden, "hidden"),
        **dict.fromkeys(unsafe, "unsafe_key"),
        **dict.fromkeys(planted, "storage"),
        **dict.fromkeys([*links, "pipe.jpg"], "unsafe_link"),
        **dict.fromkeys(bombs(), "too_many_pixels"),
        "bombs/f.png": "corrupt",
        "bombs/g.jpg": "too_many_scans",
        **dict.fromkeys(NO_PICTURES, "not_an_image"),
        "lies/script.gif": "corrupt",
        "lies/document.jpg": "unsupported",
        "lies/postscript.tif": "unsupported",
        "empty.jpg": "empty",
        "huge.jpg": "too_many_bytes",
    }
    assert all(row["error"] for key, row in rows.items() if key not in done)
    assert {key for key, row in rows.items() if row["status"] == "ignored"} == set(hidden)
    assert "link" in rows["planted/a.jpg"]["error"]

    # Nothing was written through the links, and a link in an output's place gives way to the output.
    assert files_below(outside) == {"private.jpg", "folder/private.jpg", "victim.jpg"}
    assert (outside / "victim.jpg").read_bytes() == b"as it was"
    assert not (out / "good.jpg").is_symlink()
    assert files_below(tmp_path) - files_below(out) <= {
        *(f"in/{path}" for path in files_below(source)),
        *(f"outside/{path}" for path in files_below(outside)),
        *(f"out/{path}" for path in files_below(out)),
    }

    # An output is a picture and nothing else.
    for key in done:
        data = (out / rows[key]["output"]).read_bytes()
        assert data.startswith(b"\xff\xd8\xff")
        assert data.endswith(b"\xff\xd9")
        assert [word for word in (b"script", b"PK\x03\x04", b"%PDF", b"Exif", b"http") if word in data] == []
    gallery = (out / "_nst" / "gallery.html").read_text()
    assert "<img src=x" not in gallery
    assert HTML_NAME.replace("<", "&lt;").replace(">", "&gt;") in gallery


@pytest.mark.slow
def test_keys_of_a_bucket_that_lead_out(ray_and_store: S3Server, options: list[str], tmp_path: Path) -> None:
    """An object store takes any key."""
    bucket, out = ray_and_store.create_bucket(), tmp_path / "deep" / "out"
    hostile = ["../up.jpg", "a/../../up.jpg", "a//b.jpg", "./c.jpg", "a\\..\\d.jpg", "C:/e.jpg"]
    hostile += ["tab\t.jpg", "delete\x7f.jpg", "right\u202egpj.to.left"]
    for key in [*hostile, "good.jpg", ".hidden.jpg"]:
        storage.write_bytes(f"{bucket}/in/{key}", PHOTO)
    result = run(f"{bucket}/in", out, options)
    assert result.exit_code == 0, result.output
    assert {path for path in files_below(tmp_path) if "_nst" not in path} == {"deep/out/good.jpg"}
    assert not (tmp_path / "up.jpg").exists()
    rows = {row["key"]: row["reason"] for row in ledger(out)}
    assert rows == {**dict.fromkeys(hostile, "unsafe_key"), "good.jpg": "", ".hidden.jpg": "hidden"}


def test_results_are_not_written_through_a_link(options: list[str], tmp_path: Path) -> None:
    source, out, outside = tmp_path / "in", tmp_path / "out", tmp_path / "outside"
    write(source, {"a.jpg": PHOTO})
    out.mkdir()
    outside.mkdir()
    (out / "_nst").symlink_to(outside)
    result = run(source, out, options)
    assert result.exit_code == 1, result.output
    assert "link" in result.stderr
    assert "Traceback" not in result.output
    assert files_below(outside) == set()


@pytest.mark.slow
def test_altered_results_do_no_harm(ray_and_store: S3Server, options: list[str], tmp_path: Path) -> None:
    source, out, private = tmp_path / "in", tmp_path / "out", tmp_path / "private"
    write(source, {"a.jpg": PHOTO, "b.jpg": PHOTO})
    write(private, {"secret.jpg": encoded(picture(seed=5), "JPEG")})
    assert run(source, out, options).exit_code == 0
    [part] = (out / "_nst" / "ledger").iterdir()
    table = pq.read_table(part)
    forged = table.to_pylist()[:1] * 2
    forged = [
        {**row, "key": "x.jpg", "source": str(private / "secret.jpg"), "output": "../private/secret.jpg"}
        for row in forged
    ]
    forged[1] = {**forged[1], "status": "failed", "output": "../private/new.jpg"}
    pq.write_table(pa.Table.from_pylist(forged, schema=table.schema), part.with_name("forged.parquet"))
    (out / "_nst" / "run.json").write_text("[" * 10_000)
    (out / "a.jpg").write_bytes(b"altered, and of another size")
    before = {path: (private / path).read_bytes() for path in files_below(private)}
    for more in ([], ["--retry-failed"]):
        result = run(source, out, options, *more)
        assert result.exit_code == 0, result.output
    assert {path: (private / path).read_bytes() for path in files_below(private)} == before
    assert (out / "a.jpg").read_bytes() == (out / "b.jpg").read_bytes()
    assert json.loads((out / "_nst" / "run.json").read_text())["status"] == "done"

    part = next((out / "_nst" / "ledger").iterdir())
    part.write_bytes(b"no Parquet")
    result = run(source, out, options)
    assert result.exit_code == 1
    assert part.name in result.stderr
    assert "delete it" in result.stderr
