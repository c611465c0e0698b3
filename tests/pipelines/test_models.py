"""MODEL on a command line, and the registered model as MLflow serves it."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import torch.nn.functional as F
import yaml
from mlflow.pyfunc.model import PythonModelContext
from PIL import Image
from torch import nn

from infra import publishing, registry, storage, tracking_server
from infra.tracking import TrackedRun
from nst.approaches import UniganModel
from nst.builtin import builtin_checkpoint
from nst.checkpoint import model_digest, save_checkpoint
from nst.config import TrainConfig, to_dict
from nst.corpus import Corpus
from nst.networks.generator import Generator
from nst.networks.style_generator import StyleGenerator
from nst.presets import resolve_config
from nst.stylize import Stylizer
from pipelines.models import cache_dir, resolve_model
from pipelines.registered_model import RegisteredStylizer
from pipelines.registration import INTERFACE, MODEL_CODE, pip_requirements, register_checkpoint
from tests.corpora import make_corpus
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


def artifacts_of(name: str, version: int) -> Path:
    return Path(registry.get_version(name, version).source.removeprefix("file://"))


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


def test_without_a_registry_the_model_in_the_box_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    found = resolve_model()
    assert found == resolve_model("micro")
    assert (found.version, found.digest) == (None, model_digest(builtin_checkpoint()))
    assert not list(tmp_path.iterdir()), "nothing is set up that nobody asked for"


def test_a_registry_that_does_not_answer_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        resolve_model()


def test_a_registered_version_is_fetched_and_checked(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    assert resolve_model().name == "micro (built in)", "there is no champion yet"
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


def test_whatever_was_altered_is_named(tmp_path: Path) -> None:
    version = register_checkpoint(tiny_checkpoint(tmp_path / "checkpoint"), model_name="altered")
    uri, root = f"models:/altered/{version}", artifacts_of("altered", version)
    resolve_model(uri)
    for path in (
        "MLmodel",
        "README.md",
        "artifacts/checkpoint/config.json",
        "artifacts/checkpoint/model.safetensors",
        "artifacts/golden/golden.json",
        "artifacts/golden/plain-content.png",
        "code/nst/stylize.py",
        "files.json",
        "registered_model.py",
    ):
        data = (root / path).read_bytes()
        (root / path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(OSError, match=rf"{uri}: {path} was altered after it was registered"):
            resolve_model(uri)
        (root / path).unlink()
        with pytest.raises(OSError, match=rf"{uri}: .*{path}"):
            resolve_model(uri)
        (root / path).write_bytes(data)
    (root / "code/nst/torch.py").write_text("")
    with pytest.raises(OSError, match=rf"{uri}: code/nst/torch\.py was added"):
        resolve_model(uri)


def test_a_model_that_draws_otherwise_than_when_it_was_registered_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are whole, but what runs them is not what ran them then."""
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=4)
    version = register_checkpoint(folder, model_name="otherwise")
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", F.gelu)
        with pytest.raises(
            OSError, match=rf"models:/otherwise/{version}: the model does not draw on this machine what it"
        ):
            resolve_model(f"models:/otherwise/{version}")
    assert not list(cache_dir().iterdir()), "it is not kept either"
    resolve_model(f"models:/otherwise/{version}")


def test_versions_from_before_golden_pairs_are_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=5)
    version = publishing.register(
        folder,
        name="old",
        digest=model_digest(folder),
        python_model_path=MODEL_CODE,
        code_paths=[],
        pip_requirements=["torch"],
        interface=INTERFACE,
    )
    tracking_server.client().delete_model_version_tag("old", str(version.version), "artifacts_digest")
    found = resolve_model(str(version))
    assert found.digest == version.digest
    assert f"{version} was registered without golden pairs" in caplog.text

    weights = artifacts_of("old", version.version) / "artifacts/checkpoint/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(OSError, match=rf"{version}: .* was altered after it was registered: its digest"):
        resolve_model(str(version))
    weights.write_bytes(data[:100])
    with pytest.raises(OSError, match=rf"{version}: .*(damaged|altered)"):
        resolve_model(str(version))
    shutil.rmtree(weights.parents[2])
    with pytest.raises(OSError, match=rf"{version}: cannot download"):
        resolve_model(str(version))


