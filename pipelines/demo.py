"""`nst demo`: every stage for real, on this machine, on pictures that the installed packages carry and on
paintings that the demo paints itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from PIL import Image

from pipelines import demo_images, painter
from pipelines.console import Stage, say

NUM_PAINTINGS = 8  # a manner
HELD_OUT_SEED = 1_000  # paintings that the training never saw
NUM_WORKERS = 2


@click.command("demo", cls=Stage)
@click.option(
    "--workdir", default="nst-demo", show_default=True, metavar="DIR", help="Where everything goes."
)
@click.option("--images", type=click.IntRange(min=16), help="Images to train for (default: the preset's).")
@click.pass_context
def demo(context: click.Context, workdir: str, images: int | None) -> dict[str, Any]:
    """The whole chain on this machine: shard, train, evaluate, promote, stylize, gallery.

    Trains the `smoke` preset for about two minutes on two CPU cores: enough to see colours and textures
    follow the style, not what the method can do. Run again, it reuses what is there.

    \b
    Examples:
      nst demo
      nst demo --workdir /tmp/try --images 800
    """
    folder = Path(workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # the demo's own registry and its own Ray: it must not put its model into a team's
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/.nst/mlflow.db"
    started = time.monotonic()
    steps = Steps(context)

    pictures = steps.run("pictures", lambda: write_pictures(folder / "pictures"))
    for role in ("content", "style"):
        steps.verb("shard", source=pictures[role], corpus=str(folder / "corpora" / role), role=role)
    training = steps.verb(
        "train",
        content_uri=str(folder / "corpora" / "content"),
        style_uri=str(folder / "corpora" / "style"),
        preset_name="smoke",
        out_uri=str(folder / "runs"),
        name="demo",
        images=images,
        num_workers=NUM_WORKERS,
    )
    steps.verb(
        "evaluate",
        model=training["model"],
        content_uri=pictures["new_content"],
        style_uri=pictures["new_style"],
        report_uri=str(folder / "report"),
    )
    steps.verb("promote", version=str(training["version"]), reason="the demo's model passed its gate")
    stylized = steps.verb(
        "stylize",
        source_uri=pictures["new_content"],
        out_uri=str(folder / "stylized"),
        style_uris=(pictures["new_style"],),
        model="models:/nst@champion",
    )
    shutil.copyfile(folder / "stylized" / "_nst" / "gallery.html", folder / "gallery.html")
    return report(folder, training, stylized, time.monotonic() - started)


class Steps:
    """Runs one stage after the other, with a headline for each."""

    def __init__(self, context: click.Context) -> None:
        self._context, self._number = context, 0

    def verb(self, name: str, /, **options: Any) -> dict[str, Any]:
        """Another verb, with the types and defaults of its command line."""
        from pipelines.cli import find_verb

        command = find_verb(name)
        types = {parameter.name: parameter for parameter in command.params}
        typed = {key: types[key].type_cast_value(self._context, value) for key, value in options.items()}
        return self.run(f"nst {name}", lambda: self._context.invoke(command, **typed))

    def run(self, title: str, work: Callable[[], Any]) -> Any:
        self._number += 1
        say(f"\n── {self._number} {title} " + "─" * (60 - len(title)))
        started = time.monotonic()
        result = work()
        say(f"   {time.monotonic() - started:.0f} s")
        return result


def write_pictures(folder: Path) -> dict[str, str]:
    """Photographs and paintings, to train on and new ones; paths by what they are for."""
    demo_images.write_photographs(folder)
    paintings, new_paintings = folder / "paintings", folder / "new-paintings"
    if not new_paintings.exists():
        painter.write_paintings(paintings, NUM_PAINTINGS)
        unfinished = folder / "new-paintings.unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        for number, manner in enumerate(painter.MANNERS):
            picture = Image.fromarray(painter.paint(manner, HELD_OUT_SEED + number))
            picture.save(unfinished / f"{manner}.jpg", quality=95)
        unfinished.rename(new_paintings)
    say(f"photographs {folder / demo_images.TRAINING_FOLDER} (origin and licences: {folder / 'CREDITS.txt'})")
    say(f"paintings   {paintings} ({', '.join(painter.MANNERS)})")
    return {
        "content": str(folder / demo_images.TRAINING_FOLDER),
        "style": str(paintings),
        "new_content": str(folder / demo_images.EVALUATION_FOLDER),
        "new_style": str(new_paintings),
    }


def report(
    folder: Path, training: dict[str, Any], stylized: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Prints where each thing is."""
    places = {
        "pictures": folder / "pictures",
        "corpora": folder / "corpora",
        "checkpoint": training["checkpoint"],
        "model": f"{training['model']}, the champion",
        "report": folder / "report" / "report.html",
        "stylized": folder / "stylized",
        "gallery": folder / "gallery.html",
    }
    say(f"\ndone in {seconds:.0f} s; all of it is under {folder}\n")
    for name, place in places.items():
        say(f"  {name:<11} {place}")
    say("\n  training curves and previews:")
    say(f"    mlflow ui --backend-store-uri {os.environ['MLFLOW_TRACKING_URI']}")
    return {**{name: str(place) for name, place in places.items()}, "seconds": round(seconds, 1), **stylized}


if __name__ == "__main__":
    demo()
