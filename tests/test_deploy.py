"""What is shipped for containers keeps to the schemas and linters of its kinds, and to rules of our own.

Nothing is built or started: no Docker is needed. Each check is also shown something that it must refuse.
"""

from __future__ import annotations

import copy
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from infra import jobs
from tests.servers import REPOSITORY

DEPLOY = REPOSITORY / "infra" / "deploy"
BIN = Path(sys.executable).parent
KUBERNETES = "1.37"
# https://docs.ray.io/en/master/cluster/kubernetes/references/api.html, KubeRay 1.7; an operator drops what it
# does not know without a word.
FIELDS_OF_A_CLUSTER = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
FIELDS_OF_AN_AUTOSCALER = {
    "env",
    "idleTimeoutSeconds",
    "resources",
    "securityContext",
    "upscalingMode",
    "version",
}
FIELDS_OF_A_HEAD = {"rayStartParams", "serviceType", "template"}
FIELDS_OF_A_GROUP = {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "template"}
FIELDS_OF_A_JOB = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "entrypoint",
    "entrypointNumCpus",
    "rayClusterSpec",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "ttlSecondsAfterFinished",
}
A_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|[0-9a-f]{32,}|(?i:password|secret_access_key|token) *[:=] *[\"']?\w{8,}"
)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def pinned(package: str) -> str:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))


def run_linter(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program, *arguments = (str(word) for word in command)
    return subprocess.run(
        [str(BIN / program), *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refuses(check: Callable[[dict[str, Any]], object], document: dict[str, Any], *path: Any, to: Any) -> None:
    """`check` takes the document as it is, and no longer with the value at `path` changed."""
    check(document)
    changed = copy.deepcopy(document)
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    with pytest.raises(Exception):  # noqa: B017, PT011 - each validator has its own
        check(changed)


# compose


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    return load("compose.yaml")


def test_compose_holds_to_its_schema(tmp_path: Path) -> None:
    schema = ("check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = run_linter(*schema, DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout
    text = (DEPLOY / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("shm_size:", "shared_memory:"))
    assert run_linter(*schema, tmp_path / "compose.yaml").returncode != 0


def check_services(site: dict[str, Any]) -> None:
    for name, service in site["services"].items():
        user = str(service["user"]).partition(":")[0]
        assert user.isdecimal(), name
        assert int(user) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        assert service["restart"], name
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) >= {"cpus", "memory"}, name
        assert service["healthcheck"].get("test") or name == "bucket", name  # that one ends by itself
        assert_versioned(service["image"])
        assert set(service.get("secrets", [])) <= set(site["secrets"]), name
        if service["image"].startswith("nst:"):
            assert service["environment"]["RAY_AUTH_MODE"] == "token", name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        for other, terms in service.get("depends_on", {}).items():
            assert other in site["services"], name
            assert terms["condition"] != "service_started", name


def assert_versioned(image: str) -> None:
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", image), image


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("mlflow", "user"), "0:0"),
        (("database", "image"), "postgres:latest"),
        (("ray-worker", "deploy", "resources"), {}),
        (("ray-head", "healthcheck"), {"disable": True}),
        (("ray-head", "ports"), ["8265:8265"]),
        (("ray-head", "environment", "RAY_AUTH_MODE"), "disabled"),
        (("object-store", "cap_drop"), []),
        (("mlflow", "depends_on", "database"), {"condition": "service_started"}),
    ],
)
def test_every_service_is_bounded_watched_and_without_rights(
    site: dict[str, Any], path: tuple[Any, ...], to: Any
) -> None:
    refuses(check_services, site, "services", *path, to=to)


