"""Training without a cluster: `python -m nst.train`, or the same under torchrun.

    python -m nst.train --content corpora/photos --style corpora/paintings --preset micro --out runs/first
    torchrun --nproc-per-node 2 -m nst.train --content ... --style ... --out ...

The same --out goes on from its checkpoint. Needs PyTorch, and neither Ray nor MLflow."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from nst.allocator import keep_freed_memory
from nst.checkpoint import CONFIG_FILE, read_config, save_checkpoint
from nst.config import TrainConfig
from nst.corpus import Corpus
from nst.distributed import rank, reduce_mean
from nst.images import to_uint8
from nst.objectives.objective import Objective
from nst.presets import PRESETS, resolve_config
from nst.train import REMEDY, Previews, TrainState, prepare, state_to_dict, train


class LocalHooks:
    """Prints figures, and keeps previews and the newest checkpoint in a folder. Stops after `minutes`, if
    they are given."""

    def __init__(
        self, out_dir: Path, previews: Previews, num_images_seen: int, minutes: float | None
    ) -> None:
        self._out_dir, self._previews = out_dir, previews
        self._since, self._seen = time.monotonic(), num_images_seen
        self._deadline = None if minutes is None else self._since + 60 * minutes

    def should_stop(self, state: TrainState) -> bool:
        if self._deadline is None:
            return False
        # all ranks together, or those that go on would wait for the others
        return reduce_mean({"is_over": float(time.monotonic() > self._deadline)})["is_over"] > 0

    def should_checkpoint(self) -> bool:
        return False

    def on_metrics(self, state: TrainState, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name.endswith("gradient_norm") and not math.isfinite(value):
                # where figures are due as often as checkpoints, the last good one stays
                raise ValueError(f"the training has diverged: {name} is {value}; {REMEDY}")
        now = time.monotonic()
        rate = (state.num_images_seen - self._seen) / max(now - self._since, 1e-9)
        self._since, self._seen = now, state.num_images_seen
        if rank() == 0:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{state.num_images_seen} images  {rate:.1f}/s  {figures}", flush=True)
            with (self._out_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({**state_to_dict(state), "images_per_second": rate, **metrics}) + "\n")

    def on_preview(self, state: TrainState, objective: Objective) -> None:
        if rank() == 0:
            grid = to_uint8(self._previews.draw(objective))
            Image.fromarray(grid).save(self._out_dir / f"preview-{state.num_images_seen:09d}.png")

    def on_checkpoint(self, state: TrainState, objective: Objective) -> None:
        if rank() == 0:
            written, current = self._out_dir / "checkpoint.new", self._out_dir / "checkpoint"
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
            save_checkpoint(written, objective, state_to_dict(state))
            former = self._out_dir / "checkpoint.old"
            shutil.rmtree(former, ignore_errors=True)
            if current.exists():
                current.rename(former)
            written.rename(current)
            shutil.rmtree(former, ignore_errors=True)


def find_checkpoint(out_dir: Path) -> str | None:
    """The newest whole checkpoint under `out_dir`, whatever moment the last training was cut off at."""
    for name in ("checkpoint", "checkpoint.new", "checkpoint.old"):
        if (out_dir / name / CONFIG_FILE).exists():
            return str(out_dir / name)
    return None


def open_for(role: str, uri: str) -> Corpus:
    """The corpus at `uri`. Raises ValueError if it was made for the other role."""
    corpus = Corpus.open(uri)
    if corpus.manifest.role != role:
        raise ValueError(f"{uri} is a {corpus.manifest.role} corpus; --{role} needs one made for {role}")
    return corpus


def run(
    config: TrainConfig,
    content_uri: str,
    style_uri: str,
    out_dir: Path,
    device: torch.device,
    num_loader_workers: int = 0,
    start_from: str | None = None,
    minutes: float | None = None,
) -> None:
    """Trains to the end or for `minutes`, from where `out_dir` stands; where that is empty, from the weights
    of `start_from`."""
    content, style = (open_for(role, uri) for role, uri in (("content", content_uri), ("style", style_uri)))
    checkpoint_dir = find_checkpoint(out_dir)
    if (
        checkpoint_dir is not None
        and replace(read_config(checkpoint_dir), num_images=config.num_images) != config
    ):
        raise ValueError(
            f"{out_dir} holds a training with another configuration; give this one another --out"
        )
    record, digests = out_dir / "corpora.json", [content.manifest.digest, style.manifest.digest]
    if checkpoint_dir is not None and json.loads(record.read_text()) != digests:
        raise ValueError(f"{out_dir} holds a training on other corpora; give this one another --out")
    out_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(digests))
    session = prepare(
        config,
        content,
        style,
        device=device,
        checkpoint_dir=checkpoint_dir,
        start_from=start_from,
        num_loader_workers=num_loader_workers,
    )
    previews = Previews.choose(config, content, style)
    hooks = LocalHooks(out_dir, previews, session.state.num_images_seen, minutes)
    train(session, hooks)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nst.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--content", required=True, help="corpus of photos (a folder with corpus.json)")
    parser.add_argument("--style", required=True, help="corpus of artworks")
    parser.add_argument("--preset", default="micro", choices=sorted(PRESETS))
    parser.add_argument("--out", required=True, type=Path, help="folder for checkpoint, previews and metrics")
    parser.add_argument("--start-from", metavar="CHECKPOINT", help="begin with another training's weights")
    parser.add_argument("--images", type=int, help="images to train for")
    parser.add_argument("--minutes", type=float, help="stop after these with a checkpoint to go on from")
    parser.add_argument("--loader-workers", type=int, default=0, help="decoding processes for each rank")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="assignments"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    keep_freed_memory()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(device)  # or every rank's collectives would use the first GPU
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        config = resolve_config(options.preset, options.images, options.assignments)
        run(
            config,
            options.content,
            options.style,
            options.out,
            torch.device(device),
            options.loader_workers,
            options.start_from,
            options.minutes,
        )
    except ValueError as error:
        print(f"nst.train: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
