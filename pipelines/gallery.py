"""gallery.html of a stylized bucket: before, style and after of the newest pictures, and what failed."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from infra import places, storage
from nst.grids import data_uri, square, thumbnail
from nst.images import ImageError, open_image, over_white
from pipelines.ledger import DONE, FAILED, Contents
from pipelines.pages import fact_list, page, text
from pipelines.styles import StylePicture
from pipelines.stylize_plan import Look

MAX_PICTURES = 60  # some 60 KB each
MAX_FAILURES = 500
MAX_STYLE_THUMBNAILS = 100
PICTURE_SIDE, STYLE_SIDE = 480, 160  # px
WIDEST = 2.5  # width : height of a picture's place in the page; what is wider, or as high, gets margins
NUM_READS_AT_ONCE = 4


def write_gallery(
    out_uri: str,
    contents: Contents,
    styles: Sequence[StylePicture],
    looks: Sequence[Look],
    facts: Mapping[str, Any],
) -> str:
    """Writes OUT/_nst/gallery.html; returns its URI.

    Of `contents`, the newest 60 pictures and 500 failures are in it; it says what it leaves out. `styles` and
    `looks` are those of the latest run: pictures in an older style are shown without it, and pictures of
    another SOURCE without what they were made of.
    """
    newest = contents.rows.sort_by([("finished_at", "descending"), ("output", "ascending")]).to_pylist()
    done = [entry for entry in newest if entry["status"] == DONE][:MAX_PICTURES]
    failed = [entry for entry in newest if entry["status"] == FAILED][:MAX_FAILURES]
    num_done, num_failed = (contents.counts.get(status, 0) for status in (DONE, FAILED))
    with ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
        cards = list(pool.map(lambda entry: _card(entry, out_uri, facts["source"], looks), done))
    shown_looks = sorted({entry["style"] for entry in done + failed if entry["style"]})
    reasons = Counter({name.replace("_", " "): num for name, num in contents.reasons.items()})
    folder = importlib.resources.files("pipelines") / "templates"
    script = (folder / "gallery.js").read_text(encoding="utf-8")
    content = page(
        "gallery.html",
        title=text(f"{places.name(out_uri)} – stylized"),
        policy=_policy(script),
        heading=text(places.name(out_uri)),
        lead=text(_lead(num_done, num_failed)),
        facts=fact_list(_facts(facts, done, looks)),
        style_css=_style_css(styles, looks),
        num_all=f"{num_done + num_failed:,}",
        num_done=f"{num_done:,}",
        num_failed=f"{num_failed:,}",
        look_options="".join(f'<option value="{text(name)}">{text(name)}</option>' for name in shown_looks),
        looks_hidden="" if len(shown_looks) > 1 else " hidden",
        cards="\n".join(cards),
        failures="\n".join(_failure(entry) for entry in failed),
        failures_hidden="" if failed else " hidden",
        reasons=text(", ".join(f"{num:,} {name}" for name, num in reasons.most_common())),
        left_out=text(_left_out({"pictures": (len(done), num_done), "failures": (len(failed), num_failed)})),
        script=script,
    )
    uri = places.join(out_uri, "_nst", "gallery.html")
    storage.write_bytes(uri, content.encode(), within=out_uri)
    return uri


def _policy(script: str) -> str:
    """What a browser may do with the page: run this script, show pictures that are in it, and nothing else,
    whatever a file's name tries."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def _card(entry: dict[str, Any], out_uri: str, source_uri: str, looks: Sequence[Look]) -> str:
    output, source = entry["output"], entry["source"]
    after = _picture(f"{out_uri.rstrip('/')}/{output}", out_uri)
    before = _picture(source, source_uri)
    name, style = text(entry["key"]), text(entry["style"])
    numbers = [index for index, look in enumerate(looks) if look.digest == entry["style_digest"]]
    style_class = f"style s{numbers[0]}" if numbers else "style"
    width, height = max(1, entry["width"]), max(1, entry["height"])
    note = f" · {text(entry['note'])}" if entry["note"] else ""
    ratio = min(WIDEST, max(1 / WIDEST, width / height))
    pictures = _image("after", after, f"{name}, stylized")
    if before:
        pictures += f"""
{_image("before", before, f"{name}, original")}
<span class="middle {style_class}" role="img" aria-label="{style}"></span>
<span class="tag left">Original</span><span class="tag right">Stylized</span><span class="knob"></span>
<input type="range" value="50" aria-label="How much of the original shows">"""
    return f"""<figure class="card" data-name="{name}" data-look="{style}" style="--ratio: {ratio:.3f}">
<div class="pair">
{pictures}
</div>
<figcaption>
<span class="{style_class}"></span>
<div><a class="name" href="../{text(quote(output))}" title="{name}">{name}</a>
<div class="quiet small name">{style} · {width} × {height}{note}</div></div>
</figcaption>
</figure>"""


def _image(name: str, picture: str, description: str) -> str:
    if not picture:
        return f'<span class="{name} gone">gone since</span>'
    return f'<img class="{name}" src="{picture}" alt="{description}">'


def _picture(uri: str, root: str) -> str:
    """A thumbnail as a data: URI; empty where the picture is gone, is none any more, or lies outside of
    `root`: whoever can write into OUT can write into its ledger."""
    is_below = uri == root or uri.startswith(root.rstrip("/") + "/")
    if not is_below or ".." in uri.split("/"):
        return ""
    try:
        opened = open_image(storage.read_bytes(uri, within=root), shorter_side=PICTURE_SIDE)
    except (OSError, ImageError):
        return ""
    return data_uri(thumbnail(np.asarray(over_white(opened.rgb, opened.alpha)), PICTURE_SIDE))


def _failure(entry: dict[str, Any]) -> str:
    name, style, reason = text(entry["key"]), text(entry["style"]), text(entry["reason"].replace("_", " "))
    return (
        f'<tr data-name="{name}" data-look="{style}"><td class="wrap">{name}</td><td>{style}</td>'
        f'<td class="bad">{reason}</td><td class="wrap">{text(entry["error"])}</td></tr>'
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


def _lead(num_done: int, num_failed: int) -> str:
    stylized = f"{num_done:,} {'picture' if num_done == 1 else 'pictures'} stylized"
    return stylized + (f", {num_failed:,} failed" if num_failed else "")


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
    if done:
        seconds = sorted(entry["seconds"] for entry in done)
        shown["Time"] = f"{seconds[len(seconds) // 2]:.2g} s a picture"
        shown["Finished"] = done[0]["finished_at"].strftime("%Y-%m-%d %H:%M UTC")
    return shown


def _left_out(shown: Mapping[str, tuple[int, int]]) -> str:
    """What of the bucket is not in the page; empty if all is."""
    parts = [f"{num:,} of {total:,} {noun}" for noun, (num, total) in shown.items() if num < total]
    return f"This page shows the newest: {' and '.join(parts)}. The ledger has them all." if parts else ""
