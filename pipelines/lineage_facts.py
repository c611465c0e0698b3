"""Where a registered version comes from and where it was used: from MLflow, the corpora and the buckets.

What is missing is said in words where it would stand; nothing that is gone or silent stops the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra import evaluations, promotions, registry, storage, tracking_server, training_runs, usage
from infra.promotions import Event
from infra.registry import RegisteredVersion
from infra.training_runs import CorpusInput
from infra.usage import Use
from nst.manifest import MANIFEST_NAME, Manifest
from pipelines.bucket_record import parse_record, read_record, record_uri, use_of
from pipelines.training_facts import (
    CorpusFacts,
    TrainingFacts,
    corpora_facts,
    iso_time,
    read_all,
    training_facts,
)

RUN_DELETED = "run deleted: MLflow has nothing of it any more"


@dataclass(frozen=True, kw_only=True)
class EvaluationFacts:
    """The evaluation that counts; `measures` has mean, low and high of each."""

    evaluated_at: str
    report: str
    evaluation_set: dict[str, Any]
    measures: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class BucketFacts:
    """A stylized bucket; `problem` is what is not there any more, or not as it was noted."""

    use: Use
    problem: str


@dataclass(frozen=True, kw_only=True)
class VersionFacts:
    """All that is known of a version. What is None or empty has a text beside it that says why.
    `buckets` are the newest, `num_more_buckets` those that are left out."""

    model: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    registered_at: str
    checkpoint: str
    training: TrainingFacts | None
    without_training: str
    evaluation: EvaluationFacts | None
    without_evaluation: str
    promotions: list[Event]
    without_promotions: str
    buckets: list[BucketFacts]
    num_more_buckets: int


@dataclass(frozen=True, kw_only=True)
class BucketOrigin:
    """A stylized bucket and the version that made it. `record` is its run.json; `version` is None for a
    checkpoint that is not registered, or where `problem` says what does not fit. `corpora` are those that
    the bucket itself remembers, where MLflow does not know the training."""

    out: str
    record: dict[str, Any]
    version: VersionFacts | None
    corpora: list[CorpusFacts]
    problem: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training on a corpus, and what it was registered as; `same` is false if the corpus was another."""

    training: TrainingFacts
    same: bool
    versions: list[str]


@dataclass(frozen=True, kw_only=True)
class CorpusUse:
    """A corpus and the trainings that saw it, the newest first."""

    uri: str
    role: str
    digest: str
    num_samples: int
    trainings: list[Trained]


def version_facts(version: RegisteredVersion, *, num_buckets: int = 20) -> VersionFacts:
    """Everything about a version; without its buckets where `num_buckets` is 0."""
    run = training_runs.find_run(version.run_id) if version.run_id else None
    training = training_facts(run) if run is not None and run.is_training else None
    if version.run_id is None:
        without = "none: the version names no run"
    else:
        without = RUN_DELETED if run is None else "none: a checkpoint was registered without its run"
    evaluation, without_evaluation = _evaluation_of(version, is_run_gone=run is None)
    events = _promotions_of(version)
    buckets, num_more = _buckets_of(version, num_buckets) if num_buckets else ([], 0)
    return VersionFacts(
        model=version.name,
        version=version.version,
        digest=version.digest or "",
        aliases=version.aliases,
        registered_at=iso_time(version.created_at),
        checkpoint=version.tags.get("checkpoint", ""),
        training=training,
        without_training="" if training else without,
        evaluation=evaluation,
        without_evaluation=without_evaluation,
        promotions=events,
        without_promotions="" if events else "it was never the champion",
        buckets=buckets,
        num_more_buckets=num_more,
    )


def bucket_origin(out_uri: str) -> BucketOrigin | None:
    """Where a stylized bucket comes from; None if `out_uri` is none.

    Raises:
        ValueError: it was made by a registered version, and MLflow does not answer.
    """
    record = read_record(out_uri)
    if record is None:
        return None
    version, problem = None, ""
    if record["model"].get("version") is not None:
        tracking_server.check()
        version, problem = _version_of(record)
    facts = version_facts(version, num_buckets=0) if version else None
    noted = (record.get("tracking") or {}).get("corpora", ())
    is_known = facts is not None and facts.training is not None
    corpora = [] if is_known else corpora_facts(CorpusInput(**corpus) for corpus in noted)
    return BucketOrigin(out=out_uri, record=record, version=facts, corpora=corpora, problem=problem)


