"""Artist retrieval: the scores by hand, and an encoder that learns to tell painted textures apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from nst.retrieval import (
    ArtistEncoder,
    embed_works,
    retrieval_accuracy,
    split_works,
    train_artist_encoder,
)

SMALL: dict[str, Any] = {"size": 32, "width": 4, "embedding_dim": 16, "num_steps": 60, "num_classes": 4}


def painted(artist: int, number: int) -> np.ndarray:
    """A work: each artist has stripes of a width and direction of their own; colours are anybody's."""
    generator = np.random.default_rng((artist, number))
    place = np.indices((48, 48))[artist % 2]
    stripes = np.sin(place * (0.5 if artist < 2 else 2.0) + generator.uniform(0, 6))
    colours = generator.uniform(0.4, 0.6, 3) + 0.25 * stripes[:, :, None]
    return (255 * (colours + generator.normal(0, 0.02, (48, 48, 3))).clip(0, 1)).astype(np.uint8)


def corpus() -> tuple[list[np.ndarray], np.ndarray]:
    works = [painted(artist, number) for artist in range(4) for number in range(12)]
    return works, np.repeat(np.arange(4), 12)


# --- scores -------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    gallery = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    labels = [0, 1, 1, 0]
    found = retrieval_accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [0, 1], gallery, labels)
    # the gallery by cosine: 0, 1, 3, 2 with labels 0, 1, 0, 1
    assert found.hits.tolist() == [1, 0]
    assert found.average_precisions.tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])
    assert found.top1 == 0.5
    assert found.mean_average_precision == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_average_precision_agrees_with_scikit_learn() -> None:
    torch.manual_seed(0)
    queries, gallery = F.normalize(torch.randn(9, 6), dim=1), F.normalize(torch.randn(30, 6), dim=1)
    query_labels, labels = np.arange(9) % 3, np.arange(30) % 3
    found = retrieval_accuracy(queries, query_labels, gallery, labels)
    for row in range(9):
        expected = average_precision_score(labels == query_labels[row], (gallery @ queries[row]).numpy())
        assert float(found.average_precisions[row]) == pytest.approx(expected)


def test_the_reference_itself_is_no_answer() -> None:
    gallery = torch.eye(3)
    assert retrieval_accuracy(gallery, [0, 0, 1], gallery, [0, 0, 1]).top1 == 1
    found = retrieval_accuracy(gallery[:2], [0, 0], gallery, [0, 0, 1], exclude=[0, -1])
    assert found.average_precisions.tolist() == [1, 1]
    copies = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = retrieval_accuracy(copies[:1], [0], copies, [0, 0, 1], exclude=[0])
    assert found.hits.tolist() == [0]
    assert found.average_precisions.tolist() == [0.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.eye(2), [0, 5], torch.eye(2), [0, 1]), "query 1 is of artist 5"),
        ((torch.eye(2), [0, 1], torch.eye(2), [0, 1], [-1, 1]), "query 1 is of artist 1, who has no other"),
        ((torch.eye(2), [0], torch.eye(2), [0, 1]), "2 queries have 1 labels"),
        ((torch.zeros(0, 2), [], torch.eye(2), [0, 1]), "a query or more"),
    ],
)
def test_mistakes_say_what_to_do(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        retrieval_accuracy(*arguments)


# --- encoder ------------------------------------------------------------------------------------------


def test_artists_are_recognised_in_works_that_were_not_trained_on() -> None:
    works, labels = corpus()
    seen, held_out = split_works(labels, held_out=1 / 3)
    encoder = train_artist_encoder(works.__getitem__, labels, seen, **SMALL)
    gallery, queries = (embed_works(encoder, works.__getitem__, rows) for rows in (seen, held_out))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(len(held_out)))
    found = retrieval_accuracy(queries, labels[held_out], gallery, labels[seen])
    assert found.top1 > 0.85  # guessing: 0.25
    assert found.mean_average_precision > 0.75


def test_the_same_arguments_give_the_same_encoder_and_leave_random_numbers_alone() -> None:
    works, labels = corpus()
    options = {**SMALL, "num_steps": 2}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (
        train_artist_encoder(works.__getitem__, labels, **options, seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.0.weight"], other["head.0.weight"])


def test_pictures_of_any_size_are_seen_alike() -> None:
    torch.manual_seed(0)
    encoder = ArtistEncoder(32, 4, 16).eval()
    small = torch.rand(3, 3, 32, 32)
    pictures = F.interpolate(small, scale_factor=4, mode="nearest")
    wide = F.pad(pictures, (50, 50, 0, 0))
    embedded = encoder.embed(pictures)
    assert embedded.shape == (3, 16)
    assert not embedded.requires_grad
    torch.testing.assert_close(encoder.embed(wide), embedded)
    torch.testing.assert_close(encoder.embed(pictures[1:2]), embedded[1:2], rtol=1e-4, atol=1e-5)
    work = (pictures[0] * 255).round().byte().permute(1, 2, 0).numpy()
    stored = embed_works(encoder, [work].__getitem__, np.array([0]))
    torch.testing.assert_close(stored, embedded[:1], atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        encoder.embed(2 * pictures - 1)


def test_one_artist_cannot_be_told_apart() -> None:
    works, labels = corpus()
    with pytest.raises(ValueError, match="2 artists or more"):
        train_artist_encoder(works.__getitem__, labels, np.arange(12), **SMALL)


def test_works_are_split_artist_by_artist() -> None:
    labels = np.array([0] * 8 + [1] * 2 + [2] + [3] * 4)
    seen, held_out = split_works(labels)
    assert sorted([*seen, *held_out]) == list(range(15))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [2, 1, 0, 1]
    assert split_works(labels)[1].tolist() == held_out.tolist()
    assert split_works(labels, seed=1)[1].tolist() != held_out.tolist()
    assert np.bincount(labels[split_works(labels, held_out=0.99)[0]], minlength=4).tolist() == [1, 1, 1, 1]