def test_the_parts_of_the_site_know_each_other(site: dict[str, Any]) -> None:
    services = site["services"]
    client = services["ray-worker"]["environment"]
    mlflow = services["mlflow"]["command"][-1]
    tracking = client["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = re.search(r"--allowed-hosts (\S+)", mlflow)
    assert allowed is not None
    assert {tracking, "127.0.0.1:5000"} <= set(allowed.group(1).split(","))
    assert "-s3.port=8333" in services["object-store"]["command"][-1]
    assert client["AWS_ENDPOINT_URL"] == "http://object-store:8333"
    assert "--artifacts-destination s3://nst/" in mlflow
    assert 'Bucket="nst"' in services["bucket"]["command"][-1]
    assert "postgresql+psycopg2://" in mlflow  # SQLAlchemy's own choice is another driver
    assert "--num-cpus=0" in services["ray-head"]["command"]
    assert "--address=ray-head:6379" in services["ray-worker"]["command"]
    assert {name for name, service in services.items() if "database" in service["networks"]} == {
        "mlflow",
        "database",
    }
    assert site["networks"]["database"]["internal"]


def test_secrets_are_made_once_and_git_does_not_see_them(site: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "make-secrets.sh"
    script.write_text((DEPLOY / script.name).read_text())
    subprocess.run(["sh", script], check=True, timeout=30)
    folder = tmp_path / "secrets"
    made = {f"./secrets/{path.name}": path.read_text() for path in folder.iterdir()}
    assert set(made) == {secret["file"] for secret in site["secrets"].values()}
    assert len(set(made.values())) == 3
    assert all(A_SECRET.search(text) for text in made.values())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    again = subprocess.run(["sh", script], capture_output=True, text=True, timeout=30, check=False)
    assert (again.returncode, "already" in again.stderr) == (2, True)
    assert {f"./secrets/{path.name}": path.read_text() for path in folder.iterdir()} == made
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().splitlines()


# the image


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    done = run_linter("hadolint", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout
    worse = (DEPLOY / "Dockerfile").read_text().replace('CMD ["nst", "--help"]', "CMD nst --help")
    assert run_linter("hadolint", "-", text=worse).returncode != 0


def check_dockerfile(text: str) -> None:
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert base is not None
    assert_versioned(base.group(1))
    users = re.findall(r"^USER (\d+)", text, re.MULTILINE)
    assert users
    assert int(users[-1]) > 0
    assert "RAY_AUTH_MODE=token" in text
    for command in re.findall(r"pip install ([^\n&]+)", text):
        assert "--constraint constraints.txt" in command or "--no-deps" in command
    first = text.index("--requirement requirements.txt")
    assert first < text.index("COPY nst nst")  # a change of the code does not install PyTorch anew
    assert not A_SECRET.search(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 1000:1000", "USER 0"),
        ("3.11.14-slim-bookworm", "latest"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        ("--constraint constraints.txt ", ""),
        ("--no-deps .", "."),
        ("MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_TRACKING_PASSWORD=correcthorse"),
    ],
)
def test_the_image_runs_as_nobody_special_with_tested_versions(old: str, new: str) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    check_dockerfile(text)
    assert old in text
    with pytest.raises(AssertionError):
        check_dockerfile(text.replace(old, new))


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()}
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((REPOSITORY / name).exists() for name in copied)
    pinned("psycopg2-binary")


# Kubernetes


@pytest.fixture(scope="module")
def ray_cluster_file() -> dict[str, Any]:
    return load("kuberay/raycluster.yaml")


@pytest.fixture(scope="module")
def ray_job_file() -> dict[str, Any]:
    return load("kuberay/rayjob.yaml")


def templates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["template"]


def check_pod(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    spec = template["spec"]
    assert spec["restartPolicy"] == "Never"  # Ray's autoscaler replaces a pod; it never takes one up again
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for container in spec["containers"]:
        locked = container["securityContext"]
        assert locked["allowPrivilegeEscalation"] is False
        assert locked["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert_versioned(container["image"])


def check_ray_pod(template: dict[str, Any]) -> None:
    check_pod(template)
    (container,) = template["spec"]["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"].endswith("healthz")  # Ray asks for no token there
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounted["/tmp"]]["emptyDir"]["sizeLimit"]


def test_pods_hold_to_the_schema_of_kubernetes_and_have_no_rights(
    ray_cluster_file: dict[str, Any], ray_job_file: dict[str, Any]
) -> None:
    check_pod(ray_job_file["spec"]["submitterPodTemplate"])
    head, *workers = templates(ray_cluster_file["spec"])
    assert len(workers) == 2
    for template in workers:
        check_ray_pod(template)
    container = ("spec", "containers", 0)
    refuses(check_ray_pod, head, *container, "volumeMount", to=[])  # a word that does not exist
    refuses(check_ray_pod, head, "spec", "securityContext", "runAsUser", to=0)
    refuses(check_ray_pod, head, *container, "image", to="nst")
    refuses(check_ray_pod, head, *container, "securityContext", "capabilities", to={"add": ["ALL"]})
    refuses(check_ray_pod, head, *container, "resources", "limits", to={"cpu": "1"})
    refuses(check_ray_pod, head, *container, "env", to=[])
    refuses(check_ray_pod, head, *container, "livenessProbe", to=None)


def check_cluster(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the node types as Ray's autoscaler reads them."""
    spec = document["spec"]
    assert document["apiVersion"] == "ray.io/v1"
    assert set(spec) <= FIELDS_OF_A_CLUSTER
    assert set(spec["autoscalerOptions"]) <= FIELDS_OF_AN_AUTOSCALER
    assert set(spec["headGroupSpec"]) <= FIELDS_OF_A_HEAD
    assert all(set(group) <= FIELDS_OF_A_GROUP for group in spec["workerGroupSpecs"])
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["authOptions"]["secretName"]
    assert spec["enableInTreeAutoscaling"]
    autoscaler = spec["autoscalerOptions"]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in autoscaler["env"]
    assert autoscaler["securityContext"]["runAsNonRoot"]
    assert autoscaler["resources"]["limits"]
    read = autoscaling_config._derive_autoscaling_config_from_ray_cr(document)
    return read["available_node_types"]


def test_rays_autoscaler_reads_the_cluster_as_it_is_meant(ray_cluster_file: dict[str, Any]) -> None:
    types = check_cluster(ray_cluster_file)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["cpu"]["min_workers"] >= 1
    assert types["cpu"]["resources"]["CPU"] >= jobs.DRIVER_CPUS
    assert types["gpu-spot"]["resources"]["GPU"] == 1
    assert (types["gpu-spot"]["min_workers"], types["gpu-spot"]["max_workers"]) == (0, 4)
    refuses(check_cluster, ray_cluster_file, "spec", "rayVersion", to="2.59.0")
    refuses(check_cluster, ray_cluster_file, "spec", "authOptions", "mode", to="disabled")
    refuses(check_cluster, ray_cluster_file, "spec", "idleTimeoutSeconds", to=600)
    refuses(check_cluster, ray_cluster_file, "spec", "workerGroupSpecs", 1, "maxReplicas", to="many")


def test_a_spot_pod_has_the_time_that_ray_is_told(ray_cluster_file: dict[str, Any]) -> None:
    spot = next(g for g in ray_cluster_file["spec"]["workerGroupSpecs"] if g["groupName"] == "gpu-spot")
    pod = spot["template"]["spec"]
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    told = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 5 <= pod["terminationGracePeriodSeconds"] - told <= 15
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= {each["key"] for each in pod["tolerations"]}


def check_job(document: dict[str, Any]) -> None:
    spec = document["spec"]
    assert set(spec) <= FIELDS_OF_A_JOB
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["entrypointNumCpus"] == jobs.DRIVER_CPUS  # else the driver runs on the head
    assert "enableK8sTokenAuth" not in spec["rayClusterSpec"]["authOptions"]  # not for a RayJob
    assert "--name" in spec["entrypoint"]


def test_a_job_has_that_cluster_and_leaves_nothing(
    ray_cluster_file: dict[str, Any], ray_job_file: dict[str, Any]
) -> None:
    assert ray_job_file["spec"]["rayClusterSpec"] == ray_cluster_file["spec"]
    assert ray_job_file["metadata"]["namespace"] == ray_cluster_file["metadata"]["namespace"]
    refuses(check_job, ray_job_file, "spec", "ttlSecondsAfterFinished", to=0)
    refuses(check_job, ray_job_file, "spec", "entrypointNumCpus", to=0)
    refuses(check_job, ray_job_file, "spec", "ttl", to=600)


# all of them


def test_no_file_holds_a_secret() -> None:
    paths = [path for path in DEPLOY.rglob("*") if path.is_file() and "secrets" not in path.parts]
    assert len(paths) >= 8
    for path in paths:
        found = A_SECRET.search(path.read_text())
        assert not found, f"{path}: {found}"
    for text in ("aws_secret_access_key = wJalrXUtnFEMI", "AKIAIOSFODNN7EXAMPLE", "password: hunter2hunter2"):
        assert A_SECRET.search(text)


def test_one_version_of_ray_and_of_our_image_everywhere(site: dict[str, Any]) -> None:
    launcher = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    assert f":{pinned('ray')}-" in launcher["docker"]["image"]
    texts = [(DEPLOY / name).read_text() for name in ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml")]
    ours = {service["image"] for service in site["services"].values() if "build" in service}
    assert len(ours) == 1
    assert set(re.findall(r"image: (\S+)", "".join(texts))) == ours
    assert f"--tag {ours.pop()} " in (DEPLOY / "Dockerfile").read_text()


def test_shell_is_clean(site: dict[str, Any]) -> None:
    launcher = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    scripts = [(DEPLOY / "make-secrets.sh").read_text()]
    for name in ("object-store", "mlflow"):
        scripts.append("#!/bin/sh\n" + site["services"][name]["command"][-1].replace("$$", "$"))
    starts = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    scripts.append("\n".join(["#!/bin/bash", "RAY_HEAD_IP=10.0.0.1", *starts]))
    for script in scripts:
        done = run_linter("shellcheck", "--severity=warning", "-", text=script)
        assert done.returncode == 0, done.stdout
    assert run_linter("shellcheck", "-", text="#!/bin/sh\nrm $1 [a\n").returncode != 0