def test_a_server_refuses_a_model_that_is_not_the_registered_one(tmp_path: Path) -> None:
    version = register_checkpoint(tiny_checkpoint(tmp_path / "checkpoint", seed=6), model_name="refused")
    root = artifacts_of("refused", version)
    configuration = yaml.safe_load((root / "MLmodel").read_text())["flavors"]["python_function"]["config"]

    def load(**changes: str) -> None:
        places = {name: str(root / "artifacts" / name) for name in ("checkpoint", "golden")}
        context = PythonModelContext(artifacts={**places, **changes}, model_config=configuration)
        RegisteredStylizer().load_context(context)

    load()
    other = tiny_checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(OSError, match="was altered after it was registered: its digest"):
        load(checkpoint=other)
    shutil.copytree(root / "artifacts/golden", tmp_path / "golden")
    (tmp_path / "golden/blended-stylized.png").write_bytes(picture(0, 57, 90))
    with pytest.raises(OSError, match=r"golden picture .*blended-stylized\.png was altered"):
        load(golden=str(tmp_path / "golden"))
    facts = (tmp_path / "golden/golden.json").read_text().replace("0.25", "99")
    (tmp_path / "golden/golden.json").write_text(facts)
    with pytest.raises(OSError, match="golden was altered after it was registered"):
        load(golden=str(tmp_path / "golden"))
    # another checkpoint with a fitting digest: the pictures give it away
    configuration["digest"] = model_digest(other)
    with pytest.raises(OSError, match="does not draw on this machine what it drew when it was registered"):
        load(checkpoint=other)


def test_the_card_says_what_was_recorded(tmp_path: Path) -> None:
    content, style = (make_corpus(tmp_path / role, role) for role in ("content", "style"))
    config = resolve_config("smoke", 64, ["batch.size=32"])
    run = TrackedRun.start("painters", tags={"nst.commit": "c0ffee", "nst.restarts": "2"})
    run.log_params({"num_workers": "2", **to_dict(config)})
    for role, uri in (("content", content), ("style", style)):
        run.log_corpus(role, uri, Corpus.open(uri).manifest.digest, context=role)
    run.log_metrics({"generator/content": 0.25, "system/node_0/cpu_utilization_percentage": 9}, step=64)
    assert run.finish() == {}
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=8)
    version = register_checkpoint(folder, model_name="described", run_id=run.run_id)

    described = tracking_server.client().get_model_version("described", str(version)).description or ""
    assert described == (artifacts_of("described", version) / "README.md").read_text()
    rows = [line for line in described.splitlines() if line.startswith("| ")]
    for row in (
        f"| digest | `{model_digest(folder)}` |",
        f"| corpus | {style} |",
        f"| digest | `{Corpus.open(style).manifest.digest}` |",
        "| images | 24, shorter side 96 px |",
        "| labels | 4: china-bright 6, china-dark 6, flower-bright 6, flower-dark 6 |",
        "| made from | tests |",
        f"| run | painters, `{run.run_id}` |",
        "| content images seen | 7 of 1,000,000 |",
        "| hardware | workers 2, nodes 1, no GPU was reported |",
        "| restarts | 2 |",
        "| commit | c0ffee |",
        "| code digest | unknown |",
        "| `generator/content` | 0.25 |",
    ):
        assert row in rows, row
    assert "none may differ by more than\n0.25 levels of 255" in described

    # another corpus at the same place is not what it was trained on
    shutil.rmtree(style)
    make_corpus(Path(style), "style", per_label=2)
    shutil.rmtree(content)
    register_checkpoint(folder, model_name="again", run_id=run.run_id)
    described = (artifacts_of("again", 1) / "README.md").read_text()
    assert "| images, labels, source | unknown (it has changed since the training) |" in described
    assert "| images, labels, source | unknown (gone) |" in described
    assert Corpus.open(style).manifest.digest not in described


