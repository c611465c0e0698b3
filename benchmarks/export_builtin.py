"""Puts a trained model into the package: weights in fp16, configuration and golden pictures.

    python -m benchmarks.export_builtin CHECKPOINT NAME

Writes nst/weights/NAME. Its CARD.md is written by hand, from what was measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from nst.builtin import WEIGHTS_DIR
from nst.checkpoint import CONFIG_FILE, MODEL_FILE, model_digest
from nst.golden import check_golden, write_golden
from nst.stylize import Stylizer


def export(checkpoint_dir: Path, out_dir: Path) -> float:
    """Returns what rounding the weights to fp16 changes of a picture, in levels of 255 on average (the worst
    of the golden pairs).

    Raises:
        ValueError: a weight does not fit into fp16.
        OSError: the rounding changes more than another machine may.
    """
    weights = load_file(checkpoint_dir / MODEL_FILE)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in halves.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds numbers that fp16 cannot")
    golden_dir = out_dir / "golden"
    golden_dir.mkdir(parents=True, exist_ok=True)
    save_file(halves, out_dir / MODEL_FILE)
    (out_dir / MODEL_FILE).chmod(0o644)  # safetensors leaves it to its owner alone
    (out_dir / CONFIG_FILE).write_bytes((checkpoint_dir / CONFIG_FILE).read_bytes())
    before, after = (Stylizer.load(str(folder), device="cpu") for folder in (checkpoint_dir, out_dir))
    write_golden(after, golden_dir)
    return check_golden(before, golden_dir)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    out_dir = WEIGHTS_DIR / options.name
    change = export(options.checkpoint, out_dir)
    megabytes = (out_dir / MODEL_FILE).stat().st_size / 1e6
    print(f"{out_dir}: {megabytes:.1f} MB, digest {model_digest(out_dir)}")
    print(f"fp16 changes pictures by {change:.3f} levels of 255 on average")
    return 0


if __name__ == "__main__":
    sys.exit(main())
