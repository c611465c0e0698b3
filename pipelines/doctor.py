"""`nst doctor`: is everything here that the other verbs need? A line a check, a remedy for each failure."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement

from infra import cluster, cluster_nodes, storage
from pipelines.console import Stage, StageFailed, say
from pipelines.node_check import NodeReport, one_line, problems_of
from pipelines.preflight import SECONDS_HERE, look_at_nodes, problems_on

GIB = 1 << 30
MIN_PYTHON = (3, 11)
WATCHED_PACKAGES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "webdataset", "boto3")
# Those are imported too: a wrong pair of torch and torchvision shows only then.
IMPORTED_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "webdataset")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`status` is ok, warning or FAILED; `remedy` is empty for ok."""

    name: str
    status: str
    detail: str
    remedy: str = ""


@click.command("doctor", cls=Stage)
@click.option(
    "--storage",
    "storage_uri",
    default=".nst",
    show_default=True,
    metavar="URI",
    help="Where to try writing, reading and deleting: a folder or s3://bucket/prefix.",
)
def doctor(storage_uri: str) -> dict[str, Any]:
    """Check versions, storage, Ray, MLflow, GPU and limits; say what to do about each failure.

    \b
    Examples:
      nst doctor
      nst doctor --storage s3://corpora/tmp
      nst submit -- doctor --storage s3://corpora/tmp     # from the cluster's nodes
    """
    findings = []
    for name, check in checks(storage_uri):
        try:
            found = list(check())
        except (ValueError, OSError, RuntimeError) as error:
            found = [Finding(name=name, status="FAILED", detail=one_line(error), remedy="as it says")]
        for finding in found:
            _show(finding)
        findings += found
    num_failed = sum(finding.status == "FAILED" for finding in findings)
    result = {"checks": [asdict(finding) for finding in findings]}
    if num_failed:
        raise StageFailed(f"{num_failed} of {len(findings)} checks failed", result)
    num_warnings = sum(finding.status == "warning" for finding in findings)
    say(f"{len(findings)} checks, {num_warnings} warnings, nothing failed")
    return result


def checks(storage_uri: str) -> list[tuple[str, Callable[[], Iterator[Finding]]]]:
    """The checks in the order in which they are run: cheap ones first."""
    return [
        ("python", check_python),
        ("packages", check_packages),
        ("gpu", check_gpu),
        ("disk", check_disk),
        ("shared memory", check_shared_memory),
        ("open files", check_open_files),
        ("storage", lambda: check_storage(storage_uri)),
        ("mlflow", check_mlflow),
        ("ray", lambda: check_ray(storage_uri)),
    ]


def check_python() -> Iterator[Finding]:
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info < MIN_PYTHON:
        yield Finding(name="python", status="FAILED", detail=detail, remedy="install Python 3.11 or newer")
    else:
        yield Finding(name="python", status="ok", detail=detail)


def check_packages() -> Iterator[Finding]:
    wanted = {requirement.name: requirement for requirement in map(Requirement, _requirements())}
    for name in WATCHED_PACKAGES:
        try:
            version = metadata.version(name)
            if name in IMPORTED_PACKAGES:
                importlib.import_module(name)
        except metadata.PackageNotFoundError:
            yield Finding(
                name=name,
                status="FAILED",
                detail="not installed",
                remedy="run `pip install -e .` in the project",
            )
        except Exception as error:  # noqa: BLE001 - whatever keeps a package from loading is the finding
            remedy = f"reinstall {name}"
            if name.startswith("torch"):
                remedy = "torch and torchvision must come from the same build: reinstall both in one command"
            yield Finding(name=name, status="FAILED", detail=one_line(error), remedy=remedy)
        else:
            requirement = wanted.get(name)
            if requirement and not requirement.specifier.contains(
                version.partition("+")[0], prereleases=True
            ):
                remedy = f"install {name}{requirement.specifier}"
                yield Finding(name=name, status="FAILED", detail=version, remedy=remedy)
            else:
                yield Finding(name=name, status="ok", detail=version)


def _requirements() -> list[str]:
    try:
        return metadata.requires("nst") or []
    except metadata.PackageNotFoundError:
        return []  # run from a plain checkout, as a job on a cluster is


