"""MODEL on a command line, and the registered model as MLflow serves it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from infra import registry, storage, tracking_server
from nst.approaches import UniganModel
from nst.checkpoint import model_digest, save_checkpoint
from nst.config import TrainConfig
from nst.networks.generator import Generator
from nst.networks.style_generator import StyleGenerator
from nst.stylize import Stylizer
from pipelines.models import cache_dir, resolve_model
from pipelines.registration import pip_requirements, register_checkpoint
from tests.servers import end_session, free_port, s3_server, wait_until_healthy


class TinyObjective:
    """The smallest model that there can be, untrained."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        widths = (4, 4, 4, 4)
        model = UniganModel(content_widths=widths, style_width=4, num_blocks=1, embedding_dim=8)
        self.config = TrainConfig(model=model)
        self.ema_generator: StyleGenerator = Generator(model)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.ema_generator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}

    def memory(self) -> dict[str, dict[str, float]]:
        return {}

    def recall(self, memory: Mapping[str, Mapping[str, float]]) -> None:
        pass


def tiny_checkpoint(folder: Path, seed: int = 0) -> str:
    folder.mkdir(parents=True)
    save_checkpoint(folder, TinyObjective(seed), {"num_images_seen": 7})
    return str(folder)


def picture(seed: int, width: int = 48, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    tracking_server.client(uri)
    return uri


@pytest.fixture(autouse=True)
def _environment(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_checkpoint_folder_is_a_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    found = resolve_model(folder)
    assert (found.checkpoint_dir, found.version, found.digest) == (folder, None, model_digest(folder))
    assert resolve_model(f"file://{folder}").checkpoint_dir == folder
    with pytest.raises(ValueError, match=r"is no checkpoint .*models:/nst@champion"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match="only folders"):
        resolve_model("http://somewhere/else")


def test_a_registered_version_is_fetched_and_checked(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"no champion yet: .*nst promote VERSION"):
        resolve_model()
    version = register_checkpoint(folder)
    assert register_checkpoint(folder) == version, "registered once"
    registry.set_alias("nst", "champion", version)
    for model in (None, "models:/nst@champion", f"models:/nst/{version}"):
        found = resolve_model(model)
        assert (found.version, found.digest) == (version, model_digest(folder))
        assert found.name == f"models:/nst/{version} @challenger @champion"
        assert sorted(path.name for path in Path(found.checkpoint_dir).iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
    assert [path.name for path in cache_dir().iterdir()] == [model_digest(folder)], "nothing half-done stays"

    registered = registry.get_version("nst", version)
    weights = Path(registered.source.removeprefix("file://")) / "artifacts/checkpoint/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(OSError, match=rf"models:/nst/{version}: .* was altered after it was registered"):
        resolve_model()
    weights.unlink()
    with pytest.raises(OSError, match=rf"models:/nst/{version}: .*(damaged|cannot download)"):
        resolve_model()


def test_the_registered_model_stylizes_where_nst_is_not_installed(tmp_path: Path, store: str) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=2)
    version = register_checkpoint(folder, model_name="elsewhere")
    source = registry.get_version("elsewhere", version).source
    assert "pickle" not in " ".join(str(path) for path in Path(source.removeprefix("file://")).rglob("*"))
    (tmp_path / "content.png").write_bytes(picture(0))
    (tmp_path / "style.png").write_bytes(picture(1, 64, 64))
    code = (
        "import mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model('models:/elsewhere/{version}')\n"
        "content, style = (open(f'{name}.png', 'rb').read() for name in ('content', 'style'))\n"
        "rows = pandas.DataFrame({'content': [content, content], 'style': [style, content]})\n"
        "done = model.predict(rows, params={'strength': 0.5, 'max_side': 32})\n"
        "open('stylized.png', 'wb').write(done['stylized'][0])\n"
        "import nst\n"
        "print(nst.__file__)\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "/models/m-" in done.stdout or "/artifacts/code/nst" in done.stdout, "the registered code was used"
    stylized = Image.open(tmp_path / "stylized.png")
    with Image.open(tmp_path / "content.png") as content, Image.open(tmp_path / "style.png") as style:
        expected = Stylizer.load(folder, device="cpu")(content, style, strength=0.5, max_side=32)
    assert stylized.size == expected.size == (32, 27)
    assert np.abs(np.asarray(stylized, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_requirements_are_pinned_as_an_index_knows_them() -> None:
    pinned = pip_requirements()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pinned
    assert all("==" in line and "+" not in line for line in pinned)


@pytest.mark.slow
def test_mlflow_serves_the_registered_model(tmp_path: Path) -> None:
    version = register_checkpoint(tiny_checkpoint(tmp_path / "checkpoint", seed=3), model_name="served")
    port, log_path = free_port(), tmp_path / "serve.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", f"models:/served/{version}", "--port", str(port), "--host", "127.0.0.1"]
    # MLflow looks for uvicorn on the path, where an active environment has it.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/ping", process, log_path)
        row = {
            "content": base64.b64encode(picture(0)).decode(),
            "style": base64.b64encode(picture(1)).decode(),
        }
        body = json.dumps({"dataframe_records": [row], "params": {"strength": 1.0}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (prediction,) = json.loads(answer.read())["predictions"]
    finally:
        end_session(process)
    assert Image.open(io.BytesIO(base64.b64decode(prediction["stylized"]))).size == (48, 40)


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tiny_checkpoint(tmp_path / name, seed) for seed, name in enumerate("ab"))
    with s3_server() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        uri = f"{server.create_bucket()}/run/checkpoint"
        with pytest.raises(ValueError, match=r"is no checkpoint: it has no model\.safetensors"):
            resolve_model(uri)
        storage.upload_dir(first, uri)
        found = resolve_model(uri)
        assert found.digest == model_digest(first)
        assert not (Path(found.checkpoint_dir) / "training.safetensors").exists(), "inference needs two files"
        storage.upload_dir(second, uri)
        assert resolve_model(uri).digest == model_digest(second), (
            "a new checkpoint under the same name is seen"
        )
        version = register_checkpoint(uri, model_name="from-a-bucket")
        assert resolve_model(f"models:/from-a-bucket/{version}").digest == model_digest(second)
