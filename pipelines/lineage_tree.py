"""What `nst history` shows of where something comes from: facts -> a tree."""

from __future__ import annotations

from collections.abc import Sequence

from infra.promotions import Event
from infra.usage import Use
from pipelines.bucket_record import NUM_STYLES_NAMED, settings_line
from pipelines.lineage_facts import BucketFacts, BucketOrigin, CorpusUse, EvaluationFacts, VersionFacts
from pipelines.training_facts import CorpusFacts, TrainingFacts
from pipelines.tree import Node

NUM_CHANGES_SHOWN = 12
STATUSES = {
    "RUNNING": "begun, and not ended: it runs, or was killed",
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "interrupted",
}
STATUSES_OF_RECORD = {"running": "RUNNING", "done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


def version_tree(version: VersionFacts, *, with_buckets: bool = True) -> Node:
    """A version, and everything on both sides of it."""
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    children = [
        _training_node(version.training)
        if version.training
        else Node(title="training run", facts=[("", version.without_training)]),
        _evaluation_node(version.evaluation, version.without_evaluation),
        Node(
            title="promotions",
            facts=[("", version.without_promotions)],
            children=[_promotion_node(event, version.version) for event in version.promotions],
        ),
    ]
    if with_buckets:
        children.append(_buckets_node(version.buckets, version.num_more_buckets))
    return Node(
        title=f"{version.model} version {version.version}{aliases}",
        facts=[
            ("digest", version.digest),
            ("registered", _when(version.registered_at)),
            ("checkpoint", version.checkpoint),
        ],
        children=children,
    )


def bucket_tree(origin: BucketOrigin) -> Node:
    """A stylized bucket, and what it was made from."""
    record, model = origin.record, origin.record["model"]
    tracking = record.get("tracking")
    counts = record["counts"]
    told = f"run {tracking['run_id']} at {tracking['tracking_uri']}" if tracking else "not told yet"
    if origin.version is not None:
        source = version_tree(origin.version, with_buckets=False)
    elif model.get("version") is not None:
        source = Node(
            title=f"{model['name']} version {model['version']}",
            facts=[("digest", model["digest"]), ("PROBLEM", origin.problem)],
        )
    else:
        source = Node(
            title="a checkpoint that is not registered",
            facts=[
                ("checkpoint", model["name"]),
                ("digest", model["digest"]),
                ("", "MLflow knows nothing of it; `nst stylize --model models:/nst/VERSION` leaves a trace"),
            ],
        )
    children = [source]
    if origin.corpora:
        corpora = [_corpus_node(corpus) for corpus in origin.corpora]
        children.append(Node(title="trained on, as the bucket remembers", children=corpora))
    made_now, made_before = counts.get("done", 0), counts.get("done_before", 0)
    num_failed = counts.get("failed", 0) + counts.get("failed_before", 0)
    return Node(
        title=origin.out,
        facts=[
            ("source", record["arguments"]["source"]),
            ("pictures", _counts(made_now + made_before, num_failed)),
            ("last run", _period(record["started_at"], record["seconds"], _status_of(record["status"]))),
            ("settings", settings_line(record)),
            *(("style", style["uri"]) for style in record["styles"][:NUM_STYLES_NAMED]),
            ("code", _code(record["code"].get("commit", ""), record["code"]["digest"])),
            ("MLflow", told if model.get("version") is not None else ""),
        ],
        children=children,
    )


def corpus_tree(use: CorpusUse) -> Node:
    """A corpus, and what was trained on it."""
    children = []
    for trained in use.trainings:
        node = _training_node(trained.training, with_corpora=False)
        facts = [("registered", ", ".join(trained.versions) or "nothing of it")]
        if not trained.same:
            facts.append(("corpus", "it was another then: samples were added or changed since"))
        children.append(Node(title=node.title, facts=[*facts, *node.facts]))
    return Node(
        title=use.uri,
        facts=[
            ("corpus", f"{use.role}, {use.num_samples} samples"),
            ("digest", use.digest),
            ("", "" if children else "MLflow knows no training on it"),
        ],
        children=children,
    )


def _training_node(training: TrainingFacts, *, with_corpora: bool = True) -> Node:
    status = STATUSES.get(training.status, training.status.lower())
    deleted = "deleted in MLflow, and still in its trash" if training.is_deleted else ""
    num_workers = training.num_workers
    workers = f"{num_workers} worker{'' if num_workers == '1' else 's'}" if num_workers else ""
    corpora = [_corpus_node(corpus) for corpus in training.corpora] if with_corpora else []
    if with_corpora and not corpora:
        corpora = [Node(title="corpora", facts=[("", "none noted")])]
    return Node(
        title=f"training run {training.name}",
        facts=[
            ("run", training.run_id),
            ("", deleted),
            ("when", _period(training.started_at, training.seconds, status)),
            ("where", _listed(f"driver on {training.host}" if training.host else "", workers)),
            ("place", training.place),
            ("config", _config(training)),
            ("code", _code(training.commit, training.code_digest)),
        ],
        children=corpora,
    )


def _config(training: TrainingFacts) -> str:
    if not training.preset:
        return ""
    changes = [f"{key}={value}".replace(" ", "\u00a0") for key, value in training.changes.items()]
    more = len(changes) - NUM_CHANGES_SHOWN
    shown = ", ".join(changes[:NUM_CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    with_changes = f" with {shown}" if changes else ""
    return f"preset {training.preset}{with_changes}; digest {training.config_digest[:12]}"


def _corpus_node(corpus: CorpusFacts) -> Node:
    samples = f"{corpus.num_samples} samples" if corpus.num_samples is not None else corpus.problem
    return Node(
        title=f"{corpus.role} corpus {corpus.uri}", facts=[("digest", corpus.digest), ("holds", samples)]
    )


def _evaluation_node(evaluation: EvaluationFacts | None, without: str) -> Node:
    if evaluation is None:
        return Node(title="evaluation", facts=[("", without)])
    measured_on = ", ".join(
        f"{key} {str(value)[:12]}".replace(" ", "\u00a0")
        for key, value in evaluation.evaluation_set.items()
        if isinstance(value, str | int | float)
    )
    figures = [
        (name, f"{value['mean']:.3f}  ({value['low']:.3f} to {value['high']:.3f})")
        for name, value in evaluation.measures.items()
    ]
    return Node(
        title="evaluation",
        facts=[
            ("when", _when(evaluation.evaluated_at)),
            ("measured on", measured_on),
            *figures,
            ("report", evaluation.report),
        ],
    )


def _promotion_node(event: Event, version: int) -> Node:
    if event.to_version == version:
        before = f" in place of version {event.from_version}" if event.from_version else ", the first one"
        what = f"became the champion{before}"
    else:
        what = f"gave way to version {event.to_version}"
    notes = [event.kind, "forced" if event.grounds.is_forced else ""]
    notes.append(event.status if event.status != "done" else "")
    return Node(
        title=f"{_when(event.at)}  {what} ({_listed(*notes)})",
        facts=[("by", event.who), ("because", event.grounds.reason)],
    )


def _buckets_node(buckets: Sequence[BucketFacts], num_more: int) -> Node:
    children = [_bucket_node(bucket.use, bucket.problem) for bucket in buckets]
    if num_more:
        children.append(Node(title=f"and {num_more} more, older ones"))
    facts = [] if children else [("", "none noted")]
    return Node(title=f"stylized buckets ({len(buckets) + num_more})", facts=facts, children=children)


def _bucket_node(use: Use, problem: str) -> Node:
    status = STATUSES.get(use.status, use.status.lower())
    return Node(
        title=use.out,
        facts=[
            ("now", problem),
            ("source", use.source),
            ("pictures", _counts(use.num_done, use.num_failed)),
            ("last run", _period(use.started_at, use.seconds, status)),
            ("settings", use.settings),
            ("code", _code(use.code_commit, use.code_digest)),
        ],
    )


def _status_of(status: str) -> str:
    return STATUSES.get(STATUSES_OF_RECORD.get(status, ""), status)


def _counts(num_done: int, num_failed: int) -> str:
    return f"{num_done} stylized" + (f", {num_failed} failed" if num_failed else "")


def _code(commit: str, digest: str) -> str:
    known = commit if commit != "unknown" else ""
    return _listed(f"commit {known}" if known else "", f"digest {digest[:12]}" if digest else "")


def _when(time: str) -> str:
    """An ISO time in UTC, to the minute."""
    return f"{time[:16].replace('T', ' ')} UTC" if time else ""


def _period(began: str, seconds: float | None, status: str) -> str:
    took = "" if status == STATUSES["RUNNING"] or seconds is None else f"took {_duration(seconds)}"
    return _listed(_when(began), took, status)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
