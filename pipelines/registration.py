"""From a checkpoint to the next version of a registered model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import nst
from infra import publishing, registry, scratch, tracking_server, training_runs
from infra.publishing import ModelInterface
from nst.checkpoint import model_digest, read_config
from nst.golden import golden_digest, read_golden, write_golden
from nst.networks.blocks import num_parameters
from nst.stylize import Stylizer
from pipelines.console import StageFailed
from pipelines.model_card import CardFacts, model_card, num_images_seen
from pipelines.models import GOLDEN_ARTIFACT, fetch_checkpoint

log = logging.getLogger(__name__)

SECONDS_WITHOUT_MLFLOW = 600.0
SECONDS_BETWEEN_TRIES = 10.0

MODEL_CODE = Path(__file__).with_name("registered_model.py")
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pillow", "safetensors", "pywavelets", "pyarrow")

INTERFACE = ModelInterface(
    inputs=("content", "style"),
    outputs=("stylized",),
    params={"strength": 1.0, "colors": "style", "max_side": 0},
)


def register_checkpoint(
    checkpoint_uri: str,
    *,
    model_name: str = registry.DEFAULT_MODEL,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Registers a checkpoint (a folder or s3:// URI) as the next version, with the alias `challenger`.

    Returns:
        The version. The same model from the same run is registered once.

    Raises:
        ValueError: it is no checkpoint, or `run_id` is unknown.
    """
    checkpoint_dir = fetch_checkpoint(checkpoint_uri)
    digest = model_digest(checkpoint_dir)
    known = publishing.find_version(model_name, digest, run_id)
    if known is not None:
        return known.version
    with scratch.folder("nst-golden-") as folder:
        golden_dir = Path(folder, "golden")
        golden_dir.mkdir()
        stylizer = Stylizer.load(checkpoint_dir, device="cpu")
        write_golden(stylizer, golden_dir)
        card = model_card(
            CardFacts(
                model_name=model_name,
                digest=digest,
                checkpoint_uri=checkpoint_uri,
                config=read_config(checkpoint_dir),
                num_parameters=num_parameters(stylizer.generator),
                num_images_seen=num_images_seen(checkpoint_uri),
                run=training_runs.find_run(run_id) if run_id else None,
                golden=read_golden(golden_dir),
            )
        )
        version = publishing.register(
            checkpoint_dir,
            name=model_name,
            run_id=run_id,
            digest=digest,
            python_model_path=MODEL_CODE,
            code_paths=[Path(nst.__file__).parent],
            pip_requirements=pip_requirements(),
            interface=INTERFACE,
            tags={"checkpoint": checkpoint_uri, **(tags or {})},
            artifacts={GOLDEN_ARTIFACT: golden_dir},
            model_config={"golden_digest": golden_digest(golden_dir)},
            card=card,
        )
    return version.version


def pip_requirements() -> list[str]:
    """The running versions of what stylizing needs, as an index has them (torch 2.9.0+cpu is 2.9.0 there)."""
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in PACKAGES]


def wait_for_mlflow(consolation: str) -> None:
    """What is done is not thrown away because MLflow is away just now.

    Raises:
        StageFailed: it stays away; `consolation` says what then.
    """
    deadline = time.monotonic() + SECONDS_WITHOUT_MLFLOW
    while True:
        try:
            return tracking_server.check()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise StageFailed(f"{error}; {consolation}") from error
            log.warning("%s; waiting for it, for up to %.0f s", error, deadline - time.monotonic())
            time.sleep(SECONDS_BETWEEN_TRIES)
