from __future__ import annotations

import socket

import pytest
import torch

from nst.config import TrainConfig, override
from nst.corpus import Corpus
from nst.presets import preset
from tests.corpora import make_corpus

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> tuple[Corpus, Corpus]:
    """A content and a style corpus of real pictures."""
    folder = tmp_path_factory.mktemp("corpora")
    return (
        Corpus.open(make_corpus(folder / "content", "content")),
        Corpus.open(make_corpus(folder / "style", "style")),
    )


@pytest.fixture(scope="session")
def tiny() -> TrainConfig:
    """A training of seconds: 8 content images a step at 32 px."""
    return override(
        preset("smoke"),
        {
            "model.content_widths": "[8, 8, 12, 16]",
            "model.style_width": "4",
            "model.num_blocks": "1",
            "batch.size": "32",
            "num_images": "64",
            "log_every": "16",
            "checkpoint_every": "24",
            "preview_every": "64",
            "loss.r1_every": "3",
        },
    )


@pytest.fixture
def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
