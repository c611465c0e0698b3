"""`nst evaluate`: models' figures beside those of doing nothing, copying the style and moving colours."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from infra import places, registry
from infra.evaluations import REPORT_FILE
from infra.registry import RegisteredVersion
from nst.checkpoint import read_config
from nst.intervals import MIN_GROUPS, summarize
from nst.metrics import MEASURES_VERSION, MIN_SIDE, STRIDE
from nst.networks.blocks import num_parameters
from nst.stylize import Stylizer
from nst.vgg import VGGFeatures, load_vgg
from pipelines.artist_judge import ArtistJudge, judge_identity, train_judge
from pipelines.console import Progress, Stage, say
from pipelines.evaluation import MAX_MODELS, EvaluatedModel, Evaluation, model_title, title_of
from pipelines.evaluation_record import Kept, find_files, record, write_files
from pipelines.evaluation_report import report_files
from pipelines.evaluation_set import NUM_PAIRS, SEED, SIZE, EvaluationSet, Identity
from pipelines.evaluation_verdict import lineage
from pipelines.lineage import code_digest
from pipelines.measure_models import Measured, baseline_method, measure, model_method
from pipelines.measures import BASELINE_TITLES, MEASURES, Summary
from pipelines.models import ResolvedModel, resolve_model
from pipelines.published_set import find_or_make_set
from pipelines.seen_pictures import seen_pictures, unknown
from pipelines.training_record import code_version

MIN_SIZE = MIN_SIDE + STRIDE  # px; a picture is also moved by a few


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is evaluated, and what the registry knows of it: asked before the measuring, which may
    take longer than the registry is there."""

    model: ResolvedModel
    version: RegisteredVersion | None
    seen: Mapping[str, Any]
    lineage: Mapping[str, str]


@click.command("evaluate", cls=Stage)
@click.argument("model", metavar="MODEL")
@click.argument("others", nargs=-1, metavar="[MODEL]...")
@click.option("--content", "content_uri", metavar="URI", help="Corpus or folder of photos.")
@click.option("--style", "style_uri", metavar="URI", help="Corpus or folder of artworks.")
@click.option("--report", "report_uri", required=True, metavar="DIR", help="Where the report is written.")
@click.option("--evaluation-set", "set_uri", metavar="URI", help="Pairs kept as files: made or used.")
@click.option("--pairs", type=click.IntRange(min=2), show_default=str(NUM_PAIRS), help="How many.")
@click.option("--size", type=click.IntRange(min=MIN_SIZE), show_default=str(SIZE), help="Side in px.")
@click.option("--seed", type=int, show_default=str(SEED), help="Chooses the pairs.")
@click.option("--artists", "artists_uri", metavar="CORPUS", help="Labelled works: is the artist recognised?")
@click.option("--vgg", "vgg_path", metavar="FILE", help="VGG-19 as safetensors: adds its measures.")
@click.option(
    "--model-name",
    default=registry.DEFAULT_MODEL,
    show_default=True,
    help="For a MODEL that is a number.",
)
def evaluate(
    model: str,
    others: tuple[str, ...],
    content_uri: str | None,
    style_uri: str | None,
    report_uri: str,
    set_uri: str | None,
    pairs: int | None,
    size: int | None,
    seed: int | None,
    artists_uri: str | None,
    vgg_path: str | None,
    model_name: str,
) -> dict[str, Any]:
    """Measure MODEL on fixed pairs of content and style, beside three baselines.

    Several MODELs stand side by side in one report, with their differences to the first. The same pictures,
    pairs, size and seed give the same pairs, so that models can be compared. Read content and style figures
    together: the unchanged content has the best content figures, the copied style the best style figures.
    DIR gets report.html, evaluation.json and grid.jpg. Of a registered version all of it is kept with it, for
    `nst promote`. If MLflow is away by then, the same command records what lies in DIR.

    --evaluation-set publishes the pairs where there are none yet; from then on they are used as they lie
    there, and --content and --style need not be given. --artists trains an encoder on labelled works (some
    minutes) and adds artist_top1: is a picture taken for one by the artist of its style? Labels of style
    pictures are those of their corpus, or the names of their folders.

    \b
    Examples:
      nst evaluate models:/nst@challenger --content held-out/photos --style held-out/art --report report
      nst evaluate runs/first/checkpoint --content s3://data/content --style s3://data/style --report report
      nst evaluate 4 --evaluation-set s3://data/pairs-1 --content held-out/photos --style held-out/art \\
          --artists corpora/style --report report
      nst evaluate models:/nst@challenger models:/nst@champion --evaluation-set s3://data/pairs-1 --report r
    """
    vgg = load_vgg(vgg_path) if vgg_path else None
    names = [f"models:/{model_name}/{name}" if name.isdecimal() else name for name in (model, *others)]
    resolved = _resolve(names)
    chosen = find_or_make_set(set_uri, content_uri, style_uri, pairs, size, seed)
    if len(chosen) < (pairs or NUM_PAIRS) and set_uri is None:
        say(f"there are only {len(chosen)} different pairs; all of them are measured")
    for side, numbers in chosen.pairs().items():
        if (num := len(set(numbers))) < MIN_GROUPS:
            say(
                f"only {num} {side}{'s' if num > 1 else ''}: how figures would move with others cannot be "
                f"told, and no interval is to be trusted; give {MIN_GROUPS} or more"
            )
    subjects = [_subject(name, one, chosen) for name, one in zip(names, resolved, strict=True)]
    identity, code = _identity(chosen, vgg, artists_uri), code_digest()
    known = [{"model_digest": one.model.digest, "seen": one.seen} for one in subjects]
    found = find_files(report_uri, identity, code, known)
    report = places.join(report_uri, REPORT_FILE)
    if found is not None:
        kept, files = found
        say(f"report    {report}: it is there already, nothing is measured again")
    else:
        judge = train_judge(artists_uri, chosen) if artists_uri else None
        sources = {
            "Contents": content_uri,
            "Styles": style_uri,
            "Pairs kept at": set_uri,
            "Artists": artists_uri,
        }
        facts = _facts(sources, judge, identity, code)
        evaluation = _measured(chosen, subjects, vgg, judge, identity, code, facts)
        kept, files = [evaluation.kept(one) for one in evaluation.models], report_files(evaluation)
        write_files(files, report_uri)
        say(f"report    {report}")
    _print_table(kept)
    recorded = record([one.version for one in subjects], kept, files, report_uri)
    return _result(resolved, kept, report, recorded)


