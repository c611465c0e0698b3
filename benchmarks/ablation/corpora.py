"""From a folder of pictures to training corpora and what is held out of them.

The folder has `LABELS.csv` with the columns path, artist, view and work_id; a path is `content/...` or
`style/LABEL/...`. Several pictures may be views of one painting: all are split by `work_id`, so that no part
of a held-out work is in a training. Held out are

- `unseen_works`: about 15 % of the works of every label that is trained on, one at least,
- `unseen_artists`: all works of four labels, artists where the folder has labels of one artist only,
- `unseen_photos`: 10 % of the photos."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nst.corpus import Corpus
from nst.manifest import MANIFEST_NAME, Manifest
from nst.planning import ShardSettings, SourceImage, digest_of, plan_shards
from nst.shards import write_shard

IMAGE_SIZE = 144  # px, the shorter side
SPLIT_FILE = "split.json"
LABELS_FILE = "LABELS.csv"
ROLES = {
    "photos": "content",
    "unseen_photos": "content",
    "works": "style",
    "unseen_works": "style",
    "unseen_artists": "style",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file of the folder. `source` is its posix path in there; `is_whole` says that it shows a whole work
    and not a detail."""

    source: str
    role: str
    label: str
    artist: str
    work_id: str
    is_whole: bool


def read_pictures(folder: Path) -> list[Picture]:
    """What `LABELS.csv` lists, in the order of the paths.

    Raises:
        ValueError: there is no such file, or a path in it is of neither role.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {LABELS_FILE}; give a folder with one (path, artist, view, work_id)"
        )
    pictures = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            role, label, *rest = row["path"].split("/")
            if role not in ("content", "style") or not rest:
                raise ValueError(f"{path}: {row['path']} is neither content/LABEL/FILE nor style/LABEL/FILE")
            pictures.append(
                Picture(
                    source=row["path"],
                    role=role,
                    label=label,
                    artist=row["artist"],
                    work_id=row["work_id"],
                    is_whole=row["view"] == "full view",
                )
            )
    return sorted(pictures, key=lambda picture: picture.source)


def split_pictures(
    pictures: Sequence[Picture],
    seed: int,
    *,
    works_share: float = 0.15,
    photos_share: float = 0.10,
    num_unseen_artists: int = 4,
) -> dict[str, list[Picture]]:
    """The five sets named in `ROLES`. The same pictures and seed give the same split.

    Raises:
        ValueError: too few labels, or a label with one work only.
    """
    rng = np.random.default_rng(seed)
    photos = [picture for picture in pictures if picture.role == "content"]
    works = [picture for picture in pictures if picture.role == "style"]
    unseen = set(_draw_artists(works, num_unseen_artists, rng))
    held_works: set[str] = set()
    for label in sorted({picture.label for picture in works} - unseen):
        ids = sorted({picture.work_id for picture in works if picture.label == label})
        if len(ids) < 3:
            raise ValueError(
                f"label {label} has {len(ids)} works; 3 are needed to train on two and hold one out"
            )
        num = min(len(ids) - 2, max(1, round(works_share * len(ids))))
        held_works.update(rng.permutation(ids)[:num].tolist())
    photo_ids = sorted({picture.work_id for picture in photos})
    num_photos = max(1, round(photos_share * len(photo_ids)))
    held_photos = set(rng.permutation(photo_ids)[:num_photos].tolist())
    sets: dict[str, list[Picture]] = {name: [] for name in ROLES}
    for picture in photos:
        sets["unseen_photos" if picture.work_id in held_photos else "photos"].append(picture)
    for picture in works:
        if picture.label in unseen:
            sets["unseen_artists"].append(picture)
        else:
            sets["unseen_works" if picture.work_id in held_works else "works"].append(picture)
    return sets


def _draw_artists(works: Sequence[Picture], num: int, rng: np.random.Generator) -> list[str]:
    """Labels to hold out: such of one artist only, as long as there are enough of them."""
    artists: dict[str, set[str]] = defaultdict(set)
    for picture in works:
        artists[picture.label].add(picture.artist)
    if len(artists) < num + 2:
        raise ValueError(f"{len(artists)} labels of style; {num + 2} are needed to hold {num} out")
    single = sorted(label for label, names in artists.items() if len(names) == 1)
    candidates = single if len(single) >= num else sorted(artists)
    return rng.permutation(candidates)[:num].tolist()


@dataclass(frozen=True)
class Corpora:
    """The five corpora, and which work each picture shows.

    Attributes:
        folder: holds a corpus of each name.
        seed: of the split.
        works: source -> work_id, of all pictures.
        whole: sources that show a whole work.
        counts: set -> {"pictures", "works", "labels"}.
        unseen_artists: labels that are held out.
    """

    folder: Path
    seed: int
    works: dict[str, str]
    whole: frozenset[str]
    counts: dict[str, dict[str, int]]
    unseen_artists: list[str]

    def path(self, name: str) -> Path:
        return self.folder / name

    def open(self, name: str) -> Corpus:
        return Corpus.open(str(self.path(name)))


def make_corpora(
    pictures_dir: Path, folder: Path, *, seed: int = 0, image_size: int = IMAGE_SIZE, **shares: float
) -> Corpora:
    """Makes the corpora in `folder`, or finds them there as they would be made.

    Args:
        shares: of `split_pictures`.

    Raises:
        ValueError: the pictures cannot be split, or `folder` holds another split.
    """
    pictures = read_pictures(pictures_dir)
    sizes = {picture.source: (pictures_dir / picture.source).stat().st_size for picture in pictures}
    key = digest_of({"sizes": sizes, "seed": seed, "image_size": image_size, "shares": shares})
    path = folder / SPLIT_FILE
    if path.exists():
        if json.loads(path.read_text())["key"] != key:
            raise ValueError(
                f"{folder} holds another split; delete it (and the runs beside it), or choose another"
            )
        return open_corpora(folder)
    sets = split_pictures(pictures, seed, **shares)  # type: ignore[arg-type]
    shutil.rmtree(folder, ignore_errors=True)
    for name, role in ROLES.items():
        settings = ShardSettings(role=role, image_size=image_size)
        _write_corpus(folder / name, sets[name], sizes, pictures_dir, settings)
    record = {
        "key": key,
        "seed": seed,
        "image_size": image_size,
        "counts": {name: _count(chosen) for name, chosen in sets.items()},
        "unseen_artists": sorted({picture.label for picture in sets["unseen_artists"]}),
        "works": {picture.source: picture.work_id for picture in pictures},
        "whole": [picture.source for picture in pictures if picture.is_whole],
    }
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")  # last: it says all are there
    return open_corpora(folder)


def open_corpora(folder: Path) -> Corpora:
    """What `make_corpora` left in `folder`."""
    record = json.loads((folder / SPLIT_FILE).read_text())
    return Corpora(
        folder=folder,
        seed=record["seed"],
        works=record["works"],
        whole=frozenset(record["whole"]),
        counts=record["counts"],
        unseen_artists=record["unseen_artists"],
    )


def _count(pictures: Sequence[Picture]) -> dict[str, int]:
    return {
        "pictures": len(pictures),
        "works": len({picture.work_id for picture in pictures}),
        "labels": len({picture.label for picture in pictures}),
    }


def _write_corpus(
    folder: Path,
    pictures: Sequence[Picture],
    sizes: dict[str, int],
    pictures_dir: Path,
    settings: ShardSettings,
) -> None:
    """A corpus as `nst shard` makes it, in this process."""
    sources = [
        SourceImage(source=picture.source, label=picture.label, num_bytes=sizes[picture.source])
        for picture in pictures
    ]
    shards_dir = folder / "shards"
    shards_dir.mkdir(parents=True)
    labels: Counter[str] = Counter()
    shards = []
    for plan in plan_shards(sources, settings):
        record = write_shard(plan, lambda image: (pictures_dir / image.source).read_bytes(), str(shards_dir))
        if record.failures:
            failure = record.failures[0]
            raise ValueError(f"{pictures_dir / failure.source} cannot be taken: {failure.detail}")
        labels.update(record.labels)
        shards.append(record.info())
    manifest = Manifest(
        role=settings.role,
        image_size=settings.image_size,
        num_samples=sum(labels.values()),
        labels=dict(sorted(labels.items())),
        shards=tuple(shards),
        settings=settings.to_dict(),
        source=pictures_dir.name,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