def test_the_card_of_a_checkpoint_without_a_run_invents_nothing(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=9)
    (Path(folder) / "state.json").unlink()
    version = register_checkpoint(folder, model_name="plain")
    card = (artifacts_of("plain", version) / "README.md").read_text()
    assert "The corpora that it was trained on are unknown" in card
    assert "Its last figures are unknown." in card
    for row in ("run", "hardware", "wall clock", "restarts", "commit"):
        assert f"\n| {row} | unknown |\n" in card
    assert "| content images seen | unknown of 1,000,000 |" in card


# Nothing can be unpickled here: not by the usual ways, nor by others, which the audit hook sees.
NO_PICKLE = """
import pickle, sys
import cloudpickle, mlflow, pandas, torch

def refuse(*given, **options):
    raise SystemExit("something was unpickled")

def audit(event, given):
    if event == "pickle.find_class":
        refuse()

sys.addaudithook(audit)
for module in (pickle, cloudpickle):
    module.load = module.loads = refuse
pickle.Unpickler = torch.load = refuse
"""


def test_the_registered_model_stylizes_where_nst_is_not_installed(tmp_path: Path, store: str) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint", seed=2)
    version = register_checkpoint(folder, model_name="elsewhere")
    root = artifacts_of("elsewhere", version)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        *("", ".py", ".safetensors", ".json", ".png", ".md", ".yaml", ".txt")
    }
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"], "how a pickle begins"
    configuration = yaml.safe_load((root / "MLmodel").read_text())["flavors"]["python_function"]
    assert Path(configuration["model_code_path"]).name == "registered_model.py"
    assert "python_model" not in configuration, "where MLflow notes a pickled model"
    (tmp_path / "content.png").write_bytes(picture(0))
    (tmp_path / "style.png").write_bytes(picture(1, 64, 64))
    code = NO_PICKLE + (
        f"model = mlflow.pyfunc.load_model('models:/elsewhere/{version}')\n"
        "content, style = (open(f'{name}.png', 'rb').read() for name in ('content', 'style'))\n"
        "rows = pandas.DataFrame({'content': [content, content], 'style': [style, content]})\n"
        "done = model.predict(rows, params={'strength': 0.5, 'max_side': 32})\n"
        "open('stylized.png', 'wb').write(done['stylized'][0])\n"
        "import nst\n"
        "print(nst.__file__)\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
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
    registry.set_alias("served", registry.CHAMPION, version)
    port, log_path = free_port(), tmp_path / "serve.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", "models:/served@champion", "--port", str(port), "--host", "127.0.0.1"]
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

        def ask(row: dict[str, str], **params: Any) -> requests.Response:
            body = {"dataframe_records": [row], "params": params}
            return requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)

        (whole,) = ask(row).json()["predictions"]
        # several at once, one of them large enough for tiles
        large = {**row, "content": base64.b64encode(picture(2, 1400, 1000)).decode()}
        with ThreadPoolExecutor(4) as pool:
            answers_at_once = list(pool.map(ask, [large, row, row, row]))
        (small,) = ask(row, strength=0.5, max_side=32, colors="content").json()["predictions"]
        bad_rows = [
            ({**row, "style": base64.b64encode(b"no picture").decode()}, {}, "style of row 0"),
            (row, {"strength": 2.0}, "strength 2.0 is out of range"),
            (row, {"colors": "mauve"}, "colors 'mauve' is unknown"),
            ({"content": row["content"]}, {}, "style"),
        ]
        answers = [(ask(given, **params), reason) for given, params, reason in bad_rows]
    finally:
        end_session(process)
    assert Image.open(io.BytesIO(base64.b64decode(whole["stylized"]))).size == (48, 40)
    (tiled,), *others = (answer.json()["predictions"] for answer in answers_at_once)
    assert Image.open(io.BytesIO(base64.b64decode(tiled["stylized"]))).size == (1400, 1000)
    assert all(other == [whole] for other in others)
    assert Image.open(io.BytesIO(base64.b64decode(small["stylized"]))).size == (32, 27)
    for answer, reason in answers:
        assert answer.status_code == 400, answer.text
        assert reason in answer.json()["message"]
        assert "Traceback" not in answer.text


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
