"""`nst stylize`: every picture of a folder or bucket in the given styles, with a ledger and a gallery."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

import click
import numpy as np

from infra import places, storage
from infra.storage import ObjectInfo
from nst.images import SUFFIXES, ImageError, ImageFormat
from nst.stylize import COLORS
from pipelines.console import Stage, StageFailed, say
from pipelines.models import ResolvedModel, resolve_model
from pipelines.styles import StylePicture, read_styles
from pipelines.stylize_plan import PAIRINGS, Look, mixed_look, single_looks
from pipelines.stylize_run import BucketRun, run_bucket
from pipelines.stylize_worker import PRECISIONS, StylizeSettings, render, stylizer_of

FORMATS = get_args(ImageFormat)
FORMAT_OF_SUFFIX = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


@click.command("stylize", cls=Stage)
@click.argument("source_uri", metavar="SOURCE")
@click.argument("out_uri", metavar="OUT")
@click.option(
    "--style",
    "style_uris",
    multiple=True,
    required=True,
    metavar="URI",
    help="A style picture; a folder or prefix stands for all its pictures. May be repeated.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="models:/nst@champion, models:/nst/3, a checkpoint, micro; default: the champion, or where there is "
    "none micro, the model in the box.",
)
@click.option(
    "--strength", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="0: the content as it is."
)
@click.option(
    "--colors", type=click.Choice(COLORS), default="style", show_default=True, help="Whose colours to keep."
)
@click.option(
    "--weights", metavar="W,W,…", help="Mix all styles into one, in these shares (as many as styles)."
)
@click.option(
    "--pairing",
    type=click.Choice(PAIRINGS),
    help="With several styles: every picture in each (default), in one in turn, or in one at random.",
)
@click.option("--max-side", type=click.IntRange(min=16), metavar="PX", help="Reduce larger pictures to this.")
@click.option("--format", "format", type=click.Choice(FORMATS), help="Of the outputs.  [default: jpg]")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=92, show_default=True, help="Of JPEG and WebP."
)
@click.option(
    "--metadata",
    type=click.Choice(["strip", "keep"]),
    default="strip",
    show_default=True,
    help="keep: who, when and with what (EXIF); never where (GPS).",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="bf16 is about 1.5 times as fast on processors that have it.",
)
@click.option("--retry-failed", is_flag=True, help="Do what failed before, and nothing else.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    metavar="N",
    help="Stop and fail when more pictures fail.  [default: any number, as long as one succeeds]",
)
@click.option(
    "--num-workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Default: one a CPU, of nodes that join too.",
)
def stylize(
    source_uri: str,
    out_uri: str,
    style_uris: tuple[str, ...],
    model: str | None,
    strength: float,
    colors: str,
    weights: str | None,
    pairing: str | None,
    max_side: int | None,
    format: str | None,
    quality: int,
    metadata: str,
    precision: str,
    retry_failed: bool,
    max_failures: int | None,
    num_workers: int | None,
) -> dict[str, Any]:
    """Stylize every picture under SOURCE (a folder, s3://bucket/prefix, or one picture) into OUT.

    Outputs keep the path, with the suffix of --format; with several styles each has its folder,
    OUT/STYLE/path. They have the input's size, upright, in sRGB, with its alpha (JPEG: on white). Of inputs
    that differ only in their suffix, the first keeps the plain name, the others become a.png.jpg.

    OUT/_nst holds the ledger (one row an item), run.json and gallery.html; for a single picture in a single
    look only the picture is written. A rerun does only what is missing or changed; what failed waits for
    --retry-failed.

    \b
    Examples:
      nst stylize photos painted --style starry-night.jpg
      nst stylize photo.jpg painted.png --style hokusai.jpg --strength 0.7
      nst stylize s3://photos/2024 s3://painted/2024 --style styles/ --pairing cycle
      nst stylize photos mixed --style a.jpg --style b.jpg --weights 0.7,0.3 --colors content
    """
    source = _single_source(source_uri)
    single_output = None if source is None else _output_file(source, out_uri, format)
    source_uri, out_uri = places.absolute(source_uri), places.absolute(out_uri)
    suffix = PurePosixPath(single_output).suffix.lower() if single_output else f".{format or 'jpg'}"
    chosen = cast(ImageFormat, FORMAT_OF_SUFFIX[suffix])
    settings = StylizeSettings(
        strength=strength,
        colors=colors,
        max_side=max_side,
        format=chosen,
        quality=quality,
        keeps_metadata=metadata == "keep",
        precision=precision,
    )
    resolved = resolve_model(model)
    styles = read_styles(style_uris)
    looks = _looks(styles, weights, pairing)
    if (
        source is not None
        and single_output is not None
        and (len(looks) == 1 or pairing in ("cycle", "random"))
    ):
        return stylize_one(source, single_output, styles, looks[0], settings, resolved)
    return run_bucket(
        BucketRun(
            source_uri=source_uri,
            out_uri=out_uri,
            model=resolved,
            styles=styles,
            looks=looks,
            pairing=pairing or "each",
            settings=settings,
            only_failed=retry_failed,
            max_failures=max_failures,
            num_workers=num_workers,
        )
    )


def stylize_one(
    source: ObjectInfo,
    output_uri: str,
    styles: list[StylePicture],
    look: Look,
    settings: StylizeSettings,
    model: ResolvedModel,
) -> dict[str, Any]:
    """One picture in one look, in this process: writes `output_uri` and nothing else."""
    stylizer = stylizer_of(model.checkpoint_dir, settings)
    code = stylizer.encode_style([styles[index].rgb for index in look.styles], look.weights)
    try:
        rendered = render(storage.read_bytes(source.uri), stylizer, code, settings)
    except ImageError as error:
        raise StageFailed(f"{source.uri}: {error}", {"done": 0, "failed": 1}) from None
    storage.write_bytes(output_uri, rendered.data)
    say(f"{output_uri}  ({rendered.width}x{rendered.height}, {look.name}, {model.name})")
    return {"done": 1, "failed": 0, "output": output_uri, "width": rendered.width, "height": rendered.height}


def _single_source(source_uri: str) -> ObjectInfo | None:
    """SOURCE as one picture; None if it is a folder or prefix."""
    if source_uri.endswith("/"):
        return None
    if places.is_remote(source_uri) and not places.bucket_and_key(source_uri)[1]:
        return None
    return storage.stat(places.absolute(source_uri))


def _output_file(source: ObjectInfo, out_uri: str, format: str | None) -> str:
    """Where a single picture goes: OUT itself if it is named like a picture, else into OUT."""
    suffix = PurePosixPath(out_uri).suffix.lower()
    is_folder = not places.is_remote(out_uri) and Path(places.local_path(out_uri)).is_dir()
    if suffix in SUFFIXES and not is_folder and not out_uri.endswith("/"):
        if suffix not in FORMAT_OF_SUFFIX:
            raise ValueError(f"OUT {out_uri}: {suffix} is not written; choose .jpg, .png or .webp")
        if format is not None and FORMAT_OF_SUFFIX[suffix] != format:
            raise ValueError(f"OUT {out_uri} is no {format}, as --format says; drop one of the two")
        output = places.absolute(out_uri)
    else:
        stem = (
            PurePosixPath(source.key).stem
            if PurePosixPath(source.key).suffix.lower() in SUFFIXES
            else source.key
        )
        output = places.join(places.absolute(out_uri), f"{stem}.{format or 'jpg'}")
    if output == source.uri:
        raise ValueError(f"OUT is the picture {source.uri} itself; choose another OUT")
    return output


def _looks(styles: list[StylePicture], weights: str | None, pairing: str | None) -> list[Look]:
    looks = single_looks([style.name for style in styles], [style.digest for style in styles])
    if weights is None:
        return looks
    if pairing is not None:
        raise ValueError(
            "--weights mix all styles into one look, so that --pairing says nothing; drop one of the two"
        )
    try:
        shares = tuple(float(part) for part in re.split(r"[,;\s]+", weights.strip()))
    except ValueError:
        raise ValueError(f"--weights {weights!r} are not numbers; write them like 0.7,0.3") from None
    if len(shares) != len(looks):
        raise ValueError(f"--weights has {len(shares)} numbers for {len(looks)} styles; give one each")
    if not all(np.isfinite(shares)) or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"--weights {weights}: give numbers of 0 or more, not all 0")
    return [mixed_look(looks, shares)]


if __name__ == "__main__":
    stylize()
