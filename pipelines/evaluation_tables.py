"""The tables of an evaluation's page: findings, figures and differences, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation import EvaluatedModel, Evaluation, title_of
from pipelines.measures import HEADINGS, MEASURES, Comparison, Outcome, Summary, best_of, compare
from pipelines.pages import text

SIGNS: dict[Outcome, str] = {"better": "yes", "worse": "no", "undecided": "open"}
# Of one model: the question, the measure that answers it, and the baseline that it must beat.
QUESTIONS = (
    ("Takes on the style", "style_distance", "content"),
    ("Does more than moving colours", "style_distance", "color_transfer"),
    ("Shows the artist's manner more than moved colours do", "artist_top1", "color_transfer"),
    ("Keeps the content", "content_distance", "style"),
    ("Keeps edges", "edge_ssim", "style"),
    ("Has no more grids than a photograph", "checkerboard", "content"),
)


def findings(evaluation: Evaluation) -> str:
    """Cards, one a model: what the intervals say, in words."""
    return "\n".join(_card(evaluation, model) for model in evaluation.models)


def _card(evaluation: Evaluation, model: EvaluatedModel) -> str:
    lines = []
    first = evaluation.models[0]
    if model is not first:
        lines += _against_first(evaluation, model)
    for question, name, baseline in QUESTIONS:
        found = compare(name, model.measures, evaluation.baselines[baseline], evaluation.chosen.pairs())
        if found is not None:
            # more grids than a photograph is the question, fewer is no merit
            is_fine = name == "checkerboard" and found.outcome == "undecided"
            sign = "yes" if is_fine else SIGNS[found.outcome]
            lines.append(
                _finding(sign, question, found, model.measures, evaluation.baselines[baseline], baseline)
            )
    head = f"{text(model.title)} <code>{text(model.name)}</code>"
    return f'<section class="card"><h3>{head}</h3><ul class="findings">{"".join(lines)}</ul></section>'


def _against_first(evaluation: Evaluation, model: EvaluatedModel) -> list[str]:
    """How the model does beside the first one, by the two figures that matter and by count."""
    first, pairs = evaluation.models[0], evaluation.chosen.pairs()
    lines = []
    for question, name in (
        ("Closer to the style", "style_distance"),
        ("Closer to the content", "content_distance"),
    ):
        found = compare(name, model.measures, first.measures, pairs)
        if found is not None:
            lines.append(
                _finding(
                    SIGNS[found.outcome],
                    f"{question} than {first.title}",
                    found,
                    model.measures,
                    first.measures,
                    first.title,
                )
            )
    return lines


def _finding(
    sign: str, question: str, found: Comparison, measures: Summary, reference: Summary, other: str
) -> str:
    name = found.measure
    figures = (
        f"{name} {_number(measures[name]['mean'])}, {title_of(other)} {_number(reference[name]['mean'])}; "
        f"difference {_interval_text(found)}"
    )
    return (
        f'<li><span class="sign {sign}">{sign}</span><span>{text(question)}'
        f'<span class="quiet small figures">{text(figures)}</span></span></li>'
    )


def figures_table(evaluation: Evaluation) -> str:
    """A row a measure, a column a method: mean and interval; the best of each row is marked."""
    summaries = evaluation.summaries
    heads = "".join(f'<th class="number" scope="col">{text(title_of(method))}</th>' for method in summaries)
    rows = []
    for about, heading in HEADINGS.items():
        names = [name for name in MEASURES if name in evaluation.models[0].measures]
        names = [name for name in names if MEASURES[name].about == about]
        if names:
            rows.append(
                f'<tr class="section"><th colspan="{len(summaries) + 1}" scope="colgroup">{heading}</th></tr>'
            )
            rows += [_figures_row(name, summaries) for name in names]
    return (
        f'<table><thead><tr><th scope="col">Measure</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _figures_row(name: str, summaries: dict[str, Summary]) -> str:
    measure, best = MEASURES[name], best_of(name, summaries)
    cells = []
    for method, found in summaries.items():
        entry = found[name]
        kind = "best" if method == best else "trivial" if method in measure.trivial else ""
        mark = ' <span class="star" title="best of the row">★</span>' if method == best else ""
        cells.append(
            f'<td class="number {kind}"><span>{_number(entry["mean"])}{mark}</span>'
            f'<span class="quiet small">{_number(entry["low"])} – {_number(entry["high"])}</span></td>'
        )
    arrow = "↓ lower is better" if measure.lower_is_better else "↑ higher is better"
    return (
        f'<tr><th scope="row"><code>{text(name)}</code> <span class="quiet small">{arrow}</span>'
        f'<span class="quiet small meaning">{text(measure.meaning)}</span></th>{"".join(cells)}</tr>'
    )


def differences(evaluation: Evaluation) -> str:
    """Forest plots of paired differences: the other models beside the first one, then each model beside the
    baselines that are its rivals. The better side is always the right one."""
    first, *others = evaluation.models
    parts = []
    if others:
        rows = []
        for name in MEASURES:
            found = {f"{one.title} − {first.title}": (one.measures, first.measures) for one in others}
            rows += _forest_rows(evaluation, name, found)
        parts.append(_forest(f"Beside {first.title}", rows))
    for model in evaluation.models:
        rows = []
        for name, measure in MEASURES.items():
            found = {
                f"{model.title} − {title_of(baseline)}": (model.measures, measures)
                for baseline, measures in evaluation.baselines.items()
                if baseline not in measure.trivial
            }
            rows += _forest_rows(evaluation, name, found)
        parts.append(_forest(f"{model.title} beside the baselines", rows))
    return "\n".join(parts)


def _forest(heading: str, rows: Sequence[str]) -> str:
    return (
        f"<h3>{text(_capital(heading))}</h3>"
        '<div class="scroll"><table class="forest"><thead><tr><th>Measure</th>'
        '<th>Difference</th><th class="axis"><span>worse</span><span>better</span></th>'
        '<th class="number">Mean and 95% interval</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _forest_rows(evaluation: Evaluation, name: str, sides: dict[str, tuple[Summary, Summary]]) -> list[str]:
    """A row for each of `sides` that was measured; one scale for all of them, with 0 in the middle."""
    pairs = evaluation.chosen.pairs()
    compared = {title: compare(name, found, reference, pairs) for title, (found, reference) in sides.items()}
    comparisons = {title: one for title, one in compared.items() if one is not None}
    bounds = [abs(bound) for one in comparisons.values() for bound in (one.interval.low, one.interval.high)]
    scale = 1.08 * max(bounds, default=0) or 1.0
    rows = []
    for number, (title, one) in enumerate(comparisons.items()):
        sign = -1 if MEASURES[name].lower_is_better else 1
        middle = _percent(sign * one.interval.mean, scale)
        left, right = sorted(_percent(sign * bound, scale) for bound in (one.interval.low, one.interval.high))
        head = f"<code>{text(name)}</code>" if not number else ""
        rows.append(
            f'<tr class="{one.outcome}{" further" if number else ""}"><th scope="row">{head}</th>'
            f'<td class="quiet small">{text(title)}</td>'
            f'<td class="axis"><div class="track" role="img" aria-label="{one.outcome}">'
            f'<i style="left:{left:.1f}%;width:{right - left:.1f}%"></i><b style="left:{middle:.1f}%"></b>'
            f'</div></td><td class="number">{text(_interval_text(one))}</td></tr>'
        )
    return rows


def _capital(heading: str) -> str:
    return heading[:1].upper() + heading[1:]


def _percent(value: float, scale: float) -> float:
    return 50 + 50 * value / scale


def _interval_text(found: Comparison) -> str:
    mean, low, high = (
        _number(value, "+.3f") for value in (found.interval.mean, found.interval.low, found.interval.high)
    )
    return f"{mean} [{low}, {high}]"


def _number(value: float, how: str = ".3f") -> str:
    """With the minus sign of print, which is as wide as the plus."""
    return format(value, how).replace("-", "−")
