"""The model card: what a person wants to know of a registered model before using it. It says what was
recorded, and "unknown" where nothing was."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.training_runs import CorpusInput, TrainingRun
from nst.config import TrainConfig, to_dict
from nst.manifest import MANIFEST_NAME, Manifest
from nst.pictures import MIN_SIDE
from nst.stylize import MAX_STYLE_SIDE
from pipelines.training_facts import closest_preset, flattened, read_all

UNKNOWN = "unknown"
FIGURES = ("preview/", "generator/", "encoder/", "discriminator/")  # what a training is judged by
MAX_LABELS = 12


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made from.

    Attributes:
        num_images_seen: content images; None if the checkpoint does not say.
        run: the training; None for a checkpoint that was registered without one.
        golden: what `golden.json` says.
    """

    model_name: str
    digest: str
    checkpoint_uri: str
    config: TrainConfig
    num_parameters: int
    num_images_seen: int | None
    run: TrainingRun | None
    golden: Mapping[str, Any]

    @property
    def figures(self) -> Mapping[str, float]:
        """The last ones of that run."""
        return self.run.metrics if self.run else {}


def model_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    return "\n\n".join(
        [
            f"# {facts.model_name}: artistic style transfer",
            "Draws any content picture in the manner of any style picture, in one pass.",
            _use(facts.model_name),
            "## What it is",
            _table(_identity(facts)),
            "## Data",
            _data(facts.run.corpora if facts.run else ()),
            "## Training",
            _table(_training(facts)),
            _figures(facts.figures),
            _measures(facts.model_name),
            _limits(facts),
            LICENCE,
            _checks(facts.golden),
            "",
        ]
    )


def _use(name: str) -> str:
    return f"""## Use

```
nst stylize photos painted --style painting.jpg --model models:/{name}/VERSION
mlflow models serve -m models:/{name}/VERSION --env-manager local
```

A row has the columns `content` and `style`, the bytes of a picture file each (base64 in JSON). Parameters:
`strength` 0 to 1, `colors` "style" or "content", `max_side` in px (0: as large as the content). The answer's
column `stylized` holds PNG bytes."""


