"""Kit ``triton``: its config against the server's own schema, its client against a stand-in of the server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image

from mmd_export.batch import BatchSpec
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle, TensorSpec
from mmd_export.commands.embed import EmbedOptions, embed
from mmd_export.errors import BundleError
from mmd_export.pictures import grid
from mmd_runtime.app import open_bundle
from tests.attacks import ATTACKS, Attack
from tests.contract.required import skip
from tests.export.bundles import draft, make
from tests.kits.projects import module_of
from tests.kits.wrong import with_other_sample
from tests.models import LABELS, save_model

if importlib.util.find_spec("tritonclient") is None:
    skip("kit", "triton", "tritonclient missing; pip install tritonclient grpcio protobuf")

from tests.kits.triton_stand_in import Model, Service, read_config, serving, type_name

NOTHING_LISTENS = "127.0.0.1:9"


def project(bundle: Path, out: Path) -> Path:
    embed(EmbedOptions(bundle, "triton", out))
    return out


def model_of(out: Path) -> Path:
    (model,) = (out / "models").iterdir()
    return model


def client_of(out: Path) -> ModuleType:
    return module_of(out / "client.py")


@pytest.fixture(scope="module")
def out(digits_batched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(digits_batched, tmp_path_factory.mktemp("projects") / "triton")


@pytest.fixture(scope="module")
def served(out: Path) -> Iterator[tuple[str, Service]]:
    with serving(model_of(out)) as found:
        yield found


def config_of(tmp_path: Path, **changes: Any) -> Any:
    """The config of a bundle whose manifest is the tests' own but for ``changes``."""
    return read_config(model_of(project(make(tmp_path / "b", draft=draft(**changes)).folder, tmp_path / "out")))


def of_batch(*sizes: int, limits: tuple[int, int] | None = None) -> dict[str, Any]:
    shape: tuple[int | Literal["batch"], ...] = ("batch", 1, 2, 2)
    return {
        "batch": BatchSpec(sizes=sizes) if sizes else BatchSpec(range=limits),
        "inputs": (TensorSpec(name="noise", dtype="float32", shape=shape),),
        "outputs": (TensorSpec(name="sample", dtype="float32", shape=shape),),
    }


def test_a_range_is_batched_by_the_server(out: Path) -> None:
    config = read_config(model_of(out))
    assert (config.name, config.backend, config.default_model_filename) == ("digits-2", "onnxruntime", "model.onnx")
    assert config.max_batch_size == 4
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 256
    assert [(list(each.dims), type_name(each)) for each in config.input] == [([1, 8, 8], "TYPE_FP32")]
    assert [(list(each.dims), type_name(each)) for each in config.output] == [([1, 8, 8], "TYPE_FP32")]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4]


def test_a_list_is_not_mixed_by_the_server(tmp_path: Path) -> None:
    config = config_of(tmp_path, **of_batch(1, 4, 8))
    assert config.max_batch_size == 8
    assert not config.HasField("dynamic_batching")
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4, 8]


def test_a_list_without_gaps_is_a_range(tmp_path: Path) -> None:
    config = config_of(tmp_path, **of_batch(1, 2, 3))
    assert config.max_batch_size == 3
    assert config.HasField("dynamic_batching")


def test_a_static_graph_has_its_batch_in_its_shape(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, 1, 2, 2]


def test_an_engine_runs_on_the_gpu_with_a_profile_a_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, format="tensorrt", **of_batch(1, 4, 8))
    (group,) = config.instance_group
    assert config.backend == "tensorrt"
    assert group.Kind.Name(group.kind) == "KIND_GPU"
    assert list(group.profile) == ["0", "1", "2"]
    (group,) = config_of(tmp_path / "range", format="tensorrt", **of_batch(limits=(1, 8))).instance_group
    assert list(group.profile) == []


