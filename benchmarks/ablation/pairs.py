"""What every run is measured on: fixed contents in fixed styles, none of which a training has seen, and the
same number of seen ones beside them. Pictures are uint8 [N, S, S, 3] of S px a side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation.corpora import Corpora
from nst.corpus import Corpus
from nst.images import resize_shorter_side
from nst.planning import digest_of

Pixels = NDArray[np.uint8]

SIDE = 128  # px
NUM_CONTENTS = 64
UNSEEN_WORKS, UNSEEN_ARTISTS, SEEN = "unseen_works", "unseen_artists", "seen"
GROUPS = (UNSEEN_WORKS, UNSEEN_ARTISTS, SEEN)


@dataclass(frozen=True)
class Works:
    """Paintings, each shown whole.

    Attributes:
        pictures: [M, S, S, 3].
        labels: the label (artist) of each.
        work_ids: and which work it is.
    """

    pictures: Pixels
    labels: list[str]
    work_ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Works:
        return Works(
            self.pictures[list(rows)], [self.labels[r] for r in rows], [self.work_ids[r] for r in rows]
        )

    def joined(self, other: Works) -> Works:
        pictures = np.concatenate([self.pictures, other.pictures])
        return Works(pictures, self.labels + other.labels, self.work_ids + other.work_ids)


@dataclass(frozen=True)
class Pairs:
    """N contents, each with its style.

    Attributes:
        contents: [N, S, S, 3].
        styles: N works.
        same_artist: N other works, each by the artist of the style.
        other_artist: N works by other artists.
    """

    contents: Pixels
    styles: Works
    same_artist: Works
    other_artist: Works

    def __len__(self) -> int:
        return len(self.contents)


@dataclass(frozen=True)
class Evaluation:
    """Everything that the measures need.

    Attributes:
        groups: the pairs, by the names in `GROUPS`.
        works, unseen_works, unseen_artists: every whole work of those corpora.
        digest: the same for the same pictures in the same pairs.
    """

    groups: dict[str, Pairs]
    works: Works
    unseen_works: Works
    unseen_artists: Works
    digest: str

    @property
    def all_works(self) -> Works:
        return self.works.joined(self.unseen_works).joined(self.unseen_artists)


def load_evaluation(
    corpora: Corpora, *, side: int = SIDE, num_contents: int = NUM_CONTENTS, seed: int = 0
) -> Evaluation:
    """The same corpora and seed give the same pairs. Fewer contents than asked for are all taken.

    Raises:
        ValueError: a label with one whole work only, which has no other work to compare with.
    """
    works, unseen_works, unseen_artists = (
        _load_works(corpora, name, side) for name in ("works", UNSEEN_WORKS, UNSEEN_ARTISTS)
    )
    rng = np.random.default_rng(seed)
    everything = works.joined(unseen_works).joined(unseen_artists)
    groups, drawn = {}, {}
    for name, styles in zip(GROUPS, (unseen_works, unseen_artists, works), strict=True):
        contents = corpora.open("photos" if name == SEEN else "unseen_photos")
        rows = sorted(rng.permutation(len(contents))[:num_contents].tolist())
        if name == UNSEEN_ARTISTS:  # the same contents in both kinds of unseen styles
            rows = drawn[UNSEEN_WORKS]
        drawn[name] = rows
        pictures = np.stack([middle_square(contents.decode(row), side) for row in rows])
        groups[name] = _pair(pictures, styles, everything, rng)
    key = {
        "contents": drawn,
        "styles": {name: pairs.styles.work_ids for name, pairs in groups.items()},
        "others": {
            name: [pairs.same_artist.work_ids, pairs.other_artist.work_ids] for name, pairs in groups.items()
        },
        "side": side,
        "corpora": [corpora.open(name).manifest.digest for name in corpora.counts],
    }
    return Evaluation(groups, works, unseen_works, unseen_artists, digest_of(key))


def middle_square(rgb: Pixels, side: int) -> Pixels:
    """uint8 [H, W, 3] -> its middle, [side, side, 3]; only what is smaller than that is resized."""
    rgb = resize_shorter_side(rgb, side, enlarge=True) if min(rgb.shape[:2]) < side else rgb
    top, left = ((length - side) // 2 for length in rgb.shape[:2])
    return np.ascontiguousarray(rgb[top : top + side, left : left + side])


def _load_works(corpora: Corpora, name: str, side: int) -> Works:
    corpus: Corpus = corpora.open(name)
    pictures, labels, ids = [], [], []
    for row in range(len(corpus)):
        sample = corpus.sample(row)
        if sample.source in corpora.whole:
            pictures.append(middle_square(corpus.decode(row), side))
            labels.append(sample.label)
            ids.append(corpora.works[sample.source])
    return Works(np.stack(pictures), labels, ids)


def _pair(contents: Pixels, styles: Works, everything: Works, rng: np.random.Generator) -> Pairs:
    """A style for each content: the labels in turn, and every work of a label once before any comes again."""
    turns = _in_turns(styles.labels, rng)
    chosen = styles.take([turns[place % len(turns)] for place in range(len(contents))])
    same, other = [], []
    for label, work_id in zip(chosen.labels, chosen.work_ids, strict=True):
        rows = [row for row in range(len(everything)) if everything.labels[row] == label]
        siblings = [row for row in rows if everything.work_ids[row] != work_id]
        if not siblings:
            raise ValueError(f"label {label} has one whole work only; 2 are needed")
        strangers = [row for row in range(len(everything)) if everything.labels[row] != label]
        same.append(int(rng.choice(siblings)))
        other.append(int(rng.choice(strangers)))
    return Pairs(contents, chosen, everything.take(same), everything.take(other))


def _in_turns(labels: Sequence[str], rng: np.random.Generator) -> list[int]:
    """All rows, in rounds that take one of each label, as far as a label has any left."""
    order = rng.permutation(len(labels))
    rounds: dict[str, int] = {}
    keys = []
    for row in order:
        label = labels[int(row)]
        turn = rounds.get(label, 0)
        rounds[label] = turn + 1
        keys.append((turn, label, int(row)))
    return [row for _, _, row in sorted(keys)]