def corpus_use(uri: str) -> CorpusUse | None:
    """The trainings that saw a corpus; None if `uri` is none.

    Raises:
        ValueError: MLflow does not answer.
    """
    manifest_uri = storage.join(uri, MANIFEST_NAME)
    try:
        manifest = Manifest.from_json(storage.read_bytes(manifest_uri), manifest_uri)
    except FileNotFoundError:
        return None
    tracking_server.check()
    trainings = []
    for run in training_runs.trained_on(uri, manifest.digest):
        same = any(corpus.digest == manifest.digest for corpus in run.corpora)
        versions = [str(version) for version in training_runs.versions_of(run.run_id)]
        trainings.append(Trained(training=training_facts(run), same=same, versions=versions))
    return CorpusUse(
        uri=uri,
        role=manifest.role,
        digest=manifest.digest,
        num_samples=manifest.num_samples,
        trainings=trainings,
    )


def _version_of(record: Mapping[str, Any]) -> tuple[RegisteredVersion | None, str]:
    """The version that made a bucket, or what does not fit."""
    model = record["model"]
    where = tracking_server.shown(tracking_server.tracking_uri())
    noted = (record.get("tracking") or {}).get("tracking_uri")
    other = f" (the bucket was noted at {noted})" if noted and noted != where else ""
    try:
        version = registry.get_version(model["name"], model["version"])
    except ValueError as error:
        return None, f"MLflow at {where}: {error}{other}"
    if version.digest == model["digest"]:
        return version, ""
    return None, (
        f"the bucket was made by a model with the digest {model['digest'][:12]}, but {version} in MLflow at "
        f"{where} is {(version.digest or 'of unknown digest')[:12]}: another model{other}"
    )


def _evaluation_of(version: RegisteredVersion, *, is_run_gone: bool) -> tuple[EvaluationFacts | None, str]:
    if "evaluation" not in version.tags:
        return None, "none yet"
    if is_run_gone:
        return None, "deleted with its run"
    try:
        found = evaluations.evaluation(version)
    except OSError as error:
        return None, str(error)
    if found is None:
        return None, "none yet"
    measures = {
        name: {key: value[key] for key in ("mean", "low", "high")}
        for name, value in found["measures"].items()
    }
    assert version.run_id is not None, version  # it holds what was found
    figure = f"evaluation/{next(iter(measures), '')}"
    at = training_runs.logged_at(version.run_id, figure)
    facts = EvaluationFacts(
        evaluated_at=iso_time(at) if at else "",
        report=version.tags.get("report", ""),
        evaluation_set=found["evaluation_set"],
        measures=measures,
    )
    return facts, ""


def _promotions_of(version: RegisteredVersion) -> list[Event]:
    """The events that made the version the champion, or another in its place."""
    events = promotions.events(version.name)
    return [event for event in events if version.version in (event.from_version, event.to_version)]


def _buckets_of(version: RegisteredVersion, limit: int) -> tuple[list[BucketFacts], int]:
    uses, num_more = usage.uses(version.name, version.version, limit=limit)
    seen = read_all(record_uri(use.out) for use in uses)
    return [
        BucketFacts(use=use, problem=_problem_of(use, data)) for use, data in zip(uses, seen, strict=True)
    ], num_more


def _problem_of(use: Use, data: bytes | str) -> str:
    if isinstance(data, str):
        return data
    try:
        now = use_of(record := parse_record(data, record_uri(use.out)))
    except OSError as error:
        return str(error)
    if record.get("bucket") != use.bucket:
        return "replaced: another bucket is at its place"
    is_same = now is not None and now.model_digest == use.model_digest
    return "" if is_same else f"its pictures were made anew since, by {use.replaced_by or 'another model'}"
