"""Loading speed: JPEGs of a corpus -> batches of random crops, beside WebDataset and ImageFolder.

    python -m benchmarks.loading_speed --pictures FOLDER --rounds 5

Everybody reads the same bytes: the corpus that `nst shard` makes of the pictures, its tars through
`webdataset.WebLoader`, and the same JPEGs unpacked through `torchvision.datasets.ImageFolder`. Batches hold
32 crops of 256 px as floats, made by 2 loader workers. Every turn is a process of its own, which has loaded
some batches before it is timed. What is counted is that process and all that it starts."""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
from torch import Tensor

from benchmarks import timing
from benchmarks.processes import ProcessTree, go_on, wait_for
from benchmarks.timing import RESULTS, Spread

SIZE, BATCH_SIZE, NUM_WORKERS, SHORTER_SIDE, MIN_SCALE = 256, 32, 2, 288, 0.6
NUM_CLASSES = BATCH_SIZE // 4  # with two works each, and as many photos
NUM_WARM_UPS = 8  # batches
SECONDS_FOR_A_TURN = 900
READY, DONE = "ready", "done"
OURS = "nst"
REFERENCE = "WebLoader"


# --- the contenders ----------------------------------------------------------------------------------


def nst_batches(folder: Path) -> Iterator[Tensor]:
    """Batches as a training gets them: half photos, half artworks, here of the same corpus."""
    from nst.config import BatchConfig
    from nst.corpus import Corpus
    from nst.loader import load_batches
    from nst.sampling import DynamicBatchSampler

    corpus = Corpus.open(str(folder / "corpus"))
    config = BatchConfig(num_classes=NUM_CLASSES, works_per_class=2, size=SIZE, min_scale=MIN_SCALE)
    sampler = DynamicBatchSampler.for_corpora(corpus, corpus, config, seed=0)
    for batch in load_batches(corpus, corpus, sampler, config, seed=0, num_workers=NUM_WORKERS):
        assert len(batch.content) + len(batch.style) == BATCH_SIZE
        yield batch.content


def pillow_transform() -> Callable[[Any], Tensor]:
    """As the documentation of both has it: crops of a Pillow image. The same distribution of sizes."""
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(SIZE, scale=(MIN_SCALE**2, 1), ratio=(1, 1))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def our_transform(data: bytes) -> Tensor:
    """Our decoding and cropping, for who wants to see what loading alone costs."""
    import random

    from torchvision.io import ImageReadMode, decode_jpeg

    from nst.config import BatchConfig
    from nst.crops import cut_at_random, to_range

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Any = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    return to_range(cut_at_random(image, BatchConfig(min_scale=MIN_SCALE), random.getrandbits(64), SIZE))


def read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def web_batches(folder: Path, *, ours: bool = False) -> Iterator[Tensor]:
    import webdataset as wds

    tars = sorted(map(str, (folder / "corpus" / "shards").glob("*.tar")))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).repeat().shuffle(1000)  # pyright: ignore
    if ours:
        dataset = dataset.to_tuple("jpg").map_tuple(our_transform)
    else:
        dataset = dataset.decode("pil").to_tuple("jpg").map_tuple(pillow_transform())
    loader = wds.WebLoader(dataset.batched(BATCH_SIZE), batch_size=None, num_workers=NUM_WORKERS)  # pyright: ignore
    for (batch,) in loader:
        yield batch


def folder_batches(folder: Path, *, ours: bool = False) -> Iterator[Tensor]:
    from torchvision.datasets import ImageFolder

    kinds: dict[str, Any] = {"transform": pillow_transform()}
    if ours:
        kinds = {"transform": our_transform, "loader": read_file}
    dataset = ImageFolder(str(folder / "files"), **kinds)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, drop_last=True, persistent_workers=True
    )
    while True:
        for batch, _ in loader:
            yield batch


CONTENDERS: dict[str, Callable[[Path], Iterator[Tensor]]] = {
    OURS: nst_batches,
    REFERENCE: web_batches,
    "ImageFolder": folder_batches,
    f"{REFERENCE}, our decoding": functools.partial(web_batches, ours=True),
    "ImageFolder, our decoding": functools.partial(folder_batches, ours=True),
}


def contend(name: str, folder: Path, num_batches: int) -> None:
    """What a turn's process does: says that it is ready, loads when it is told to, says that it is done."""
    torch.set_num_threads(1)
    batches = CONTENDERS[name](folder)
    for _ in range(NUM_WARM_UPS):
        next(batches)
    print(READY, flush=True)
    input()
    for _ in range(num_batches):
        batch = next(batches)
        assert batch.dtype == torch.float32
        assert batch.shape[1:] == (3, SIZE, SIZE)
    print(DONE, flush=True)
    input()
    os._exit(0)  # the workers end with this process


# --- the pictures ------------------------------------------------------------------------------------


