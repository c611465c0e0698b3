"""The report of an evaluation: a page that stands alone, its figures as JSON, its pictures as a sheet."""

from __future__ import annotations

import json

from infra.evaluations import EVALUATION_FILE, REPORT_FILE
from nst.images import encode_jpeg
from pipelines.evaluation import Evaluation
from pipelines.evaluation_pictures import sheet, spread, standing_out, trade_off
from pipelines.evaluation_tables import differences, figures_table, findings
from pipelines.evaluation_verdict import verdicts
from pipelines.pages import fact_list, page, text

# What is plotted against what, where it was measured.
TRADE_OFFS = (("style_distance", "content_distance"), ("gram", "content_r31"))


FILES = ("grid.jpg", REPORT_FILE, EVALUATION_FILE)


def report_files(evaluation: Evaluation) -> dict[str, bytes]:
    """name -> bytes of FILES."""
    return {
        "grid.jpg": encode_jpeg(sheet(evaluation), quality=90),
        REPORT_FILE: _page(evaluation).encode(),
        EVALUATION_FILE: json.dumps(evaluation.as_json(), indent=2, sort_keys=True).encode(),
    }


def _page(evaluation: Evaluation) -> str:
    models, identity = evaluation.models, evaluation.identity
    names = " · ".join(model.name for model in models)
    num_contents, num_styles = (len(set(numbers)) for numbers in evaluation.chosen.pairs().values())
    facts = {
        **evaluation.facts,
        "Pairs": f"{identity['num_pairs']} of {num_contents} contents and {num_styles} styles, "
        f"{identity['size']} px, seed {identity['seed']}",
        "Evaluation set": f"{str(identity['digest'])[:16]} (contents {str(identity['content_digest'])[:12]}, "
        f"styles {str(identity['style_digest'])[:12]})",
    }
    return page(
        "evaluation.html",
        title=text(f"Evaluation of {names}"),
        num_models="One model" if len(models) == 1 else f"{len(models)} models",
        num_pairs=str(len(evaluation.chosen)),
        findings=findings(evaluation),
        facts=fact_list(facts),
        models="\n".join(
            f"<tr><td>{text(model.title)}</td><td><code>{text(model.name)}</code></td>"
            f"<td>{text(model.approach)}</td>"
            f'<td class="number">{model.num_parameters / 1e6:.2f} M</td>'
            f"<td><code>{text(model.digest[:16])}</code></td></tr>"
            for model in models
        ),
        verdicts=verdicts(evaluation),
        figures=figures_table(evaluation),
        trade_offs="\n".join(
            f'<figure class="plot"><img src="{trade_off(evaluation, style, content)}" '
            f'alt="{style} against {content} of all methods; the lower left is better"></figure>'
            for style, content in TRADE_OFFS
            if style in models[0].measures and content in models[0].measures
        ),
        differences=differences(evaluation),
        standing_out=standing_out(evaluation),
        first=text(models[0].title),
        spread=spread(evaluation),
    )
