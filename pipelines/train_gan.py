"""`nst train`: DDP training under Ray Train, as one MLflow run, resumed by its name."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from infra import cluster, places, storage, tracking
from nst.config import TrainConfig, to_dict
from nst.corpus import Corpus
from nst.presets import PRESETS, resolve_config
from nst.sampling import DynamicBatchSampler
from pipelines.console import Stage, interruptible, say
from pipelines.ray_training import Device, Workers, choose_workers, fit, publish_checkpoint
from pipelines.registration import register_checkpoint
from pipelines.train_worker import WorkerSettings


@dataclass(frozen=True, kw_only=True)
class Training:
    """One logical training: what is trained on what, and where it lives. Written to OUT/NAME/run.json, so
    that the same name goes on with the same thing, in the same MLflow run."""

    name: str
    out_uri: str
    config: TrainConfig
    content: Corpus
    style: Corpus

    @property
    def uri(self) -> str:
        return storage.join(self.out_uri, self.name)

    @property
    def checkpoint_uri(self) -> str:
        return storage.join(self.uri, "checkpoint")

    def identity(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.config),
            "content": {"uri": self.content.uri, "digest": self.content.manifest.digest},
            "style": {"uri": self.style.uri, "digest": self.style.manifest.digest},
        }


@click.command("train", cls=Stage)
@click.option("--content", "content_uri", required=True, metavar="CORPUS", help="Corpus of photos.")
@click.option("--style", "style_uri", required=True, metavar="CORPUS", help="Corpus of artworks.")
@click.option(
    "--preset", "preset_name", default="small", show_default=True, help=f"One of: {', '.join(PRESETS)}."
)
@click.option(
    "--out", "out_uri", required=True, metavar="URI", help="Where trainings live; a folder or s3://."
)
@click.option(
    "--name",
    default=None,
    metavar="RUN",
    help="Name of the training (default: the preset). The same name resumes.",
)
@click.option("--images", type=click.IntRange(min=1), help="Content images to train for, over all workers.")
@click.option(
    "--num-workers", type=click.IntRange(min=1), default=1, show_default=True, help="DDP processes."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="auto: GPUs if the cluster has any now; gpu: waits for them.",
)
@click.option(
    "--loader-workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decoding processes for each DDP process.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Change any field of the configuration.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Times that the workers may be restarted after a failure.",
)
@click.option(
    "--model",
    "model_name",
    default="nst",
    show_default=True,
    help="Name that the result is registered under.",
)
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
def train(
    content_uri: str,
    style_uri: str,
    preset_name: str,
    out_uri: str,
    name: str | None,
    images: int | None,
    num_workers: int,
    device: Device,
    loader_workers: int,
    assignments: tuple[str, ...],
    max_restarts: int,
    model_name: str,
    dry_run: bool,
) -> dict[str, Any]:
    """Train a model from a corpus of photos and a corpus of artworks.

    Runs DDP processes under Ray Train; a worker that dies is restarted from the last checkpoint. The story
    is one MLflow run, and the result a new version in the registry with the alias `challenger`.

    \b
    Examples:
      nst train --content corpora/photos --style corpora/paintings --preset smoke --out runs
      nst train --content s3://b/photos --style s3://b/paintings --preset main \\
          --out s3://b/runs --name first --num-workers 8
      nst train ... --set loss.bands=3 --set batch.size=128 --dry-run
    """
    config = resolve_config(preset_name, images, assignments)
    if dry_run:
        say(json.dumps(to_dict(config), indent=2))
        return {"config": to_dict(config)}
    if "/" in (name or "") or (name or "").startswith("."):
        raise ValueError(f"--name {name!r} must be a plain name, without slashes or a leading dot")
    training = Training(
        name=name or preset_name,
        out_uri=places.absolute(out_uri),
        config=config,
        content=open_corpus(content_uri, "content"),
        style=open_corpus(style_uri, "style"),
    )
    known = read_known_run(training)
    if known.get("status") == "FINISHED":
        say(f"{training.uri} is finished; another --name trains anew")
        return known["result"]
    # what only the workers would find out, after they have been paid for
    DynamicBatchSampler.for_corpora(training.content, training.style, config.batch, config.seed, num_workers)
    tracking.require_lasting_store()
    tracking.check()
    storage.check_access(training.uri)
    info = cluster.connect(min_cpus=num_workers)
    workers = choose_workers(info, device, num_workers, loader_workers, max_restarts)
    return run_training(training, known, workers, model_name)


def open_corpus(uri: str, role: str) -> Corpus:
    uri = places.absolute(uri)
    corpus = Corpus.open(uri, storage=storage.ObjectStorage() if storage.is_remote(uri) else None)
    if corpus.manifest.role != role:
        raise ValueError(
            f"{uri} is a {corpus.manifest.role} corpus; --{role} needs one sharded with --role {role}"
        )
    return corpus


def read_known_run(training: Training) -> dict[str, Any]:
    """What OUT/NAME/run.json says of an earlier start, {} if there was none.

    Raises:
        ValueError: the name belongs to a training of something else.
    """
    uri = storage.join(training.uri, "run.json")
    if not storage.exists(uri):
        return {}
    known = json.loads(storage.read_bytes(uri))
    for part, value in training.identity().items():
        if known["identity"][part] != value:
            raise ValueError(
                f"{training.uri} was started with another {part}; give this training another --name"
            )
    return known


def write_known_run(
    training: Training, run_id: str, status: str, result: dict[str, Any] | None = None
) -> None:
    record = {"identity": training.identity(), "run_id": run_id, "status": status, "result": result}
    storage.write_bytes(storage.join(training.uri, "run.json"), json.dumps(record, indent=2).encode())


def run_training(
    training: Training, known: dict[str, Any], workers: Workers, model_name: str
) -> dict[str, Any]:
    """Everything between a checked command line and a registered version."""
    run = tracking.TrackedRun.start(
        training.name,
        run_id=known.get("run_id"),
        tags={"nst.training": training.uri, "nst.commit": code_version()},
    )
    run.log_params({"num_workers": workers.num_workers, **to_dict(training.config)})
    run.log_dict(to_dict(training.config), "config.json")
    for role, corpus in (("content", training.content), ("style", training.style)):
        run.log_corpus(storage.name(corpus.uri), corpus.uri, corpus.manifest.digest, context=role)
    run.flush()
    write_known_run(training, run.run_id, "RUNNING")
    say(f"training {training.uri}: {workers.num_workers} x {'GPU' if workers.use_gpu else 'CPU'}")
    try:
        with interruptible():
            summary = fit_and_register(training, run.run_id, workers, model_name)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        run.finish(status)
        write_known_run(training, run.run_id, status)
        raise
    run.finish("FINISHED")
    write_known_run(training, run.run_id, "FINISHED", summary)
    say(f"checkpoint  {summary['checkpoint']}")
    say(f"registered  {summary['model']} (alias challenger)")
    say(f"run         {run.run_id} in {tracking.shown(tracking.tracking_uri())}")
    return summary


def fit_and_register(training: Training, run_id: str, workers: Workers, model_name: str) -> dict[str, Any]:
    tracking_uri = tracking.tracking_uri()
    settings = WorkerSettings(
        identity=training.identity(),
        run_id=run_id,
        # Ray shows a run's settings to whoever sees its dashboard: an address with a password stays out, the
        # workers have it in their own environment
        tracking_uri=tracking_uri if tracking.shown(tracking_uri) == tracking_uri else None,
        num_loader_workers=workers.num_loader_workers,
    )
    result = fit(training.uri, settings, workers)
    publish_checkpoint(result, training.checkpoint_uri)
    version = register_checkpoint(training.checkpoint_uri, run_id=run_id, model_name=model_name)
    return {
        "run_id": run_id,
        "checkpoint": training.checkpoint_uri,
        "model": f"models:/{model_name}/{version}",
        "version": version,
        "num_images_seen": int((result.metrics or {}).get("num_images_seen", 0)),
    }


def code_version() -> str:
    """The commit of the working tree, "unknown" outside of one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    train()
