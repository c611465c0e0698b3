"""What `benchmarks.sharding_speed` compares: ways to put a folder of JPEGs into WebDataset tars.

    python benchmarks/sharding_contenders.py NAME TASK PICTURES OUT

Gets ready, says so, works when a line comes in, says that it is done, and ends with the next line. Only the
standard library is imported up here: one contender lives in another environment."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZE = 256  # px, the shorter side of what is re-encoded
LARGEST_SIZE = 4096  # px; nothing is larger, so that nothing need be re-encoded
QUALITY = 92
NUM_TARS = 4
NUM_WARM_UP = 8
NUM_FOR_TWO_SHARDS = 80  # `nst shard` cuts few images into few shards, and every worker should have one
WARM_UP = "warm-up"  # folder of what is made before the timed work
READY, DONE = "ready to work", "done with it"


@dataclass(frozen=True)
class Job:
    """`task` is copy or reencode; `urls` a file with the pictures' addresses, one a line."""

    task: str
    pictures: Path
    out: Path
    urls: Path
    num_cpus: int

    @property
    def paths(self) -> list[Path]:
        return sorted(self.pictures.glob("*.jpg"))


def reencode(data: bytes) -> bytes:
    """The loop body that everybody writes, with the filter, quality and colour resolution of ours."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    resized = image.resize(size, Image.Resampling.LANCZOS)
    resized.save(buffer, "JPEG", quality=QUALITY, subsampling="4:4:4")
    return buffer.getvalue()


def sample(job: Job, path: str, data: bytes) -> dict[str, Any]:
    jpeg = data if job.task == "copy" else reencode(data)
    return {"__key__": Path(path).stem, "jpg": jpeg, "json": json.dumps({"source": path}).encode()}


# --- the contenders: each makes ready and returns what is timed ---------------------------------------


def bare_loop(job: Job) -> Callable[[], object]:
    import PIL.JpegImagePlugin  # noqa: F401

    def run() -> None:
        for number in range(NUM_TARS):
            with tarfile.open(job.out / f"{number:06d}.tar", "w") as tar:
                for path in job.paths[number::NUM_TARS]:
                    made = sample(job, str(path), path.read_bytes())
                    for ending, data in (("jpg", made["jpg"]), ("json", made["json"])):
                        member = tarfile.TarInfo(f"{made['__key__']}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    return run


def shard_writer(job: Job) -> Callable[[], object]:
    from webdataset.writer import ShardWriter

    def run() -> None:
        most = -(-len(job.paths) // NUM_TARS)
        with ShardWriter(str(job.out / "%06d.tar"), maxcount=most, verbose=0) as writer:
            for path in job.paths:
                writer.write(sample(job, str(path), path.read_bytes()))

    return run


def ray_data(job: Job) -> Callable[[], object]:
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    ray.init(num_cpus=job.num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def write(paths: list[Path], out: Path) -> None:
        read = ray.data.read_binary_files(
            [str(path) for path in paths], include_paths=True, override_num_blocks=NUM_TARS
        )
        read.map(lambda row: sample(job, row["path"], row["bytes"])).write_webdataset(str(out), encoder=None)

    write(job.paths[:NUM_WARM_UP], job.out / WARM_UP)
    return lambda: write(job.paths, job.out / "tars")


def img2dataset(job: Job) -> Callable[[], object]:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import download  # pyright: ignore[reportMissingImports] - in an environment of its own

    how = {"resize_mode": "no", "skip_reencode": True}
    if job.task == "reencode":
        how = {"resize_mode": "keep_ratio", "resize_only_if_bigger": True, "image_size": SIZE}
    return lambda: download(
        url_list=str(job.urls),
        output_folder=str(job.out / "tars"),
        output_format="webdataset",
        processes_count=job.num_cpus,
        thread_count=4 * job.num_cpus,
        number_sample_per_shard=-(-len(job.paths) // NUM_TARS),
        encode_quality=QUALITY,
        **how,
    )


def write_shards(job: Job) -> Callable[[], object]:
    from nst.planning import ShardPlan, SourceImage
    from nst.shards import write_shard

    images = [SourceImage(source=str(path), label="", num_bytes=path.stat().st_size) for path in job.paths]

    def run() -> None:
        for number in range(NUM_TARS):
            plan = ShardPlan(number=number, images=tuple(images[number::NUM_TARS]), settings=_settings(job))
            write_shard(plan, lambda image: Path(image.source).read_bytes(), str(job.out))

    return run


def nst_shard(job: Job) -> Callable[[], object]:
    from infra import cluster
    from pipelines.shard_corpus import shard_corpus

    few, small = job.out / "few", reencode(job.paths[0].read_bytes())
    few.mkdir()
    for number in range(NUM_FOR_TWO_SHARDS):
        (few / f"{number}.jpg").write_bytes(small)
    cluster.connect(min_cpus=job.num_cpus)
    settings, how = _settings(job), {"labels": "none", "workers": job.num_cpus}
    shard_corpus(str(few), str(job.out / WARM_UP), settings, **how)
    return lambda: shard_corpus(str(job.pictures), str(job.out / "corpus"), settings, **how)


def _settings(job: Job) -> Any:
    from nst.planning import ShardSettings

    if job.task == "copy":
        return ShardSettings(role="content", image_size=LARGEST_SIZE, keep_bytes=True, labels="none")
    return ShardSettings(role="content", image_size=SIZE, jpeg_quality=QUALITY, labels="none")


CONTENDERS = {
    "bare tarfile loop": bare_loop,
    "webdataset.ShardWriter": shard_writer,
    "Ray Data write_webdataset": ray_data,
    "img2dataset": img2dataset,
    "nst write_shard": write_shards,
    "nst shard": nst_shard,
}


def main() -> None:
    name, task, pictures, out, urls, num_cpus = sys.argv[1:]
    run = CONTENDERS[name](Job(task, Path(pictures), Path(out), Path(urls), int(num_cpus)))
    for state, act in ((READY, run), (DONE, lambda: None)):
        print(state, flush=True)
        sys.stdin.readline()
        act()


if __name__ == "__main__":
    main()
