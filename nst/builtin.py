"""The models in the box: trained weights that come with the package, so that a picture can be stylized with
no training, no download and no registry.

    Stylizer.load(builtin_checkpoint("micro"))

Each is a folder under `nst/weights/`: a checkpoint's inference half (safetensors in fp16, config.json), its
card (CARD.md: data, recipe, measures, failures, rights) and its golden pictures (`nst.golden`)."""

from __future__ import annotations

from pathlib import Path

WEIGHTS_DIR = Path(__file__).with_name("weights")
DEFAULT = "micro"


def builtin_names() -> list[str]:
    """The models there are, in the order of their names."""
    return sorted(path.parent.name for path in WEIGHTS_DIR.glob("*/config.json"))


def builtin_checkpoint(name: str = DEFAULT) -> str:
    """The folder of a built-in model.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in builtin_names():
        raise ValueError(f"there is no built-in model {name!r}; there are: {', '.join(builtin_names())}")
    return str(WEIGHTS_DIR / name)
