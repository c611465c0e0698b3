"""gallery.html of a stylized bucket: before, style and after of a selection, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra import places, storage
from nst.grids import data_uri, square, thumbnail
from nst.images import ImageError, open_image, over_white
from pipelines.ledger import DONE, FAILED
from pipelines.pages import fact_list, page, text
from pipelines.styles import StylePicture
from pipelines.stylize_plan import Look

MAX_PICTURES = 60  # some 40 KB each
MAX_FAILURES = 500
MAX_STYLE_THUMBNAILS = 100
PICTURE_SIDE, STYLE_SIDE = 420, 180  # px
NUM_READS_AT_ONCE = 4


def write_gallery(
    out_uri: str,
    rows: pa.Table,
    styles: Sequence[StylePicture],
    looks: Sequence[Look],
    facts: Mapping[str, Any],
) -> str:
    """Writes OUT/_nst/gallery.html from the ledger's rows; returns its URI.

    At most 60 pictures, spread evenly over the ledger, and 500 failures are in it; it says so. `styles` and
    `looks` are those of the latest run: pictures in an older style are shown without it.
    """
    entries = rows.to_pylist()
    done = [entry for entry in entries if entry["status"] == DONE]
    failed = [entry for entry in entries if entry["status"] == FAILED]
    chosen = _spread(done, MAX_PICTURES)
    with ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
        cards = list(pool.map(lambda entry: _card(entry, out_uri, looks), chosen))
    shown_looks = sorted({entry["style"] for entry in chosen + failed[:MAX_FAILURES] if entry["style"]})
    content = page(
        "gallery.html",
        title=text(f"{places.name(out_uri)} – stylized"),
        heading=text(places.name(out_uri)),
        lead=text(_lead(done, failed)),
        facts=fact_list(_facts(facts, done, looks)),
        style_css=_style_css(styles, looks),
        num_shown=str(len(chosen) + len(failed[:MAX_FAILURES])),
        num_shown_done=str(len(chosen)),
        num_shown_failed=str(len(failed[:MAX_FAILURES])),
        look_options="".join(f'<option value="{text(name)}">{text(name)}</option>' for name in shown_looks),
        cards="\n".join(cards),
        failures="\n".join(_failure(entry) for entry in failed[:MAX_FAILURES]),
        failures_hidden="" if failed else " hidden",
        footer=text(_footer(len(chosen), len(done), len(failed))),
    )
    uri = places.join(out_uri, "_nst", "gallery.html")
    storage.write_bytes(uri, content.encode())
    return uri


def _spread(entries: list[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """`num` entries at even distances, the first and the last among them."""
    if len(entries) <= num:
        return entries
    return [entries[round(index * (len(entries) - 1) / (num - 1))] for index in range(num)]


def _card(entry: dict[str, Any], out_uri: str, looks: Sequence[Look]) -> str:
    after = _picture(places.join(out_uri, entry["output"]))
    before = _picture(entry["source"])
    name, style = text(entry["key"]), text(entry["style"])
    numbers = [index for index, look in enumerate(looks) if look.digest == entry["style_digest"]]
    style_class = f"style s{numbers[0]}" if numbers else "style"
    size = f"{entry['width']} × {entry['height']}"
    return f"""<figure class="card" data-name="{name}" data-look="{style}">