def make_inputs(pictures: Path, folder: Path) -> int:
    """A corpus of the pictures, and its JPEGs in a folder for each label; returns how many there are.

    Raises ValueError if there are fewer labels than classes in a batch.
    """
    command = [sys.executable, "-m", "pipelines.cli", "shard", str(pictures.resolve())]
    command += [str(folder / "corpus"), "--role", "style", "--labels", "dirname", "--size", str(SHORTER_SIDE)]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    from nst.corpus import Corpus

    corpus = Corpus.open(str(folder / "corpus"))
    if len(corpus.label_names) < NUM_CLASSES:
        raise ValueError(f"{pictures} holds fewer than {NUM_CLASSES} folders of pictures; give more labels")
    row = 0
    for shard in corpus.manifest.shards:
        with tarfile.open(folder / "corpus" / shard.tar) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    label = f"{corpus.labels[row]:04d}"
                    (folder / "files" / label).mkdir(parents=True, exist_ok=True)
                    data = tar.extractfile(member) or io.BytesIO()
                    (folder / "files" / label / Path(member.name).name).write_bytes(data.read())
                    row += 1
    assert row == len(corpus)
    return row


# --- the turns ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What a contender needed for its batches: seconds by the clock and of CPU time, and the highest memory
    (bytes)."""

    wall: float
    cpu: float
    memory: int


def take_turn(name: str, folder: Path, num_batches: int) -> Turn:
    """Runs a contender once. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "benchmarks.loading_speed", "--contend", name]
    command += ["--pictures", str(folder), "--batches", str(num_batches)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        tree = ProcessTree(psutil.Process(process.pid))
        too_late = threading.Timer(SECONDS_FOR_A_TURN, process.kill)
        too_late.start()
        try:
            wait_for(process, READY)
            tree.forget_memory()
            ready = tree.usage()
            go_on(process)
            wait_for(process, DONE)
            done = tree.usage()
            go_on(process)
        except (EOFError, OSError):
            log.seek(0)
            raise RuntimeError(f"{name} failed: {' | '.join(log.read().splitlines()[-3:])}") from None
        finally:
            too_late.cancel()
            tree.close()
            process.communicate()
    return Turn(wall=done.wall - ready.wall, cpu=done.cpu - ready.cpu, memory=done.memory)


# --- the page ----------------------------------------------------------------------------------------


def row(turns: Sequence[Turn], reference: Sequence[Turn], num_images: int) -> dict[str, Spread]:
    """A contender's figures; ratios to the reference are taken within a round."""
    pairs = list(zip(turns, reference, strict=True))
    return {
        "images a second": Spread.of([num_images / turn.wall for turn in turns]),
        "images a core-second": Spread.of([num_images / turn.cpu for turn in turns]),
        "times as fast": Spread.of([other.wall / turn.wall for turn, other in pairs]),
        "times as fast by core-seconds": Spread.of([other.cpu / turn.cpu for turn, other in pairs]),
        "peak MB": Spread.of([turn.memory / 1e6 for turn in turns]),
    }


def page(facts: Mapping[str, Any], rows: Mapping[str, Mapping[str, Spread]], num_rounds: int) -> str:
    header = ["", "images/s", "images/core-s", f"× {REFERENCE}", "by core-seconds", "peak MB"]
    columns = {"by the clock": "times as fast", "in CPU time": "times as fast by core-seconds"}
    goals = [
        f"- as fast as `{REFERENCE}` {how}, while random-access and exact: "
        f"**{'met' if rows[OURS][column].median >= 1 else 'NOT met'}**, {rows[OURS][column]} times"
        for how, column in columns.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "# Loading speed",
        "",
        f"Batches of {BATCH_SIZE} random crops of {SIZE} px from {facts['images']} JPEGs of {SHORTER_SIDE} "
        f"px (shorter side), {NUM_WORKERS} loader workers; {num_rounds} interleaved rounds of "
        f"{facts['images_a_turn']} images, median (lowest–highest), ratios round by round. Counted is a "
        "process with its workers; memory is the highest sum of proportional set sizes. *Our decoding*: "
        "torchvision's decoder and `nst.crops` in place of Pillow's.",
        "",
        timing.table(header, [[name, *values.values()] for name, values in rows.items()]),
        "",
        "## Goals",
        "",
        *goals,
        "",
        f"- {versions}",
        timing.describe(facts),
        "",
    ]
    return "\n".join(lines)


# --- the program -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=Path, required=True, help="real pictures, a folder for each label")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=60, help="of a turn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, options.pictures, options.batches)
        return
    import webdataset

    facts = timing.machine(torch.device("cpu"))
    turns: dict[str, list[Turn]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="loading-speed-") as folder:
        facts["images"] = make_inputs(options.pictures, Path(folder))
        for number, name in itertools.product(range(options.rounds), range(len(CONTENDERS))):
            names = list(CONTENDERS) if number % 2 == 0 else list(reversed(CONTENDERS))
            turn = take_turn(names[name], Path(folder), options.batches)
            turns[names[name]].append(turn)
            print(f"round {number + 1}: {names[name]}: {turn.wall:.1f} s", file=sys.stderr, flush=True)
    facts |= {
        "images_a_turn": options.batches * BATCH_SIZE,
        "load_at_end": round(os.getloadavg()[0], 2),
        "versions": {"torchvision": torchvision.__version__, "webdataset": webdataset.__version__},
    }
    rows = {name: row(its, turns[REFERENCE], options.batches * BATCH_SIZE) for name, its in turns.items()}
    figures = {"machine": facts, "rows": timing.as_json(rows), "turns": timing.as_json(turns)}
    timing.write_results(options.out, "loading_speed", figures, page(facts, rows, options.rounds))


if __name__ == "__main__":
    main()
