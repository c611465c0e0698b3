"""One driver at a time has a training, on whichever machine it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from infra import storage
from nst.corpus import Corpus
from nst.presets import resolve_config
from pipelines import training_claim
from pipelines.training_claim import RECORD_FILE, Overtaken, TrainingClaim, is_held
from pipelines.training_record import Training
from tests.corpora import make_corpus
from tests.trial_cluster import wait_for


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    content, style = (Corpus.open(make_corpus(folder / role, role)) for role in ("content", "style"))
    return content, style


@pytest.fixture(params=["folder", "s3"])
def training(request: pytest.FixtureRequest, corpora: tuple[Corpus, Corpus], tmp_path: Path) -> Training:
    place = str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3").create_bucket()
    content, style = corpora
    return Training(
        name="first",
        out_uri=place,
        config=resolve_config("smoke", None, []),
        content=content,
        style=style,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_claim, "SECONDS_BETWEEN_BEATS", 0.2)
    monkeypatch.setattr(training_claim, "SECONDS_TO_WATCH", 2.0)
    monkeypatch.setattr(training_claim, "SECONDS_BETWEEN_LOOKS", 0.1)


def record_of(training: Training) -> dict:
    return json.loads(storage.read_bytes(storage.join(training.uri, RECORD_FILE)))


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process is on another machine."""
    monkeypatch.setattr(training_claim, "_machine", lambda: "another machine")


def test_what_one_driver_says_the_next_one_knows(training: Training) -> None:
    with TrainingClaim.of(training) as first:
        assert first.known == {}
        first.take("run-1", 3)
        with pytest.raises(ValueError, match=f"is being trained now, by process {os.getpid()} on "):
            TrainingClaim.of(training)
        first.end("KILLED")
    second = TrainingClaim.of(training)
    assert [second.known[name] for name in ("run_id", "num_threads", "status")] == ["run-1", 3, "KILLED"]
    with second:
        second.take("run-1", 3)
        second.end("FINISHED", {"version": 1})
    assert record_of(training)["result"] == {"version": 1}


def test_a_driver_elsewhere_that_lives_is_not_disturbed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrainingClaim.of(training) as first:
        first.take("run-1", 1)
        elsewhere(monkeypatch)
        with pytest.raises(ValueError, match="is being trained now"):
            TrainingClaim.of(training)
        first.check()


def test_a_driver_elsewhere_that_fell_silent_is_followed(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And should it wake up again, it learns that, before it has written anything."""
    with TrainingClaim.of(training) as first:
        first.take("run-1", 1)
        elsewhere(monkeypatch)
        with first._changing:  # cut off
            second = TrainingClaim.of(training)
            second.take("run-1", 1)
        wait_for(lambda: first._overtaken_by, 10)
        with pytest.raises(Overtaken, match="another command has taken this training over"):
            first.check()
        with pytest.raises(Overtaken):
            first.end("FAILED")
    assert not is_held(first.place)
    assert is_held(second.place)
    assert record_of(training)["driver"]["token"] == second.token


def test_a_dead_process_here_is_followed_at_once(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_claim, "SECONDS_TO_WATCH", 1e6)
    TrainingClaim.of(training).take("run-1", 1)
    record = record_of(training)
    record["driver"]["pid"] = 1  # it lives, but did not begin then
    storage.write_bytes(storage.join(training.uri, RECORD_FILE), json.dumps(record).encode())
    assert TrainingClaim.of(training).known["run_id"] == "run-1"


def test_of_two_that_begin_at_once_one_is_told(training: Training) -> None:
    first, second = TrainingClaim.of(training), TrainingClaim.of(training)
    first.take("run-1", 1)
    with pytest.raises(ValueError, match="one at a time may have it"):
        second.take("run-2", 1)
    assert record_of(training)["run_id"] == "run-1"


def test_a_sign_whose_answer_was_lost_is_none_of_a_rival(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, answers = storage.replace_bytes, [OSError("cut off")]

    def lose_one_answer(uri: str, data: bytes, *, expected: bytes | None) -> bool:
        done = replace(uri, data, expected=expected)
        if answers:
            raise answers.pop()
        return done

    with TrainingClaim.of(training) as claim:
        claim.take("run-1", 1)
        monkeypatch.setattr(storage, "replace_bytes", lose_one_answer)
        before = record_of(training)["driver"]["beat"]
        wait_for(lambda: record_of(training)["driver"]["beat"] > before + 2, 10, "signs of life")
        claim.check()


def test_a_record_of_something_else_is_refused(training: Training) -> None:
    TrainingClaim.of(training).take("run-1", 1)
    uri, record = storage.join(training.uri, RECORD_FILE), record_of(training)
    storage.write_bytes(uri, json.dumps({**record, "identity": {"config": {}}}).encode())
    with pytest.raises(ValueError, match="was started with another config"):
        TrainingClaim.of(training)
    storage.write_bytes(uri, b"[]")
    with pytest.raises(ValueError, match="no record of this version's trainings"):
        TrainingClaim.of(training)