def test_the_strict_schema_refuses_what_it_does_not_know(out: Path, tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text((model_of(out) / "config.pbtxt").read_text() + "max_batches: 3\n")
    with pytest.raises(text_format.ParseError, match="max_batches"):
        read_config(tmp_path)


def test_the_warm_up_runs_golden_noise(out: Path, digits_batched: Path) -> None:
    assert Model(model_of(out)).warmed == [1, 4]
    data = np.frombuffer((model_of(out) / "warmup/noise-1.bin").read_bytes(), "<f4")
    np.testing.assert_array_equal(data, Bundle.open(digits_batched).golden().noise[0].ravel())


def test_the_version_of_the_model_is_the_bundle(out: Path, digits_batched: Path) -> None:
    assert Bundle.open(model_of(out) / "1").manifest == Bundle.open(digits_batched).manifest


def test_the_self_test_passes(out: Path, served: tuple[str, Service], capsys: pytest.CaptureFixture[str]) -> None:
    url, service = served
    assert client_of(out).main(["--url", url, "--self-test"]) == 0
    assert f"self-test passed: digits-2 in Triton at {url}" in capsys.readouterr().out
    assert set(service.batches) <= {1, 2, 3, 4}


def test_a_seed_gives_the_picture_of_the_package(
    out: Path, digits_batched: Path, served: tuple[str, Service], tmp_path: Path
) -> None:
    picture = tmp_path / "seven.png"
    url, _ = served
    assert client_of(out).main(["--url", url, "--seed", "7", "--count", "5", "--out", str(picture)]) == 0
    expected = grid(open_bundle(digits_batched).sample(seed=7, count=5))[:, :, 0]
    difference = np.abs(np.asarray(Image.open(picture)).astype(int) - expected)
    assert difference.max() <= 1


def test_a_static_graph_is_served_image_by_image(
    digits_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project(digits_onnx, tmp_path / "static")
    with serving(model_of(out)) as (url, service):
        assert client_of(out).main(["--url", url, "--self-test"]) == 0
        assert set(service.batches) == {1}


@pytest.mark.parametrize("batch", ["1..3", "2"])
def test_labels_noisy_steps_and_bytes_are_served(batch: str, tmp_path: Path) -> None:
    """A class-conditional model with noise in its steps, and one without, uint8 out."""
    folder = save_model(tmp_path / "model", seed=2, **LABELS)
    for name, sampler in (("labels", "ddim"), ("noisy", "ddpm")):
        bundle = tmp_path / f"{name}.bundle"
        build(BuildOptions(
            str(folder), "onnx", bundle, steps=2, sampler=sampler, batch=batch, output="uint8", verify=False
        ))  # fmt: skip
        out = project(bundle, tmp_path / name)
        config = read_config(model_of(out))
        assert (config.max_batch_size == 3) == (batch == "1..3" and name == "labels")
        assert type_name(config.output[0]) == "TYPE_UINT8"
        assert {each.name for each in config.input} >= {"noise", "class_labels"}
        assert ("step_noise" in {each.name for each in config.input}) == (name == "noisy")
        with serving(model_of(out)) as (url, _):
            client = client_of(out)
            assert client.main(["--url", url, "--self-test"]) == 0
            options = ["--url", url, "--class-label", "3", "--count", "4", "--out", str(tmp_path / "three.png")]
            assert client.main(options) == 0


def test_a_full_queue_is_asked_again(out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = client_of(out)
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    options = ["--count", "1", "--out", str(tmp_path / "one.png")]
    with serving(model_of(out), refusals=2) as (url, _):
        assert client.main(["--url", url, *options]) == 0
    with serving(model_of(out), refusals=3) as (url, _):
        assert client.main(["--url", url, *options]) == 1


def test_no_server_is_one_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert client_of(out).main(["--url", NOTHING_LISTENS, "--self-test"]) == 3
    assert f"no model digits-2 on a Triton server at {NOTHING_LISTENS}" in capsys.readouterr().err


def test_another_model_is_refused(
    digits_onnx: Path, served: tuple[str, Service], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = served
    assert client_of(out).main(["--url", url, "--bundle", str(digits_onnx), "--self-test"]) == 2
    assert "serve this project's models/" in capsys.readouterr().err


def test_a_wrong_image_fails_the_self_test(
    digits_batched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project(with_other_sample(digits_batched, tmp_path / "wrong", 0.001), tmp_path / "out")
    with serving(model_of(out)) as (url, _):
        assert client_of(out).main(["--url", url, "--self-test"]) == 4
    assert "self-test FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_every_attack_is_refused(
    attack: Attack, attacks: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the client before it asks a server, and by ``embed``."""
    assert client_of(out).main(["--url", NOTHING_LISTENS, "--bundle", str(attacks / attack.id), "--self-test"]) == 5
    assert attack.says in capsys.readouterr().err
    with pytest.raises(BundleError) as caught:
        embed(EmbedOptions(attacks / attack.id, "triton", tmp_path / "out"))
    assert attack.says in str(caught.value)
    assert not (tmp_path / "out").exists()