def _resolve(names: Sequence[str]) -> list[ResolvedModel]:
    if len(names) > MAX_MODELS:
        raise ValueError(f"{len(names)} models are too many for one report; give {MAX_MODELS} at most")
    resolved: dict[str, ResolvedModel] = {}
    for name in names:
        found = resolve_model(name)
        if found.digest in resolved:
            raise ValueError(
                f"{resolved[found.digest].name} and {found.name} are the same model (digest "
                f"{found.digest[:12]}); name each model once"
            )
        resolved[found.digest] = found
    return list(resolved.values())


def _identity(chosen: EvaluationSet, vgg: VGGFeatures | None, artists_uri: str | None) -> Identity:
    """What makes figures comparable: the pairs, and all that measures them."""
    nobody: Identity = {"artists_digest": None, "artists_training": None}
    return {
        **chosen.identity(),
        "measures_version": MEASURES_VERSION,
        "vgg_digest": vgg.digest if vgg else None,
        **(judge_identity(artists_uri) if artists_uri else nobody),
    }


def _measured(
    chosen: EvaluationSet,
    subjects: Sequence[Subject],
    vgg: VGGFeatures | None,
    judge: ArtistJudge | None,
    identity: Identity,
    code: str,
    facts: Mapping[str, object],
) -> Evaluation:
    pairs = chosen.pairs()

    def summary(measured: Measured) -> Summary:
        ordered = {name: measured.figures[name] for name in MEASURES if name in measured.figures}
        shares = [name for name in ordered if MEASURES[name].is_share]
        return summarize(ordered, pairs, measured.own_pairs, shares)

    models = []
    total = len(chosen) * (len(subjects) + len(BASELINE_TITLES))
    with Progress("evaluate", total=total, unit="pair") as progress:
        baselines = {
            name: summary(measure(chosen, baseline_method(name), progress, vgg=vgg, judge=judge))
            for name in BASELINE_TITLES
        }
        for number, subject in enumerate(subjects):
            one = subject.model
            stylizer = Stylizer.load(one.checkpoint_dir)
            measured = measure(chosen, model_method(stylizer), progress, vgg=vgg, judge=judge)
            models.append(
                EvaluatedModel(
                    title=model_title(number, len(subjects)),
                    name=_shown(one),
                    digest=one.digest,
                    approach=read_config(one.checkpoint_dir).model.kind,
                    num_parameters=num_parameters(stylizer.generator),
                    measures=summary(measured),
                    pictures=measured.pictures,
                    seen=subject.seen,
                    aliases=subject.version.aliases if subject.version else (),
                    lineage=subject.lineage,
                )
            )
    return Evaluation(
        chosen=chosen, models=models, baselines=baselines, identity=identity, code_digest=code, facts=facts
    )


