"""What a release needs of an evaluation's page: where each model comes from, and what the gate says of it."""

from __future__ import annotations

from infra import places, registry, training_runs
from infra.registry import RegisteredVersion
from pipelines.evaluation import EvaluatedModel, Evaluation
from pipelines.gate import Gate, load_gate
from pipelines.pages import fact_list, text


def lineage(version: RegisteredVersion | None) -> dict[str, str]:
    """Version, run, corpora and code of a registered version, in words; nothing of another model."""
    if version is None:
        return {}
    facts = {"Version": " @".join((str(version), *version.aliases))}
    run = training_runs.find_run(version.run_id) if version.run_id else None
    if run is None:
        return {**facts, "Run": "MLflow has nothing of it any more"}
    if not run.is_training:
        return {**facts, "Run": f"{run.run_id}, which holds a checkpoint and no training"}
    for corpus in sorted(run.corpora, key=lambda corpus: corpus.role):
        where = corpus.uri if places.is_remote(corpus.uri) else places.name(corpus.uri)
        facts[f"Trained on, {corpus.role}"] = f"{where}, digest {corpus.digest[:16]}"
    sources, commit = (run.tags.get(tag, "unknown")[:12] for tag in ("nst.code", "nst.commit"))
    facts["Run"] = f"{run.name} {run.run_id}"
    return {**facts, "Code of the training": f"commit {commit}, sources {sources}"}


def verdicts(evaluation: Evaluation) -> str:
    """Cards, one a model: every rule of the gate that comes with this package, and the model's lineage. The
    champion's figures count if it was measured here."""
    gate = load_gate()
    return "\n".join(_card(evaluation, model, gate) for model in evaluation.models)


def _card(evaluation: Evaluation, model: EvaluatedModel, gate: Gate) -> str:
    champions = [
        other for other in evaluation.models if other is not model and registry.CHAMPION in other.aliases
    ]
    champion = evaluation.kept(champions[0]) if champions else None
    lines = [_seen_line(model)]
    try:
        findings = gate.check(evaluation.kept(model), champion)
        lines += [(finding.passed, str(finding)) for finding in findings]
    except ValueError as error:
        lines.append((False, str(error)))
    num_refused = sum(not passed for passed, _ in lines)
    verdict = f"refused by {num_refused} of {len(lines)}" if num_refused else f"passes all {len(lines)}"
    beside = f"beside {champions[0].title}, the champion" if champions else "without a champion beside it"
    items = "".join(
        f'<li><span class="sign {"yes" if passed else "no"}">{"ok" if passed else "NO"}</span>'
        f"<span>{text(line)}</span></li>"
        for passed, line in lines
    )
    facts = f'<dl class="facts">{fact_list(model.lineage)}</dl>' if model.lineage else ""
    return (
        f'<section class="card"><h3>{text(model.title)} <code>{text(model.name)}</code> {verdict} '
        f'<span class="small quiet">{text(beside)}</span></h3>'
        f'<ul class="findings">{items}</ul>{facts}</section>'
    )


def _seen_line(model: EvaluatedModel) -> tuple[bool, str]:
    seen = model.seen
    if seen["unknown"]:
        return False, f"whether it was trained on these pictures cannot be told: {seen['unknown']}"
    if seen["pictures"]:
        what = f"{seen['content']} of these contents and {seen['style']} of these styles"
        return False, f"it was trained on {what}"
    return True, "it was trained on none of these pictures"
