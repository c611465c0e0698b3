"""`nst stylize` as a user meets it: every input accounted for once, reruns that do only what is needed, and
nothing lost when a worker or the run itself is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import CliRunner, Result
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from infra import registry, storage
from infra.local_node import processes_of
from pipelines import actor_pool
from pipelines.actor_pool import MAX_TRIES, ActorPool, Outcome, WorkersKeepDying
from pipelines.registration import register_checkpoint
from pipelines.stylize_bucket import stylize
from pipelines.stylize_recorder import Recorder
from tests.bad_images import encoded, make_difficult_images, picture
from tests.checkpoints import tiny_checkpoint
from tests.servers import REPOSITORY, RayCluster, S3Server, ray_cluster

SECONDS = 240


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two style pictures."""
    folder = tmp_path_factory.mktemp("styles")
    for name, rgb in zip(("pavilion", "dahlia"), load_sample_images().images, strict=True):
        Image.fromarray(rgb).resize((128, 96)).save(folder / f"{name}.jpg")
    return folder


def run(model: str, *arguments: object) -> Result:
    return CliRunner().invoke(stylize, [*map(str, arguments), "--model", model, "--json"])


def done(model: str, *arguments: object) -> dict[str, Any]:
    result = run(model, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def ledger(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "_nst" / "ledger").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def outputs(out: Path) -> dict[str, tuple[int, int]]:
    """relative path -> (modification time, size) of every output."""
    files = (path for path in out.rglob("*") if path.is_file() and "_nst" not in path.parts)
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def make_pictures(folder: Path, num: int, size: tuple[int, int] = (48, 32)) -> Path:
    folder.mkdir()
    for index in range(num):
        (folder / f"{index:03d}.jpg").write_bytes(encoded(picture(*size, seed=index), "JPEG"))
    return folder


# A single picture: in this process, the file and nothing else


def test_a_single_picture_is_one_file(model: str, styles: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "photo.jpg"
    source.parent.mkdir()
    source.write_bytes(encoded(picture(75, 50), "JPEG"))
    style = styles / "dahlia.jpg"
    result = done(model, source, tmp_path / "out", "--style", style)
    assert set(outputs(tmp_path)) == {"in/photo.jpg", "out/photo.jpg"}
    assert result["output"] == str(tmp_path / "out" / "photo.jpg")
    done(model, source, tmp_path / "named" / "painted.png", "--style", style, "--max-side", 60)
    with Image.open(tmp_path / "named" / "painted.png") as image:
        assert (image.size, image.format) == ((60, 40), "PNG")
    assert not ray.is_initialized()


def test_mixes_strength_and_colors_reach_the_picture(model: str, styles: Path, tmp_path: Path) -> None:
    source = tmp_path / "photo.png"
    source.write_bytes(encoded(picture(75, 50), "PNG"))
    both = ("--style", styles / "dahlia.jpg", "--style", styles / "pavilion.jpg")
    found = {}
    for name, options in {
        "dahlia": ("--style", styles / "dahlia.jpg"),
        "all-dahlia": (*both, "--weights", "1,0"),
        "mixed": (*both, "--weights", "0.5 0.5"),
        "half": ("--style", styles / "dahlia.jpg", "--strength", 0.5),
        "none": ("--style", styles / "dahlia.jpg", "--strength", 0),
        "colors": ("--style", styles / "dahlia.jpg", "--colors", "content"),
    }.items():
        done(model, source, tmp_path / f"{name}.png", *options)
        found[name] = np.array(Image.open(tmp_path / f"{name}.png")).astype(int)
    photo = np.array(Image.open(source)).astype(int)
    assert np.array_equal(found["none"], photo)
    assert np.array_equal(found["dahlia"], found["all-dahlia"])
    assert np.abs(found["half"] - (found["dahlia"] + photo) / 2).max() <= 1
    assert np.abs(found["mixed"] - found["dahlia"]).mean() > 1
    assert np.abs(found["colors"] - found["dahlia"]).mean() > 1


def test_metadata_is_stripped_or_kept_but_never_where(model: str, styles: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "A. Photographer"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    source = tmp_path / "photo.jpg"
    source.write_bytes(encoded(picture(), "JPEG", exif=exif))
    for metadata, suffix in (("strip", "jpg"), ("keep", "jpg"), ("keep", "png"), ("keep", "webp")):
        output = tmp_path / f"{metadata}.{suffix}"
        done(model, source, output, "--style", styles / "dahlia.jpg", "--metadata", metadata)
        with Image.open(output) as image:
            assert image.size == (48, 64)
            found = image.getexif()
            assert ExifTags.Base.Orientation not in found
            assert not found.get_ifd(ExifTags.IFD.GPSInfo)
            if metadata == "strip":
                assert not dict(found)
            else:
                assert found[ExifTags.Base.Artist] == "A. Photographer"
                taken = found.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
                assert taken == "2024:05:06 07:08:09"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{photos}", "{out}", "--style", "{out}/missing"], "does not exist"),
        (["{photos}", "{out}", "--style", "{broken}"], "cannot be used"),
        (["{photos}", "{photos}", "--style", "{style}"], "holds SOURCE"),
        (["{photos}/deeper", "{photos}", "--style", "{style}"], "holds SOURCE"),
        (["{photos}-missing", "{out}", "--style", "{style}"], "does not exist or is empty"),
        (["{notes}", "{out}", "--style", "{style}"], "holds 1 files, but no picture"),
        (["{photo}", "{photo}", "--style", "{style}"], "itself"),
        (["{photo}", "{out}/a.gif", "--style", "{style}"], ".gif is not written"),
        (["{photo}", "{out}/a.png", "--format", "jpg", "--style", "{style}"], "is no jpg"),
        (["{photos}", "{out}", "--style", "{style}", "--weights", "1,2"], "2 numbers for 1 styles"),
        (["{photos}", "{out}", "--style", "{style}", "--weights", "much"], "not numbers"),
        (["{photos}", "{out}", "--style", "{style}", "--weights", "0"], "not all 0"),
        (["{photos}", "{out}", "--style", "{style}", "--strength", "2"], "0<=x<=1"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(
    model: str, styles: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    photos = make_pictures(tmp_path / "photos", 1)
    (photos / "deeper").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    places = {
        "photos": photos,
        "photo": photos / "000.jpg",
        "notes": tmp_path / "notes",
        "out": tmp_path / "out",
        "style": styles / "dahlia.jpg",
        "broken": tmp_path / "broken.jpg",
    }
    result = run(model, *(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


# A folder: workers, ledger, reruns


@pytest.mark.slow
def test_difficult_images_are_each_accounted_for_once(
    ray_here: None, model: str, styles: Path, tmp_path: Path
) -> None:
    images = make_difficult_images(tmp_path / "in")
    out = tmp_path / "out"
    result = done(model, tmp_path / "in", out, "--style", styles / "dahlia.jpg", "--format", "png")
    rows = {row["key"]: row for row in ledger(out)}
    assert len(rows) == len(ledger(out))
    assert set(rows) == {*images.taken, *images.refused, *images.hidden}
    assert {key for key, row in rows.items() if row["status"] == "done"} == set(images.taken)
    assert {key: rows[key]["reason"] for key in images.refused} == images.refused
    ignored = {key for key, row in rows.items() if row["status"] == "ignored"}
    assert ignored == {"notes/README.md", "notes/table.csv", *images.hidden}
    assert (result["done"], result["failed"]) == (len(images.taken), len(images.refused) - 2)

    found = {rows[key]["output"]: size for key, size in images.taken.items()}
    assert set(found) == set(outputs(out))
    for output, size in found.items():
        with Image.open(out / output) as image:
            assert image.size == size, output
    assert rows["colours/gray.jpg"]["output"] == "colours/gray.png"
    assert rows["colours/gray.png"]["output"] == "colours/gray.png.png"
    with Image.open(out / "alpha" / "rgba.png") as image:
        assert image.mode == "RGBA"
        assert image.getchannel("A").getpixel((5, 5)) == 255
        assert image.getchannel("A").getpixel((60, 20)) == 0

    run_json = json.loads((out / "_nst" / "run.json").read_text())
    assert run_json["status"] == "done"
    assert run_json["counts"]["done"] == len(images.taken)

    before, parts = outputs(out), {part.name for part in (out / "_nst" / "ledger").iterdir()}
    again = done(model, tmp_path / "in", out, "--style", styles / "dahlia.jpg", "--format", "png")
    assert (again["done"], again["failed"]) == (0, 0)
    assert (again["done_before"], again["failed_before"]) == (result["done"], result["failed"])
    assert outputs(out) == before
    assert {part.name for part in (out / "_nst" / "ledger").iterdir()} == parts


@pytest.mark.slow
def test_a_rerun_does_what_is_missing_or_changed(
    ray_here: None, model: str, styles: Path, tmp_path: Path
) -> None:
    source, out, style = make_pictures(tmp_path / "in", 6), tmp_path / "out", styles / "dahlia.jpg"
    (source / "broken.jpg").write_bytes(b"no picture")
    done(model, source, out, "--style", style)
    first = outputs(out)

    (out / "001.jpg").unlink()
    (out / "002.jpg").write_bytes(b"cut")
    (source / "003.jpg").write_bytes(encoded(picture(48, 32, seed=99), "JPEG"))
    (source / "new.jpg").write_bytes(encoded(picture(48, 32, seed=100), "JPEG"))
    result = done(model, source, out, "--style", style)
    second = outputs(out)
    assert (result["done"], result["done_before"], result["failed_before"]) == (4, 3, 1)
    redone = {name for name in second if second[name] != first.get(name)}
    assert redone == {"001.jpg", "002.jpg", "003.jpg", "new.jpg"}

    (source / "broken.jpg").write_bytes(encoded(picture(48, 32, seed=7), "JPEG"))
    (out / "000.jpg").unlink()
    result = done(model, source, out, "--style", style, "--retry-failed")
    assert (result["done"], result["failed"]) == (1, 0)
    assert "broken.jpg" in outputs(out)
    assert "000.jpg" not in outputs(out)

    result = done(model, source, out, "--style", style, "--strength", 0.5)
    assert (result["done"], result["done_before"]) == (8, 0)
    counts = Counter(row["output"] for row in ledger(out))
    assert set(counts.values()) == {1}
    assert {row["status"] for row in ledger(out)} == {"done"}


@pytest.mark.slow
def test_several_styles_and_ways_of_pairing(ray_here: None, model: str, styles: Path, tmp_path: Path) -> None:
    source = make_pictures(tmp_path / "in", 4)
    done(model, source, tmp_path / "each", "--style", styles)
    names = [f"00{index}.jpg" for index in range(4)]
    assert set(outputs(tmp_path / "each")) == {f"{s}/{n}" for s in ("pavilion", "dahlia") for n in names}
    done(model, source, tmp_path / "cycle", "--style", styles, "--pairing", "cycle")
    chosen = {row["key"]: row["style"] for row in ledger(tmp_path / "cycle")}
    assert chosen == dict(zip(names, ["dahlia", "pavilion"] * 2, strict=True))
    assert set(outputs(tmp_path / "cycle")) == set(names)
    done(model, source, tmp_path / "random", "--style", styles, "--pairing", "random")
    before = {row["key"]: row["style"] for row in ledger(tmp_path / "random")}
    (source / "000a.jpg").write_bytes(encoded(picture(48, 32, seed=9), "JPEG"))
    assert done(model, source, tmp_path / "random", "--style", styles, "--pairing", "random")["done"] == 1
    after = {row["key"]: row["style"] for row in ledger(tmp_path / "random")}
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_out_inside_source_is_not_stylized_again(
    ray_here: None, model: str, styles: Path, tmp_path: Path
) -> None:
    source = make_pictures(tmp_path / "in", 2)
    for _ in range(2):
        done(model, source, source / "out", "--style", styles / "dahlia.jpg")
    assert set(outputs(source)) == {"000.jpg", "001.jpg", "out/000.jpg", "out/001.jpg"}


@pytest.mark.slow
def test_failures_decide_the_exit_code(ray_here: None, model: str, styles: Path, tmp_path: Path) -> None:
    source, style = make_pictures(tmp_path / "in", 2), styles / "dahlia.jpg"
    for name in ("x", "y"):
        (source / f"{name}.jpg").write_bytes(b"no picture")
    assert done(model, source, tmp_path / "a", "--style", style)["failed"] == 2
    result = run(model, source, tmp_path / "b", "--style", style, "--max-failures", 1)
    assert result.exit_code == 1
    assert "2 pictures failed, more than --max-failures 1" in result.stderr
    assert done(model, source, tmp_path / "c", "--style", style, "--max-failures", 2)["failed"] == 2
    for picture_path in source.glob("0*.jpg"):
        picture_path.unlink()
    result = run(model, source, tmp_path / "d", "--style", style)
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["failed"] == 2


@pytest.mark.slow
def test_of_several_pictures_in_a_file_the_first_is_taken_and_the_ledger_says_so(
    ray_here: None, model: str, styles: Path, tmp_path: Path
) -> None:
    source = make_pictures(tmp_path / "in", 1)
    frames = [picture(48, 32, seed=seed) for seed in (1, 2)]
    for name in ("moving.gif", "pages.tif"):
        frames[0].save(source / name, save_all=True, append_images=frames[1:])
    frames[0].save(source / "plain.tif")
    done(model, source, tmp_path / "out", "--style", styles / "dahlia.jpg")
    notes = {row["output"]: (row["status"], row["note"]) for row in ledger(tmp_path / "out")}
    assert notes == {
        "000.jpg": ("done", ""),
        "moving.jpg": ("done", "animated: its first frame"),
        "pages.jpg": ("done", "several pages: the first"),
        "plain.jpg": ("done", ""),
    }


@pytest.mark.slow
def test_a_run_keeps_the_version_that_it_began_with(
    ray_here: None, styles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in (1, 2):
        register_checkpoint(tiny_checkpoint(tmp_path / f"checkpoint-{seed}", seed))
    registry.set_alias(registry.DEFAULT_MODEL, registry.CHAMPION, 1)
    source, out, style = make_pictures(tmp_path / "in", 6), tmp_path / "out", styles / "dahlia.jpg"
    original = Recorder.item

    def promote_at_first(self: Recorder, *arguments: Any) -> None:
        registry.set_alias(registry.DEFAULT_MODEL, registry.CHAMPION, 2)
        original(self, *arguments)

    monkeypatch.setattr(Recorder, "item", promote_at_first)
    assert done("models:/nst@champion", source, out, "--style", style)["done"] == 6
    first = {row["model_digest"] for row in ledger(out)}
    assert first == {registry.get_version(registry.DEFAULT_MODEL, 1).digest}
    assert json.loads((out / "_nst" / "run.json").read_text())["model"]["version"] == 1
    assert done("models:/nst@champion", source, out, "--style", style)["done"] == 6
    second = {row["model_digest"] for row in ledger(out)}
    assert second == {registry.get_version(registry.DEFAULT_MODEL, 2).digest}


# Death: of workers, and of the run


@ray.remote(num_cpus=1)
class Worker:
    def work(self, items: list[int], folder: str) -> list[int]:
        for item in items:
            with (Path(folder) / str(item)).open("a") as tries:
                tries.write("x")
            if item == 13:
                os._exit(1)
            if item == 4 and (Path(folder) / "4").stat().st_size == 1:
                time.sleep(600)
        return [item * item for item in items]


class Numbers:
    """A source of items; it has more than it says until `all_are_known`."""

    def __init__(self, numbers: range) -> None:
        self._left = list(numbers)
        self.all_are_known = True

    def take(self, num: int) -> list[int]:
        taken, self._left = self._left[:num], self._left[num:]
        return taken

    @property
    def num_left(self) -> int | None:
        return len(self._left) if self.all_are_known else None


@pytest.mark.slow
def test_poison_costs_itself_and_nothing_else(ray_here: None, tmp_path: Path) -> None:
    pool: ActorPool[int] = ActorPool(
        Worker.remote,
        lambda actor, items: actor.work.remote(items, str(tmp_path)),
        num_actors=lambda: 2,
        seconds_for_a_chunk=6,
    )
    started = time.monotonic()
    found: list[Outcome[int]] = list(pool.run(Numbers(range(20))))
    pool.close()
    assert sorted(outcome.item for outcome in found) == list(range(20))
    assert {outcome.item for outcome in found if outcome.result is None} == {13}
    assert all(outcome.result == outcome.item**2 for outcome in found if outcome.result is not None)
    tries = {int(path.name): path.stat().st_size for path in tmp_path.iterdir()}
    # with others it died once at most; then alone
    assert MAX_TRIES <= tries.pop(13) <= MAX_TRIES + 1
    assert tries.pop(4) >= 2
    # what an actor had at hand when it died, or had not told of yet, is done again, once for each death
    assert max(tries.values()) <= 3
    assert time.monotonic() - started < SECONDS


@ray.remote(num_cpus=0)
class Named:
    def work(self, items: list[int]) -> list[int]:
        time.sleep(0.05)
        return [os.getpid() for _ in items]


@pytest.mark.slow
def test_the_pool_follows_the_cluster(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "SECONDS_BETWEEN_SIZES", 0.0)
    monkeypatch.setattr(actor_pool, "SECONDS_IN_A_CHUNK", 0.0)
    wanted, num_created = 1, 0

    def create() -> Any:
        nonlocal num_created
        num_created += 1
        return Named.options(resources={} if num_created <= 2 else {"nowhere": 1}).remote()

    pool: ActorPool[int] = ActorPool(
        create,
        lambda actor, items: actor.work.remote(items),
        num_actors=lambda: wanted,
        seconds_for_a_chunk=60,
    )
    numbers = Numbers(range(1_000_000))
    numbers.all_are_known = False
    seen: list[int] = []
    deadline = time.monotonic() + SECONDS
    for outcome in pool.run(numbers):
        assert time.monotonic() < deadline
        seen.append(outcome.result)
        if len(seen) == 3:
            assert len(set(seen)) == 1
            wanted = 3  # a node came; for the third actor there is no room
        if len(set(seen)) == 2 and wanted == 3:
            wanted = 2
        if wanted == 2 and pool.num_actors == 2:
            numbers.take(1_000_000)
            numbers.all_are_known = True
    assert (len(set(seen)), num_created) == (2, 3)
    pool.close()


@ray.remote(num_cpus=1)
class Stillborn:
    def __init__(self) -> None:
        raise RuntimeError("the model is of wood")


@pytest.mark.slow
def test_workers_that_never_live_are_given_up(ray_here: None) -> None:
    pool: ActorPool[int] = ActorPool(
        Stillborn.remote,
        lambda actor, items: actor.work.remote(items),
        num_actors=lambda: 1,
        seconds_for_a_chunk=60,
    )
    with pytest.raises(WorkersKeepDying, match="the model is of wood"):
        list(pool.run(Numbers(range(3))))
    pool.close()


def start(model: str, style: Path, source: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.stylize_bucket", str(source), str(out)]
    command += ["--style", str(style), "--model", model, "--num-workers", "2", "--json"]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".nst-*"))


@pytest.mark.faults
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_whole_pictures_and_goes_on(
    model: str, styles: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    source, out, style = (
        make_pictures(tmp_path / "in", 40, (640, 480)),
        tmp_path / "out",
        styles / "dahlia.jpg",
    )
    process = start(model, style, source, out)
    try:
        wait_for(lambda: out.is_dir() and len(outputs(out)) >= 2, process)
        process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    finished = outputs(out)
    assert 2 <= len(finished) < 40
    assert not temporaries(out)
    for name in finished:
        with Image.open(out / name) as image:
            image.load()
    assert {row["output"] for row in ledger(out)} == set(finished)
    assert json.loads((out / "_nst" / "run.json").read_text())["status"] == "interrupted"

    process = start(model, style, source, out)
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert (result["done"], result["done_before"]) == (40 - len(finished), len(finished))
    assert {name: outputs(out)[name] for name in finished} == finished


@pytest.mark.faults
def test_two_runs_at_once_do_no_harm(model: str, styles: Path, tmp_path: Path) -> None:
    source, out, style = (
        make_pictures(tmp_path / "in", 60, (320, 240)),
        tmp_path / "out",
        styles / "dahlia.jpg",
    )
    (source / "broken.jpg").write_bytes(b"no picture")
    runs = [start(model, style, source, folder) for folder in (out, out)]
    alone = start(model, style, source, tmp_path / "alone")
    try:
        for process in [*runs, alone]:
            stdout, stderr = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, stderr
            result = json.loads(stdout.splitlines()[-1])
            assert result["done"] + result["done_before"] == 60
            assert result["failed"] + result["failed_before"] == 1
    finally:
        for process in [*runs, alone]:
            process.kill()
    assert not temporaries(out)
    again = done(model, source, out, "--style", style)
    assert (again["done"], again["done_before"], again["failed_before"]) == (0, 60, 1)
    assert sorted(row["key"] for row in ledger(out)) == sorted(path.name for path in source.iterdir())
    for name in outputs(tmp_path / "alone"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert set(outputs(out)) == set(outputs(tmp_path / "alone"))
    assert json.loads((out / "_nst" / "run.json").read_text())["status"] == "done"


@pytest.mark.faults
def test_a_node_that_joins_gets_work(model: str, styles: Path, tmp_path: Path) -> None:
    source, out = make_pictures(tmp_path / "in", 4, (1280, 960)), tmp_path / "out"
    for number in range(4, 160):  # about a minute for one worker
        (source / f"{number:03d}.jpg").hardlink_to(source / f"{number % 4:03d}.jpg")
    with ray_cluster(1, cpus_per_worker=1) as cluster:
        command = [sys.executable, "-m", "pipelines.stylize_bucket", str(source), str(out), "--json"]
        command += ["--style", str(styles / "dahlia.jpg"), "--model", model]
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **cluster.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_for(lambda: out.is_dir() and len(outputs(out)) >= 2, process)
            assert len(workers_of(cluster)) == 1
            node = cluster.add_worker(num_cpus=1)
            wait_for(lambda: len(workers_of(cluster)) == 2, process)
            cluster.kill_node(node)  # as a spot machine goes
            stdout, stderr = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert (result["done"], result["failed"]) == (160, 0)
    assert len(ledger(out)) == 160


def workers_of(cluster: RayCluster) -> list[psutil.Process]:
    found = []
    for node in cluster.workers:
        for process in processes_of(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "StylizeWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


@pytest.mark.faults
def test_from_bucket_to_bucket(s3: S3Server, model: str, styles: Path, tmp_path: Path) -> None:
    source, out = s3.create_bucket(), s3.create_bucket()
    for index in range(3):
        storage.write_bytes(f"{source}/2024/{index}.jpg", encoded(picture(48, 32, seed=index), "JPEG"))
    storage.write_bytes(f"{source}/style.jpg", (styles / "dahlia.jpg").read_bytes())
    command = [sys.executable, "-m", "pipelines.stylize_bucket", f"{source}/2024", f"{out}/painted", "--json"]
    command += ["--style", f"{source}/style.jpg", "--model", model]
    for expected in ((3, 0, 0), (0, 0, 3)):
        finished = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **s3.environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        result = json.loads(finished.stdout.splitlines()[-1])
        assert (result["done"], result["failed"], result["done_before"]) == expected
    keys = [found.key for found in storage.list_objects(f"{out}", include_hidden=True)]
    assert [key for key in keys if "_nst" not in key] == [f"painted/{index}.jpg" for index in range(3)]
    assert {key.split("/")[-1] for key in keys if "_nst" in key and "ledger" not in key} == {
        "gallery.html",
        "run.json",
    }