def _identity(facts: CardFacts) -> list[tuple[str, str]]:
    return [
        ("digest", f"`{facts.digest}`"),
        ("network", f"{facts.config.model.kind}, {facts.num_parameters:,} parameters, fp32 safetensors"),
        ("checkpoint", facts.checkpoint_uri),
        ("registered", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"),
    ]


def _data(corpora: Iterable[CorpusInput]) -> str:
    known = sorted(corpora, key=lambda corpus: corpus.role)
    if not known:
        return f"The corpora that it was trained on are {UNKNOWN}: no training run was recorded with it."
    manifests = read_all(storage.join(corpus.uri, MANIFEST_NAME) for corpus in known)
    parts = []
    for corpus, data in zip(known, manifests, strict=True):
        rows = [("corpus", corpus.uri), ("digest", f"`{corpus.digest}`")]
        parts.append(f"**{corpus.role.capitalize()}**\n\n" + _table(rows + _contents(corpus, data)))
    return "\n\n".join(parts)


def _contents(corpus: CorpusInput, data: bytes | str) -> list[tuple[str, str]]:
    """What the corpus holds, as its manifest says; `data` is the manifest, or why it cannot be read."""
    problem = data if isinstance(data, str) else ""
    if isinstance(data, bytes):
        try:
            manifest = Manifest.from_json(data)
            if manifest.digest == corpus.digest:
                return [
                    ("images", f"{manifest.num_samples:,}, shorter side {manifest.image_size} px"),
                    ("labels", _labels(manifest.labels)),
                    ("made from", manifest.source or UNKNOWN),
                ]
            problem = "it has changed since the training"
        except (OSError, ValueError) as error:
            problem = str(error)
    return [("images, labels, source", f"{UNKNOWN} ({problem})")]


def _labels(labels: Mapping[str, int]) -> str:
    largest = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{name or 'none'} {number:,}" for name, number in largest[:MAX_LABELS])
    more = len(labels) - MAX_LABELS
    return f"{len(labels)}: {listed}" + (f" and {more} more" if more > 0 else "")


def _training(facts: CardFacts) -> list[tuple[str, str]]:
    config, run = facts.config, facts.run
    preset, changes = closest_preset(flattened(to_dict(config)))
    tags = run.tags if run else {}
    seen = UNKNOWN if facts.num_images_seen is None else f"{facts.num_images_seen:,}"
    rows = [
        ("run", f"{run.name}, `{run.run_id}`" if run else UNKNOWN),
        ("configuration", f"nearest to the preset {preset}" + (", but " if changes else "")),
        ("content images seen", f"{seen} of {config.num_images:,}"),
        ("crops", f"{', '.join(map(str, config.batch.sizes or (config.batch.size,)))} px"),
        ("precision", config.precision),
        ("hardware", _hardware(facts)),
        ("wall clock", _duration(run)),
        ("restarts", tags.get("nst.restarts", UNKNOWN)),
        ("commit", tags.get("nst.commit") or UNKNOWN),
        ("code digest", tags.get("nst.code") or UNKNOWN),
    ]
    if changes:
        listed = ", ".join(f"`{key}={value}`" for key, value in sorted(changes.items()))
        rows[1] = ("configuration", f"the preset {preset} with {listed}")
    return rows


def _hardware(facts: CardFacts) -> str:
    """As far as the run tells: its figures name nodes, and GPUs where their library was installed."""
    if facts.run is None:
        return UNKNOWN
    workers = f"workers {facts.run.params.get('num_workers', UNKNOWN)}"
    names = [name.split("/") for name in facts.figures if name.startswith("system/node_")]
    if not names:
        return f"{workers}, nodes {UNKNOWN}"
    has_gpu = any(name[-1].startswith("gpu") for name in names)
    num_nodes = len({node for _, node, *_ in names})
    return f"{workers}, nodes {num_nodes}, {'with GPUs' if has_gpu else 'no GPU was reported'}"


def _duration(run: TrainingRun | None) -> str:
    """From the run's start until now: the run ends when its model is registered."""
    if run is None:
        return UNKNOWN
    ended = run.ended_at or datetime.datetime.now(datetime.UTC)
    duration = datetime.timedelta(seconds=round((ended - run.started_at).total_seconds()))
    return f"{duration} (h:mm:ss), interruptions included"


def _figures(figures: Mapping[str, float]) -> str:
    rows = [(f"`{name}`", f"{figures[name]:.4g}") for name in sorted(figures) if name.startswith(FIGURES)]
    if not rows:
        return f"Its last figures are {UNKNOWN}."
    return "Its last figures, of training batches (`preview/`: of a few pictures of the corpora):\n\n" + (
        _table(rows)
    )


def _measures(name: str) -> str:
    return f"""## Measures

None when it was registered. `nst evaluate models:/{name}/VERSION` keeps its measures with the version (tags
and figures of its run), and `nst history` shows those that it was promoted with."""


def _limits(facts: CardFacts) -> str:
    sizes = facts.config.batch.sizes or (facts.config.batch.size,)
    return f"""## Limits

- It saw crops of {", ".join(map(str, sizes))} px: strokes larger than those were not learned.
- Pictures have {MIN_SIDE} px or more a side. A style's shorter side is reduced to {MAX_STYLE_SIDE} px.
- Contents and styles that its corpora hold nothing of may come out worse; nothing here says how much.
- It keeps no promise about faces, text or small objects."""


LICENCE = f"""## Licence

The code that travels with it: Apache 2.0. The weights: {UNKNOWN}. They were learned from the corpora above
and follow the rights in those pictures, which a corpus does not record: whoever passes this model on, or what
it draws, has to know them."""


def _checks(golden: Mapping[str, Any]) -> str:
    with_ = golden["drawn_with"]
    return f"""## Checks when it is loaded

The digest of weights and configuration, and {len(golden["pairs"])} golden pairs (`artifacts/golden`), drawn
with PyTorch {with_["torch"]} on {with_["device"]}: drawn again in fp32, none may differ by more than
{golden["tolerance"]:g} levels of 255 on average. `nst` also checks every file against `files.json` when it
fetches the model; a server that loads it does not, and runs the code in `code/` unchecked."""


def num_images_seen(checkpoint_uri: str) -> int | None:
    """What the checkpoint's state says; None if it has none (a published half has none)."""
    try:
        return int(
            json.loads(storage.read_bytes(storage.join(checkpoint_uri, "state.json")))["num_images_seen"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {' '.join(value.split()).replace('|', '&#124;')} |" for key, value in rows]
    return "\n".join(lines)