def check_gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {device.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
            yield Finding(name=f"gpu {index}", status="ok", detail=detail)
    elif shutil.which("nvidia-smi"):
        yield Finding(
            name="gpu",
            status="warning",
            detail="nvidia-smi is there, but torch sees no GPU",
            remedy="check `nvidia-smi`, CUDA_VISIBLE_DEVICES and that torch was built with CUDA",
        )
    else:
        yield Finding(name="gpu", status="ok", detail="none (CPU only)")


def check_disk() -> Iterator[Finding]:
    for place in dict.fromkeys((str(Path.cwd()), os.environ.get("RAY_TMPDIR", "/tmp"))):
        free = shutil.disk_usage(place).free
        status = "ok" if free >= 10 * GIB else "warning" if free >= GIB else "FAILED"
        remedy = (
            "" if status == "ok" else "free some: corpora, checkpoints and Ray's spilled objects go there"
        )
        yield Finding(
            name="disk", status=status, detail=f"{free / GIB:.1f} GiB free in {place}", remedy=remedy
        )


def check_shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding(name="shared memory", status="ok", detail=f"no {folder} on {platform.system()}")
        return
    size = shutil.disk_usage(folder).total
    is_small = size < 2 * GIB
    yield Finding(
        name="shared memory",
        status="warning" if is_small else "ok",
        detail=f"{size / GIB:.1f} GiB in {folder}",
        remedy="give the container --shm-size=8g: loader workers and Ray pass images there"
        if is_small
        else "",
    )


def check_open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_low = soft != resource.RLIM_INFINITY and soft < 4096
    yield Finding(
        name="open files",
        status="warning" if is_low else "ok",
        detail=f"{soft} allowed (hard limit {hard})",
        remedy="`ulimit -n 65535` before Ray is started" if is_low else "",
    )


def check_storage(uri: str) -> Iterator[Finding]:
    try:
        storage.check_access(uri)
    except OSError as error:
        remedy = "name a place where you may write: --storage URI"
        yield Finding(name="storage", status="FAILED", detail=one_line(error), remedy=remedy)
    else:
        where = f" at {storage.endpoint_url()}" if storage.is_remote(uri) and storage.endpoint_url() else ""
        yield Finding(name="storage", status="ok", detail=f"{uri}{where}: written, read back, deleted")


def check_mlflow() -> Iterator[Finding]:
    from infra import tracking_server

    tracking_server.check()
    yield Finding(
        name="mlflow", status="ok", detail=f"{tracking_server.shown(tracking_server.tracking_uri())} answers"
    )
    try:
        tracking_server.require_lasting_store()
    except ValueError as error:  # enough for everything but training and its models
        yield Finding(name="mlflow", status="warning", detail=str(error), remedy="as it says")


def check_ray(storage_uri: str) -> Iterator[Finding]:
    """Ray starts or RAY_ADDRESS answers; every node has this code and reaches MLflow and, if it is one, the
    bucket."""
    info = cluster.connect()
    try:
        where = "on this machine" if info.is_local else f"at {cluster.remote_address()}"
        detail = f"{info.num_nodes} nodes, {info.num_cpus} CPUs, {info.num_gpus} GPUs {where}"
        yield Finding(name="ray", status="ok", detail=detail)
        if not info.is_local and info.num_cpus == 0:
            yield Finding(
                name="ray",
                status="warning",
                detail="no CPU to run on now",
                remedy="an autoscaled cluster adds machines on demand; else start a worker node",
            )
        is_usable = not problems_of({storage_uri: lambda: storage.check_access(storage_uri)}, SECONDS_HERE)
        shared_uri = storage_uri if storage.is_remote(storage_uri) and is_usable else None
        for address, report in look_at_nodes(cluster_nodes.living_nodes(), shared_uri, {}).items():
            yield _of_node(address, report)
    finally:
        cluster.disconnect()


def _of_node(address: str, report: NodeReport | Exception) -> Finding:
    if problems := problems_on(report):
        return Finding(
            name=f"node {address}", status="FAILED", detail="; ".join(problems), remedy="as it says"
        )
    assert isinstance(report, NodeReport)
    detail = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return Finding(name=f"node {address}", status="ok", detail=detail)


def _show(finding: Finding) -> None:
    say(f"{finding.status:8} {finding.name}: {finding.detail}")
    if finding.remedy and finding.remedy != "as it says":
        say(f"{'':8} -> {finding.remedy}")


if __name__ == "__main__":
    doctor()
