"""The demo's real photographs: those that scikit-image and scikit-learn carry and state a licence for, cut
into views to train on, and two kept whole to be stylized at the end. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

TRAINING_FOLDER = "photos"
EVALUATION_FOLDER = "evaluation"
CREDITS_NAME = "CREDITS.txt"
JPEG_QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A photograph in an installed package. `author` and `licence` are the package's own statements.

    `views` are the squares cut from it, (left, top, side) in pixels, beside the whole picture; one without
    views is kept whole for the end.
    """

    name: str
    title: str
    author: str
    licence: str
    source: str
    package: str
    path: str  # inside the package
    views: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_kept_whole(self) -> bool:
        return not self.views


@dataclass(frozen=True, kw_only=True)
class View:
    """A file written by `write_photographs`: which photograph it shows and its box (left, top, right, bottom)
    there, in pixels."""

    path: Path
    photograph: Photograph
    box: tuple[int, int, int, int]


_SKIMAGE = "scikit-image, the documentation of skimage.data"
_SKLEARN = "scikit-learn, sklearn/datasets/images/README.txt"

PHOTOGRAPHS = (
    Photograph(
        name="coffee",
        title="Coffee cup",
        author="Rachel Michetti; courtesy of Pikolo Espresso Bar",
        licence="CC0, no copyright restrictions",
        source=_SKIMAGE,
        package="skimage",
        path="data/coffee.png",
        views=(
            (130, 0, 400),
            (0, 0, 290),
            (310, 0, 290),
            (0, 110, 290),
            (310, 110, 290),
            (150, 0, 288),
            (160, 112, 288),
            (70, 56, 344),
        ),
    ),
    Photograph(
        name="rocket",
        title="Launch photo of DSCOVR on Falcon 9 by SpaceX",
        author="SpaceX",
        licence="released in the public domain",
        source=f"{_SKIMAGE}; https://www.flickr.com/photos/spacexphotos/16511594820/",
        package="skimage",
        path="data/rocket.jpg",
        views=(
            (100, 0, 427),
            (0, 0, 288),
            (352, 0, 288),
            (0, 139, 288),
            (352, 139, 288),
            (176, 139, 288),
            (176, 0, 300),
            (270, 57, 370),
        ),
    ),
    Photograph(
        name="flower",
        title="flower.jpg (a dahlia)",
        author=(
            "the README says 'Some rights reserved by danielbuechele' and links to "
            "https://www.flickr.com/photos/vultilion/"
        ),
        licence="Creative Commons Attribution 2.0, https://creativecommons.org/licenses/by/2.0/",
        source=f"{_SKLEARN}; https://www.flickr.com/photos/vultilion/6056698931/",
        package="sklearn",
        path="datasets/images/flower.jpg",
        views=(
            (90, 0, 427),
            (150, 62, 310),
            (0, 0, 288),
            (352, 0, 288),
            (0, 139, 288),
            (352, 139, 288),
            (176, 139, 288),
            (213, 0, 320),
        ),
    ),
    Photograph(
        name="astronaut",
        title="Eileen Collins, astronaut",
        author="NASA (NASA Great Images database, https://flic.kr/p/r9qvLn)",
        licence="no known copyright restrictions, released into the public domain",
        source=_SKIMAGE,
        package="skimage",
        path="data/astronaut.png",
        views=(
            (0, 0, 400),
            (112, 0, 400),
            (0, 112, 400),
            (112, 112, 400),
            (90, 0, 290),
            (0, 222, 290),
            (222, 222, 290),
            (222, 0, 290),
            (56, 56, 340),
        ),
    ),
    Photograph(
        name="china",
        title="china.jpg (a pavilion by a lake)",
        author="danielbuechele (https://www.flickr.com/photos/danielbuechele/), some rights reserved",
        licence="Creative Commons Attribution 2.0, https://creativecommons.org/licenses/by/2.0/",
        source=f"{_SKLEARN}; https://www.flickr.com/photos/danielbuechele/6061409035/",
        package="sklearn",
        path="datasets/images/china.jpg",
    ),
    Photograph(
        name="chelsea",
        title="Chelsea the cat",
        author="Stefan van der Walt",
        licence="CC0, no copyright restrictions",
        source=_SKIMAGE,
        package="skimage",
        path="data/chelsea.png",
    ),
)


def write_photographs(folder: str | Path) -> list[View]:
    """Writes the views to train on into FOLDER/photos, the photographs kept whole into FOLDER/evaluation, and
    FOLDER/CREDITS.txt; returns one record a file. The same packages give the same bytes.

    Raises ValueError, with the remedy, where a package or its photograph is not installed.
    """
    views = []
    for photograph in PHOTOGRAPHS:
        home = Path(folder) / (EVALUATION_FOLDER if photograph.is_kept_whole else TRAINING_FOLDER)
        home.mkdir(parents=True, exist_ok=True)
        with Image.open(_find(photograph)) as opened:
            image = opened.convert("RGB")
        boxes = [(0, 0, *image.size)]
        boxes += [(left, top, left + side, top + side) for left, top, side in photograph.views]
        for number, box in enumerate(boxes):
            suffix = "" if photograph.is_kept_whole else f"-{number:02d}"
            path = home / f"{photograph.name}{suffix}.jpg"
            image.crop(box).save(path, quality=JPEG_QUALITY, subsampling=0)
            views.append(View(path=path, photograph=photograph, box=box))
    (Path(folder) / CREDITS_NAME).write_text(credits_text(), encoding="utf-8")
    return views


def credits_text() -> str:
    """Who made each photograph and under which terms its package passes it on, in those packages' words."""
    lines = ["The photographs of this demo, as the packages that carry them state their origin.", ""]
    for photograph in PHOTOGRAPHS:
        use = "kept whole" if photograph.is_kept_whole else "cut into views"
        lines += [
            f"{photograph.name} ({use}): {photograph.title}",
            f"    author:  {photograph.author}",
            f"    licence: {photograph.licence}",
            f"    source:  {photograph.source}",
            f"    file:    {photograph.package}/{photograph.path}",
            "",
        ]
    return "\n".join(lines)


def _find(photograph: Photograph) -> Path:
    # The file itself is opened, not the package's loader: that one may go to the network for what is missing.
    spec = importlib.util.find_spec(photograph.package)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / photograph.path
        if path.is_file():
            return path
    raise ValueError(
        f"the demo's photograph {photograph.package}/{photograph.path} is not installed; "
        "install it with: pip install 'nst[demo]'"
    )