<div class="pair">
<img class="after" src="{after}" alt="{name}, stylized">
<img class="before" src="{before}" alt="{name}, original">
<span class="middle {style_class}" role="img" aria-label="{style}"></span>
<span class="knob"></span>
<input type="range" value="50" aria-label="How much of the original shows">
</div>
<figcaption>
<span class="{style_class}"></span>
<div><div class="name" title="{name}">{name}</div><div class="quiet small name">{style}</div></div>
<span class="quiet small size">{size}</span>
</figcaption>
</figure>"""


def _picture(uri: str) -> str:
    """A thumbnail as a data: URI; a grey one where the picture is gone or was replaced by something else."""
    try:
        opened = open_image(storage.read_bytes(uri), shorter_side=PICTURE_SIDE)
    except (OSError, ImageError):
        return data_uri(np.full((90, 120, 3), 128, np.uint8))
    return data_uri(thumbnail(np.asarray(over_white(opened.rgb, opened.alpha)), PICTURE_SIDE))


def _failure(entry: dict[str, Any]) -> str:
    name, style = text(entry["key"]), text(entry["style"])
    return (
        f'<tr data-name="{name}" data-look="{style}"><td class="wrap">{name}</td><td>{style}</td>'
        f'<td class="bad">{text(entry["reason"])}</td><td class="wrap">{text(entry["error"])}</td></tr>'
    )


def _style_css(styles: Sequence[StylePicture], looks: Sequence[Look]) -> str:
    """One class a look, so that each style picture is in the page once. A mix shows its parts as stripes."""
    rules = []
    for number, look in enumerate(looks[:MAX_STYLE_THUMBNAILS]):
        uri = data_uri(_stripes([styles[index].rgb for index in look.styles], look.weights))
        rules.append(f".s{number} {{ background-image: url({uri}); }}")
    return "\n".join(rules)


def _stripes(pictures: Sequence[NDArray[np.uint8]], weights: Sequence[float]) -> NDArray[np.uint8]:
    """Side by side, each as wide as its share."""
    if len(pictures) == 1:
        return thumbnail(pictures[0], STYLE_SIDE)
    edges = np.round(np.cumsum([0.0, *weights]) / sum(weights) * STYLE_SIDE).astype(int)
    sheet = np.zeros((STYLE_SIDE, STYLE_SIDE, 3), np.uint8)
    for picture, left, right in zip(pictures, edges[:-1], edges[1:], strict=True):
        sheet[:, left:right] = np.asarray(square(picture, STYLE_SIDE))[:, left:right]
    return sheet


def _lead(done: list[dict[str, Any]], failed: list[dict[str, Any]]) -> str:
    num_styles = len({entry["style"] for entry in done})
    styles = f" in {num_styles} styles" if num_styles > 1 else ""
    return f"{_number(len(done), 'picture')} stylized{styles}" + (f", {len(failed)} failed" if failed else "")


def _number(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _facts(facts: Mapping[str, Any], done: list[dict[str, Any]], looks: Sequence[Look]) -> dict[str, object]:
    settings = facts["settings"]
    strength = f"{settings['strength']:g}, colours of the {settings['colors']}"
    shown = {
        "From": facts["source"],
        "To": facts["out"],
        "Model": f"{facts['model']} ({facts['model_digest'][:12]})",
        "Strength": strength + (f", at most {settings['max_side']} px" if settings["max_side"] else ""),
    }
    if len(looks) > 1:
        shown["Pairing"] = facts["pairing"]
    kinds = Counter(PurePosixPath(entry["key"]).suffix.lower() or "no suffix" for entry in done)
    if kinds:
        shown["Inputs"] = ", ".join(f"{num} {kind}" for kind, num in kinds.most_common(6))
        seconds = sorted(entry["seconds"] for entry in done)
        shown["Time"] = f"{seconds[len(seconds) // 2]:.2g} s a picture (median)"
        shown["Finished"] = max(entry["finished_at"] for entry in done).strftime("%Y-%m-%d %H:%M UTC")
    return shown


def _footer(num_chosen: int, num_done: int, num_failed: int) -> str:
    sentences = ["This page needs no other file. Every item is in the ledger beside it, ledger/*.parquet."]
    if num_chosen < num_done:
        sentences.append(f"It shows {num_chosen} of {num_done:,} pictures, spread evenly.")
    if num_failed > MAX_FAILURES:
        sentences.append(f"It lists {MAX_FAILURES} of {num_failed:,} failures.")
    return " ".join(sentences)