def _shown(model: ResolvedModel) -> str:
    """A report travels: of a folder on this machine it names the last two parts, such as first/checkpoint."""
    if model.version is not None or places.is_remote(model.name):
        return model.name
    return "/".join(places.absolute(model.name).split("/")[-2:])


def _facts(
    sources: Mapping[str, str | None], judge: ArtistJudge | None, identity: Identity, code: str
) -> dict[str, object]:
    """Where the pictures are from, in words that mean something elsewhere, and what measured them."""
    facts: dict[str, object] = {
        what: uri if places.is_remote(uri) else places.name(uri) for what, uri in sources.items() if uri
    }
    if judge is not None:
        facts["Artists"] = (
            f"{facts['Artists']} ({str(identity['artists_digest'])[:12]}); "
            f"top-1 of real works {judge.accuracy:.2f}; {len(judge.rows)} pairs have a known artist"
        )
    weights = f", VGG-19 {str(identity['vgg_digest'])[:12]}" if identity["vgg_digest"] else ""
    facts["Measures"] = f"version {MEASURES_VERSION}{weights}"
    version = importlib.metadata.version("nst")
    facts["Code"] = f"nst {version}, commit {code_version()[:12]}, sources {code[:12]}"
    facts["Measured"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return facts


def _subject(name: str, model: ResolvedModel, chosen: EvaluationSet) -> Subject:
    version = None
    if model.version is not None:
        match = re.match(r"models:/([^/@]+)", name)
        assert match is not None, name
        version = registry.get_version(match[1], model.version)
    return Subject(model=model, version=version, seen=_seen(version, chosen), lineage=lineage(version))


def _seen(version: RegisteredVersion | None, chosen: EvaluationSet) -> dict[str, Any]:
    """Which of the pictures it was trained on; what is to be said of it is said."""
    if version is None:
        return unknown("it is not registered")
    seen = seen_pictures(version, chosen)
    if seen["unknown"]:
        say(f"whether {version} was trained on these pictures cannot be told: {seen['unknown']}")
    elif seen["pictures"]:
        say(
            f"{version} was trained on {seen['content']} of these contents and {seen['style']} of these "
            f"styles ({seen['pictures'][0]})"
        )
    return seen


def _result(
    resolved: Sequence[ResolvedModel], kept: Sequence[Kept], report: str, recorded: Sequence[str | None]
) -> dict[str, Any]:
    """What the verb prints: means and intervals; the figures of single pairs are in evaluation.json."""

    def short(measures: Summary) -> dict[str, dict[str, float]]:
        return {
            name: {key: found[key] for key in ("mean", "low", "high")} for name, found in measures.items()
        }

    models = [
        {
            "model": one.name,
            "recorded": where,
            "model_digest": one.digest,
            "measures": short(found["measures"]),
        }
        for one, found, where in zip(resolved, kept, recorded, strict=True)
    ]
    return {
        **models[0],
        "report": report,
        "baselines": {name: short(found) for name, found in kept[0]["baselines"].items()},
        "evaluation_set": kept[0]["evaluation_set"],
        **({"models": models} if len(models) > 1 else {}),
    }


def _print_table(kept: Sequence[Kept]) -> None:
    titles = [model_title(number, len(kept)) for number in range(len(kept))]
    summaries = dict(zip(titles, (one["measures"] for one in kept), strict=True)) | kept[0]["baselines"]
    heads = "".join(f"  {title_of(method):>{24 if method in titles else 18}}" for method in summaries)
    say(f"{'':18}{heads}")
    for name in (name for name in MEASURES if name in kept[0]["measures"]):
        better = "lower" if MEASURES[name].lower_is_better else "higher"
        cells = ""
        for method, found in summaries.items():
            entry = found[name]
            interval = f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
            cells += f"  {interval:>24}" if method in titles else f"  {entry['mean']:>18.3f}"
        say(f"{name:18}{cells}   {better} is better")


if __name__ == "__main__":
    evaluate()
