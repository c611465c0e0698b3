"""`nst train`: DDP training under Ray Train, as one MLflow run, resumed by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from infra import cluster, places, scratch, storage, tracking, tracking_server
from infra.cluster_nodes import living_nodes
from nst.checkpoint import CONFIG_FILE
from nst.config import to_dict
from nst.corpus import Corpus
from nst.presets import PRESETS, resolve_config
from pipelines import preflight
from pipelines.checkpoint_store import CheckpointStore, StoredCheckpoint
from pipelines.console import Stage, StageFailed, interruptible, say
from pipelines.ray_training import Workers, fit, patiently
from pipelines.registration import register_checkpoint, wait_for_mlflow
from pipelines.train_worker import WorkerSettings
from pipelines.training_claim import Overtaken, TrainingClaim
from pipelines.training_record import Training
from pipelines.training_run import check_tracking, send_left, shareable_tracking_uri, start_run, tell_end

Device = Literal["auto", "cpu", "gpu"]


class WorkerRange(click.ParamType):
    """`4` or `2:8` -> (least, most)."""

    name = "N|MIN:MAX"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(":")]
            least, most = numbers * 2 if len(numbers) == 1 else numbers
        except ValueError:
            least = most = 0
        if not 1 <= least <= most:
            self.fail(f"{value!r} is no number of workers; give 4, or 2:8 for two to eight", param, ctx)
        return least, most


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
    "--num-workers",
    type=WorkerRange(),
    default="1",
    show_default=True,
    help="DDP processes: 4, or 2:8 for as many of them as the cluster has room for.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="auto: GPUs if the cluster has any now.",
)
@click.option(
    "--wait-for-nodes",
    "wait_for_nodes_s",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="How long an autoscaler may take to bring nodes that are not there yet (default: they must be).",
)
@click.option(
    "--loader-workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decoding processes for each DDP process.",
)
@click.option(
    "--threads",
    "num_threads",
    type=click.IntRange(min=1),
    help="CPU threads of each DDP process (default: the CPUs shared among them). Kept when it resumes.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Change any field of the configuration.",
)
@click.option(
    "--checkpoint-seconds",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    help="At most so long between checkpoints, beside those of the configuration.",
)
@click.option(
    "--hang-timeout",
    "hang_timeout_s",
    type=click.FloatRange(min=10),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that does no step for so long, or does not begin, is restarted.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Restarts in a row without a new checkpoint; nodes that go with notice do not count.",
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
    num_workers: tuple[int, int],
    device: Device,
    wait_for_nodes_s: float,
    loader_workers: int,
    num_threads: int | None,
    assignments: tuple[str, ...],
    checkpoint_seconds: float,
    hang_timeout_s: float,
    max_restarts: int,
    model_name: str,
    dry_run: bool,
) -> dict[str, Any]:
    """Train a model from a corpus of photos and a corpus of artworks.

    Runs DDP processes under Ray Train. A worker or node that dies costs the time since the last checkpoint,
    one that goes with notice nothing; the same command goes on after anything else. The story is one MLflow
    run, and the result a new version in the registry with the alias `challenger`.

    \b
    Examples:
      nst train --content corpora/photos --style corpora/paintings --preset smoke --out runs
      nst train --content s3://b/photos --style s3://b/paintings --preset main \\
          --out s3://b/runs --name first --num-workers 2:8 --device gpu --wait-for-nodes 900
      nst train ... --set loss.bands=3 --set batch.size=128 --dry-run
    """
    config = resolve_config(preset_name, images, assignments)
    if dry_run:
        say(json.dumps(to_dict(config), indent=2))
        return {"config": to_dict(config)}
    if "/" in (name or "") or (name or "").startswith("."):
        raise ValueError(f"--name {name!r} must be a plain name, without slashes or a leading dot")
    with preflight.promptly():
        training = Training(
            name=name or preset_name,
            out_uri=places.absolute(out_uri),
            config=config,
            content=open_corpus(content_uri, "content"),
            style=open_corpus(style_uri, "style"),
        )
        claim = TrainingClaim.of(training)
    known = claim.known
    if known.get("status") == "FINISHED":
        say(f"{training.uri} is finished; another --name trains anew")
        return known["result"]
    # what only the workers would find out, after they have been paid for
    sizes = training.sizes(num_workers)
    tracking_server.require_lasting_store()
    is_tracked = check_tracking(known)
    info = cluster.connect(min_cpus=sizes[0])
    workers = Workers(
        sizes=sizes,
        use_gpu=choose_device(info, device),
        max_restarts=max_restarts,
        wait_for_nodes_s=wait_for_nodes_s,
        are_here=info.is_local,
    )
    seen = preflight.check(
        training.uri,
        corpora={"content": training.content, "style": training.style},
        demand=workers.demand,
        wait_for_nodes_s=wait_for_nodes_s,
        with_tracking=is_tracked,
    )
    threads: int = num_threads or known.get("num_threads") or threads_for_each(sizes[-1])
    with claim:
        run = start_run(training, claim, num_workers, threads)
        settings = WorkerSettings(
            identity=training.identity(),
            checkpoints_uri=training.checkpoints_uri,
            claim=claim.place,
            run_id=run.run_id,
            tracking_uri=shareable_tracking_uri(),
            num_loader_workers=loader_workers,
            checkpoint_seconds=checkpoint_seconds,
            hang_timeout_s=hang_timeout_s,
            num_threads=threads,
        )
        look_at_nodes = new_nodes_checker(training, workers, seen)
        return run_training(training, claim, run, settings, workers, look_at_nodes, model_name)


def new_nodes_checker(training: Training, workers: Workers, seen: set[str]) -> Callable[[], None]:
    """What looks at the nodes that came since `seen`, as the preflight did; ValueError says what is wrong.
    MLflow may be away meanwhile."""
    digests = {corpus.uri: corpus.manifest.digest for corpus in (training.content, training.style)}

    def look() -> None:
        nonlocal seen
        seen = patiently(
            lambda: preflight.check_new_nodes(
                seen, training.uri, digests, demand=workers.demand, with_tracking=False
            )
        )

    return look


def threads_for_each(num_workers: int) -> int:
    """The cluster's CPUs shared among the workers, as far as one node has them."""
    nodes = [int(node.total.get("CPU", 0)) for node in living_nodes()]
    return max(1, min(sum(nodes) // num_workers, max(nodes, default=1)))


def open_corpus(uri: str, role: str) -> Corpus:
    uri = places.absolute(uri)
    corpus = Corpus.open(uri, storage=storage.ObjectStorage() if storage.is_remote(uri) else None)
    if corpus.manifest.role != role:
        raise ValueError(
            f"{uri} is a {corpus.manifest.role} corpus; --{role} needs one sharded with --role {role}"
        )
    return corpus


def run_training(
    training: Training,
    claim: TrainingClaim,
    run: tracking.TrackedRun,
    settings: WorkerSettings,
    workers: Workers,
    look_at_nodes: Callable[[], None],
    model_name: str,
) -> dict[str, Any]:
    """Everything between a training that may begin and a registered version."""
    numbers = " or ".join(map(str, workers.sizes))
    say(f"training {training.uri}: {numbers} x {'GPU' if workers.use_gpu else 'CPU'}")
    try:
        with interruptible():
            run.flush()
            num_restarts, newest = fit_and_publish(training, claim, settings, workers, look_at_nodes)
            run.set_tags({"nst.restarts": str(num_restarts)})
            summary = register(training, run.run_id, newest, model_name)
            if not workers.are_here:
                send_left(settings)
    except BaseException as error:
        cluster.disconnect()  # or a worker that is just starting would say RUNNING to MLflow after us
        if not isinstance(error, Overtaken):  # then its state is another's to tell
            tell_end(claim, run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.finish("FINISHED")
    summary = {**summary, "num_restarts": num_restarts}
    patiently(lambda: claim.end("FINISHED", summary))
    say(f"checkpoint  {summary['checkpoint']}")
    say(f"registered  {summary['model']} (alias challenger)")
    say(f"run         {run.run_id} in {tracking_server.shown(tracking_server.tracking_uri())}")
    return summary


def fit_and_publish(
    training: Training,
    claim: TrainingClaim,
    settings: WorkerSettings,
    workers: Workers,
    look_at_nodes: Callable[[], None],
) -> tuple[int, StoredCheckpoint]:
    """Trains until the last checkpoint is whole, and copies it to where users look for it."""
    store = CheckpointStore(training.checkpoints_uri)
    num_restarts = 0
    while True:
        num_restarts += fit(settings, workers, check=claim.check, look_at_nodes=look_at_nodes)
        with scratch.folder("nst-publish-") as folder:
            newest = patiently(lambda: store.fetch_newest(folder))
            if newest is None:
                raise StageFailed("the training ended without a checkpoint")
            if newest.num_images_seen < training.config.num_images:
                continue  # the last one was damaged
            for name in sorted(newest.sha256, key=lambda name: name == CONFIG_FILE):  # that is the last
                path, uri = str(Path(folder, name)), storage.join(training.checkpoint_uri, name)
                patiently(lambda path=path, uri=uri: storage.upload_file(path, uri))
            return num_restarts, newest


def register(training: Training, run_id: str, newest: StoredCheckpoint, model_name: str) -> dict[str, Any]:
    """The published checkpoint as the model's next version."""
    wait_for_mlflow("the training is done, the same command registers it")
    version = register_checkpoint(training.checkpoint_uri, run_id=run_id, model_name=model_name)
    store = CheckpointStore(training.checkpoints_uri)
    best = store.best()
    return {
        "run_id": run_id,
        "checkpoint": training.checkpoint_uri,
        "best_checkpoint": store.uri_of(best) if best else None,
        "model": f"models:/{model_name}/{version}",
        "version": version,
        "num_images_seen": newest.num_images_seen,
    }


def choose_device(info: cluster.ClusterInfo, device: Device) -> bool:
    """Whether to train on GPUs."""
    if device == "auto" and not info.num_gpus and not info.is_local:
        say("the cluster has no GPU now: training on CPUs (--device gpu insists on GPUs)")
    return device == "gpu" or (device == "auto" and info.num_gpus > 0)


if __name__ == "__main__":
    train()
