"""What MODEL means on a command line: a registered version, a built-in model, a checkpoint in a folder or a
bucket."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra import places, registry, storage, tracking_server
from infra.registry import RegisteredVersion
from nst import builtin
from nst.checkpoint import model_digest
from nst.golden import check_golden
from nst.stylize import Stylizer

log = logging.getLogger(__name__)

GOLDEN_ARTIFACT = "golden"  # beside the checkpoint of a registered version


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model at hand. `name` is for people; `version` is None for one that is not registered."""

    name: str
    version: int | None
    digest: str
    checkpoint_dir: str


def resolve_model(model: str | None = None) -> ResolvedModel:
    """Finds MODEL and brings its checkpoint here.

    Args:
        model: `models:/nst@champion`, `models:/nst/3`, the name of a built-in model, a checkpoint's folder or
            URI; None: the champion where a registry is set up and has one, else the built-in model.

    Raises:
        ValueError: there is no such model, or the registry does not answer; says what to do.
        OSError: its files cannot be read, or are not those that were registered.
    """
    if model is None:
        champion = None
        if tracking_server.is_set_up():
            tracking_server.check()
            champion = registry.champion()
        return _builtin(builtin.DEFAULT) if champion is None else _registered(champion)
    if model in builtin.builtin_names():  # a folder of that name is written ./NAME
        return _builtin(model)
    if model.startswith("models:"):
        tracking_server.check()
        return _registered(registry.resolve(model))
    checkpoint_dir = fetch_checkpoint(model)
    return ResolvedModel(
        name=model, version=None, digest=model_digest(checkpoint_dir), checkpoint_dir=checkpoint_dir
    )


def _builtin(name: str) -> ResolvedModel:
    """The installation is trusted as the code is: no golden pictures are drawn at each start."""
    folder = builtin.builtin_checkpoint(name)
    return ResolvedModel(
        name=f"{name} (built in)", version=None, digest=model_digest(folder), checkpoint_dir=folder
    )


def fetch_checkpoint(uri: str) -> str:
    """The local folder of a checkpoint: `uri` itself, or for s3:// a copy of what inference needs, kept in
    the user's cache for as long as the bucket holds the same.

    Raises:
        ValueError: there is no checkpoint.
    """
    if not storage.is_remote(uri):
        folder, names = places.local_path(uri), builtin.builtin_names()
        if not all((Path(folder) / file).is_file() for file in registry.MODEL_FILES):
            raise ValueError(
                f"{uri} is no checkpoint (a folder with {' and '.join(registry.MODEL_FILES)}); a registered "
                "model is written models:/nst@champion or models:/nst/3, and built in "
                f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}"
            )
        return folder
    identity = uri
    for file in registry.MODEL_FILES:
        info = storage.stat(storage.join(uri, file))
        if info is None:
            raise ValueError(f"{uri} is no checkpoint: it has no {file}")
        identity += f"\n{info.etag}"
    kept = cache_dir() / hashlib.sha256(identity.encode()).hexdigest()
    if not kept.is_dir():
        with _new_folder() as new:
            for file in registry.MODEL_FILES:
                storage.download_file(storage.join(uri, file), str(Path(new) / file))
            _keep(Path(new), kept)
    return str(kept)


def cache_dir() -> Path:
    """Where fetched checkpoints are kept; safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nst" / "models"


def _registered(version: RegisteredVersion) -> ResolvedModel:
    """Fetched anew each time, so that an altered artifact never goes unseen."""
    if version.digest is None:
        raise ValueError(f"{version} carries no digest: it was not registered by nst")
    with _new_folder() as folder:
        checkpoint_dir = registry.download(version, folder)
        try:
            found = model_digest(checkpoint_dir)
        except ValueError as error:
            raise OSError(f"{version}: what is stored at {version.source} is damaged ({error})") from error
        if found != version.digest:
            raise OSError(
                f"{version}: what is stored at {version.source} was altered after it was registered: its "
                f"digest is {found[:12]}, not {version.digest[:12]}; it is not used"
            )
        _check_golden(version, checkpoint_dir)
        kept = cache_dir() / version.digest
        _keep(Path(checkpoint_dir), kept)
    name = str(version) + "".join(f" @{alias}" for alias in version.aliases)
    return ResolvedModel(name=name, version=version.version, digest=found, checkpoint_dir=str(kept))


def _check_golden(version: RegisteredVersion, checkpoint_dir: str) -> None:
    """Other code, another PyTorch or another processor than at the registration may draw something else.

    On the CPU: this process may have no part in stylizing, and should hold no GPU. Takes some tenths of a
    second.
    """
    golden_dir = Path(checkpoint_dir).with_name(GOLDEN_ARTIFACT)
    if not golden_dir.is_dir():
        log.warning(
            "%s was registered without golden pairs: whether it draws here what it drew then is unknown; "
            "register its checkpoint again",
            version,
        )
        return
    try:
        check_golden(Stylizer.load(checkpoint_dir, device="cpu"), golden_dir)
    except OSError as error:
        raise OSError(f"{version}: {error}; it is not used") from error


def _new_folder() -> tempfile.TemporaryDirectory[str]:
    """In the cache, so that a rename publishes it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".new-", dir=cache_dir())


def _keep(folder: Path, kept: Path) -> None:
    """Publishes a complete folder under its name in the cache. One that is there is left alone if it holds
    the same: another process may be reading it."""
    if kept.is_dir():
        files = registry.MODEL_FILES
        if all((kept / f).is_file() and (kept / f).read_bytes() == (folder / f).read_bytes() for f in files):
            return
        shutil.rmtree(kept)
    try:
        folder.rename(kept)
    except OSError:
        if not kept.is_dir():  # else another process was faster, with the same
            raise
