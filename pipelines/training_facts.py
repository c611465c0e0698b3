"""What is known of a training: from its MLflow run, its own record, and its corpora as they are now."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra import s3, storage
from infra.training_runs import CorpusInput, TrainingRun
from nst.config import to_dict
from nst.manifest import MANIFEST_NAME, Manifest
from nst.presets import PRESETS
from pipelines.training_claim import RECORD_FILE

SECONDS_FOR_A_PLACE = 5.0
NUM_PLACES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """A corpus that a training saw, and what is at its place now. `num_samples` is None unless it is there
    as it was; `problem` says why."""

    role: str
    uri: str
    digest: str
    num_samples: int | None
    problem: str


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """`config` is `preset` and what differs from it; `host` where its driver ran last ("" if not known)."""

    run_id: str
    name: str
    status: str
    is_deleted: bool
    started_at: str
    seconds: float | None
    place: str
    host: str
    num_workers: str
    preset: str
    changes: dict[str, str]
    config_digest: str
    commit: str
    code_digest: str
    corpora: list[CorpusFacts]


def training_facts(run: TrainingRun) -> TrainingFacts:
    place = run.tags.get("nst.training", "")
    config = {key: value for key, value in run.params.items() if key != "num_workers"}
    preset, changes = closest_preset(config)
    return TrainingFacts(
        run_id=run.run_id,
        name=run.name,
        status=run.status,
        is_deleted=run.is_deleted,
        started_at=iso_time(run.started_at),
        seconds=(run.ended_at - run.started_at).total_seconds() if run.ended_at else None,
        place=place,
        host=_host_of(place, run.run_id),
        num_workers=run.params.get("num_workers", ""),
        preset=preset,
        changes=changes,
        config_digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        commit=run.tags.get("nst.commit", ""),
        code_digest=run.tags.get("nst.code", ""),
        corpora=corpora_facts(run.corpora),
    )


def closest_preset(config: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The preset that a flat configuration differs least from, and in what; ("", {}) for an empty one."""
    if not config:
        return "", {}
    found: dict[str, dict[str, str]] = {}
    for name, make in PRESETS.items():
        preset = flattened(to_dict(make()))
        found[name] = {key: value for key, value in config.items() if preset.get(key) != value}
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as MLflow's parameters hold it: outer.inner -> text."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = prefix + key
        flat |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return flat


def corpora_facts(corpora: Iterable[CorpusInput]) -> list[CorpusFacts]:
    """The corpora as they were, with what is at their places now."""
    known = list(corpora)
    seen = read_all(storage.join(corpus.uri, MANIFEST_NAME) for corpus in known)
    found = []
    for corpus, data in zip(known, seen, strict=True):
        num_samples, problem = None, data if isinstance(data, str) else ""
        if isinstance(data, bytes):
            try:
                manifest = Manifest.from_json(data)
                if manifest.digest == corpus.digest:
                    num_samples = manifest.num_samples
                else:
                    problem = f"changed since: it is {manifest.digest[:12]} now"
            except (OSError, ValueError) as error:
                problem = str(error)
        found.append(
            CorpusFacts(
                role=corpus.role,
                uri=corpus.uri,
                digest=corpus.digest,
                num_samples=num_samples,
                problem=problem,
            )
        )
    return sorted(found, key=lambda corpus: corpus.role)


def read_all(uris: Iterable[str]) -> list[bytes | str]:
    """What is at each place, or in words why it cannot be read; no silent store is waited for long."""

    def read(uri: str) -> bytes | str:
        try:
            with s3.patience(SECONDS_FOR_A_PLACE):
                return storage.read_bytes(uri)
        except FileNotFoundError:
            return "gone"
        except (OSError, ValueError) as error:
            return f"cannot be read: {error}"

    with ThreadPoolExecutor(NUM_PLACES_AT_ONCE) as pool:
        return list(pool.map(read, uris))


def _host_of(place: str, run_id: str) -> str:
    """Where the driver of a training ran, as OUT/NAME/run.json says."""
    if not place:
        return ""
    (data,) = read_all([storage.join(place, RECORD_FILE)])
    try:
        record = json.loads(data)
        return str(record["driver"]["host"]) if record["run_id"] == run_id else ""
    except (ValueError, KeyError, TypeError):
        return ""


def iso_time(time: datetime.datetime) -> str:
    """To the second."""
    return time.isoformat(timespec="seconds")
