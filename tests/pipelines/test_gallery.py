"""The gallery: everything in one file, names of files harmless, and honest about what it leaves out."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import html.parser
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest

from pipelines import gallery
from pipelines.gallery import write_gallery
from pipelines.ledger import DONE, FAILED, IGNORED, SCHEMA, Contents, LedgerRow
from pipelines.styles import StylePicture
from pipelines.stylize_plan import mixed_look, single_looks
from tests.bad_images import encoded, picture

FACTS = {
    "out": "/out",
    "model": "models:/nst/3 @champion",
    "model_digest": "ab" * 32,
    "settings": {"strength": 0.75, "colors": "content", "max_side": None},
    "pairing": "each",
}


class Page(html.parser.HTMLParser):
    """What a browser would find."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        fits = (found for name, found in self.tags if name == tag)
        return [found for found in fits if attributes.items() <= found.items()]


def styles() -> list[StylePicture]:
    rgb = np.asarray(picture(90, 60, seed=5))
    return [StylePicture(name=name, uri=name, digest=name * 8, rgb=rgb) for name in ("monet", "klimt")]


def ledger_row(
    tmp_path: Path, key: str, status: str = DONE, style: str = "monet", second: int = 0
) -> LedgerRow:
    source, output = tmp_path / "in" / key, tmp_path / "out" / key
    if status == DONE:
        for path, seed in ((source, 1), (output, 2)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(64, 48, seed=seed), "JPEG"))
    return LedgerRow(
        key=key,
        output=key if status == DONE else "",
        source=str(source),
        etag="1",
        num_bytes=10,
        style=style,
        style_digest=style * 8,
        model="m",
        model_digest="ab" * 32,
        settings_digest="cd",
        status=status,
        reason="" if status == DONE else "truncated",
        error="" if status == DONE else "<cut> & gone",
        width=64,
        height=48,
        seconds=0.5,
        finished_at=datetime.datetime(2026, 1, 1, 0, 0, second, tzinfo=datetime.UTC),
    )


def gallery_of(tmp_path: Path, rows: list[LedgerRow]) -> str:
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)
    looks = single_looks([style.name for style in styles()], [style.digest for style in styles()])
    facts = FACTS | {"source": str(tmp_path / "in")}
    reasons = Counter(row.reason for row in rows if row.status == FAILED)
    contents = Contents(counts=Counter(row.status for row in rows), reasons=reasons, rows=table)
    uri = write_gallery(str(tmp_path / "out"), contents, styles(), looks, facts)
    assert uri == str(tmp_path / "out" / "_nst" / "gallery.html")
    return Path(uri).read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    rows = [ledger_row(tmp_path, "a.jpg"), ledger_row(tmp_path, "b/c.jpg", style="klimt")]
    rows[0] = dataclasses.replace(rows[0], note="an animation's first frame")
    rows.append(ledger_row(tmp_path, "broken.jpg", status=FAILED))
    content = gallery_of(tmp_path, rows)
    page = Page(content)
    sources = [found["src"] or "" for found in page.all("img")]
    assert len(sources) == 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert len(set(sources)) == 2  # the two pictures that the rows share
    assert not re.search(r"src=.(?!data:)|url\((?!data:)|@import|https?://", content)
    assert [found["href"] for found in page.all("a")] == ["../a.jpg", "../b/c.jpg"]  # the pictures in full
    assert [found["data-name"] for found in page.all("figure")] == ["a.jpg", "b/c.jpg"]
    assert [found["data-name"] for found in page.all("tr", **{"data-look": "monet"})] == ["broken.jpg"]
    words = " ".join(page.words)
    for expected in (
        "2 pictures stylized, 1 failed",
        "1 truncated",
        "an animation's first frame",
        "<cut> & gone",
        "models:/nst/3 @champion",
        "0.75",
    ):
        assert expected in words
    assert "$" not in re.sub(r"base64,[^\"')]*", "", content)


def test_names_of_files_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\" onerror='x' $title.jpg".replace("/", "")
    content = gallery_of(tmp_path, [ledger_row(tmp_path, name), ledger_row(tmp_path, name, status=FAILED)])
    page = Page(content)
    assert len(page.all("script")) == 1
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    assert page.all("figure")[0]["data-name"] == name
    assert unquote(page.all("a")[0]["href"] or "") == f"../{name}"
    # Should one ever get through: the browser runs this one script, and asks nobody for anything.
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    script = content.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_newest_are_shown_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MAX_PICTURES", 3)
    monkeypatch.setattr(gallery, "MAX_FAILURES", 2)
    rows = [ledger_row(tmp_path, f"{index}.jpg", second=(index * 7) % 9) for index in range(9)]
    rows += [ledger_row(tmp_path, f"x{index}.jpg", status=FAILED, second=index) for index in range(5)]
    rows.append(ledger_row(tmp_path, "notes.txt", status=IGNORED))
    page = Page(gallery_of(tmp_path, rows))
    assert [found["data-name"] for found in page.all("figure")] == ["5.jpg", "1.jpg", "6.jpg"]
    assert [found["data-name"] for found in page.all("tr") if found] == ["x4.jpg", "x3.jpg"]
    words = " ".join(page.words)
    assert "This page shows the newest: 3 of 9 pictures and 2 of 5 failures." in words
    assert "5 truncated" in words


def test_pictures_that_are_gone_or_of_an_older_style_do_not_stop_it(tmp_path: Path) -> None:
    rows = [ledger_row(tmp_path, "a.jpg"), ledger_row(tmp_path, "b.jpg", style="forgotten")]
    (tmp_path / "in" / "a.jpg").unlink()
    (tmp_path / "out" / "b.jpg").write_bytes(b"no picture")
    page = Page(gallery_of(tmp_path, rows))
    assert [found["alt"] for found in page.all("img")] == ["a.jpg, stylized", "b.jpg, original"]
    assert " ".join(page.words).count("gone since") == 1
    assert {found["class"] for found in page.all("span", role="img")} == {"middle style"}


def test_an_altered_ledger_shows_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Who can write into OUT can write into its ledger: the page must not copy a private picture out."""
    private = tmp_path / "private" / "a.jpg"
    private.parent.mkdir()
    private.write_bytes(encoded(picture(64, 48, seed=3), "JPEG"))
    row = ledger_row(tmp_path, "a.jpg")
    (tmp_path / "in" / "link").symlink_to(private.parent)
    (tmp_path / "out" / "link").symlink_to(private.parent)
    altered = [
        dataclasses.replace(row, source=str(private), output="../private/a.jpg"),
        dataclasses.replace(row, source=f"{tmp_path}/in/../private/a.jpg", output="link/a.jpg"),
        dataclasses.replace(row, source=f"{tmp_path}/in/link/a.jpg", output=str(private)),
    ]
    page = Page(gallery_of(tmp_path, altered))
    assert len(page.all("figure")) == 3
    assert page.all("img") == []


def test_a_mix_is_shown_in_its_shares() -> None:
    red, blue = np.full((40, 60, 3), (255, 0, 0), np.uint8), np.full((50, 50, 3), (0, 0, 255), np.uint8)
    look = mixed_look(single_looks(["r", "b"], ["1", "2"]), (3.0, 1.0))
    sheet = gallery._stripes([red, blue], look.weights)
    share = (sheet[:, :, 0] == 255).mean()
    assert share == pytest.approx(0.75, abs=0.01)
