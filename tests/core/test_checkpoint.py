"""Checkpoints: both layouts load, whatever is wrong with a folder is one line that names the file and the fault."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmd_export.checkpoint import BUILT_IN, PICKLE, SAFETENSORS, load_checkpoint, load_matching
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.manifest import CheckpointRef
from tests.models import save_model, weights_of, write_weights

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(model: Path | str, *words: str, kind: type[UsageError | NotAvailableError] = UsageError) -> str:
    with pytest.raises(kind) as error:
        load_checkpoint(model)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what loads


def test_a_flat_folder(tiny: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    assert (checkpoint.name, checkpoint.shape, checkpoint.classes) == ("tiny", (1, 8, 8), None)
    assert (checkpoint.plan, checkpoint.warnings, checkpoint.licence) == (None, (), None)
    assert not any(module.training for module in checkpoint.denoiser.children())
    assert not any(parameter.requires_grad for parameter in checkpoint.denoiser.parameters())
    for name, tensor in weights_of(tiny).items():
        assert torch.equal(checkpoint.denoiser.get_parameter(f"unet.{name}"), tensor)


def test_a_pipeline_folder_is_the_same_checkpoint(tiny: Path, tmp_path: Path) -> None:
    for part, names in {"unet": (CONFIG, SAFETENSORS), "scheduler": (SCHEDULER,)}.items():
        (tmp_path / part).mkdir()
        for name in names:
            shutil.copy(tiny / name, tmp_path / part / name)
    assert load_checkpoint(tmp_path).sha256 == load_checkpoint(tiny).sha256


def test_what_a_diffusers_pipeline_saves(tiny: Path, tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel.from_pretrained(tiny)
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler.from_pretrained(tiny)).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).sha256 == load_checkpoint(tiny).sha256


def test_an_oblong_class_conditional_model(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_model(tmp_path, sample_size=(8, 12), num_class_embeds=3))
    assert (checkpoint.shape, checkpoint.classes) == ((1, 8, 12), 3)


def test_the_built_in_model() -> None:
    checkpoint = load_checkpoint("digits")
    assert set(BUILT_IN) == {"digits"}
    assert (checkpoint.name, checkpoint.shape, checkpoint.licence) == ("digits", (1, 8, 8), "Apache-2.0")


def test_the_hash_is_of_content_only(folder: Path, tmp_path: Path) -> None:
    sha256 = load_checkpoint(folder).sha256
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    edit(moved / CONFIG, _diffusers_version="0.0.1", _name_or_path="/home/me")
    edit(moved / SCHEDULER, _diffusers_version="0.0.1", clip_sample_range=1)
    assert load_checkpoint(moved).sha256 == sha256
    edit(moved / SCHEDULER, beta_end=0.021)
    changed = load_checkpoint(moved).sha256
    weights = weights_of(moved)
    weights["conv_in.bias"][0] += 1e-7
    write_weights(moved, weights)
    assert len({sha256, changed, load_checkpoint(moved).sha256}) == 3


def test_a_checkpoint_is_told_by_its_hash(tiny: Path) -> None:
    own = load_checkpoint(tiny)
    assert load_matching(str(tiny), CheckpointRef(name="tiny", sha256=own.sha256)).sha256 == own.sha256
    with pytest.raises(UsageError, match=rf"tiny has hash {own.sha256[:12]}, .* built from other with 000000000000"):
        load_matching(str(tiny), CheckpointRef(name="other", sha256="0" * 64))


def test_the_float64_copy_leaves_the_original(tiny: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    double = checkpoint.as_double()
    assert {p.dtype for p in double.denoiser.parameters()} == {torch.float64}
    assert {p.dtype for p in checkpoint.denoiser.parameters()} == {torch.float32}


def test_weights_are_doubled_for_one_block(tiny: Path) -> None:
    checkpoint = load_checkpoint(tiny)
    before = {name: value.clone() for name, value in checkpoint.denoiser.state_dict().items()}
    copied = checkpoint.as_double().denoiser.state_dict()

    def fail_inside() -> None:
        with checkpoint.doubled() as double:
            inside = double.denoiser.state_dict()
            assert all(torch.equal(inside[name], value) for name, value in copied.items())
            double.denoiser.get_submodule("network").register_buffer("stored", torch.ones((), dtype=torch.float64))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    after = checkpoint.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("text", ["{", "[]", '{"solver": "ddim"}'])
def test_a_damaged_plan(folder: Path, text: str) -> None:
    (folder / "plan.json").write_text(text)
    refused(folder, "plan")


# --- weights


def test_missing_weights(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    refused(folder, str(folder / SAFETENSORS), "do not exist")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"garbage" + data,
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data + b"\0",
    ],
)
def test_truncated_or_garbage_weights(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / SAFETENSORS
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, f"weights {path} cannot be read", "copy or download them again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    weights = weights_of(folder)
    weights["mid_block.resnets.0.conv1.weight"][1, 2, 0, 1] = value
    write_weights(folder, weights)
    refused(folder, "mid_block.resnets.0.conv1.weight holds NaN or infinity", str(folder))


def test_a_missing_and_an_unexpected_tensor(folder: Path) -> None:
    weights = weights_of(folder)
    write_weights(folder, {name: value for name, value in weights.items() if not name.startswith("conv_out")})
    refused(folder, "do not fit the config; missing: conv_out.bias, conv_out.weight")
    write_weights(folder, weights | {"conv_extra.weight": torch.zeros(1)})
    refused(folder, "do not fit the config; unexpected: conv_extra.weight")
    renamed = {name.replace("conv_in", "conv_first"): value for name, value in weights.items()}
    write_weights(folder, renamed)
    refused(folder, "missing: conv_in.bias, conv_in.weight; unexpected: conv_first.bias, conv_first.weight")
    write_weights(folder, {"conv_in.bias": weights["conv_in.bias"]})
    refused(folder, "missing: conv_in.weight, conv_norm_out.bias, ", f"... ({len(weights) - 1} in all)")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    write_weights(folder, weights_of(folder) | {"conv_in.weight": torch.zeros(8, 3, 3, 3)})
    refused(folder, "conv_in.weight is (8, 3, 3, 3), the config says (8, 1, 3, 3)")


# --- pickles


def test_a_pickle_loads_with_a_warning(folder: Path) -> None:
    expected = load_checkpoint(folder).sha256
    torch.save(weights_of(folder), folder / PICKLE)
    assert load_checkpoint(folder).warnings == ()  # safetensors first
    (folder / SAFETENSORS).unlink()
    checkpoint = load_checkpoint(folder)
    assert checkpoint.sha256 == expected
    assert checkpoint.warnings == (f"{PICKLE} is a pickle, read with weights_only=True; prefer safetensors",)


class Attack:
    """Runs a call of its choice when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("save", ["torch", "plain"])
def test_a_malicious_pickle_does_not_run(folder: Path, tmp_path: Path, save: str) -> None:
    marker = tmp_path / "attacked"
    weights = {**weights_of(folder), "conv_in.bias": Attack(marker)}
    (folder / SAFETENSORS).unlink()
    if save == "torch":
        torch.save(weights, folder / PICKLE)
    else:
        (folder / PICKLE).write_bytes(pickle.dumps({"conv_in.bias": Attack(marker)}))
    refused(folder, str(folder / PICKLE), "weights_only=True", "convert to safetensors")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()  # the attack itself works


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 not a zip"])
def test_a_damaged_pickle(folder: Path, content: bytes) -> None:
    (folder / SAFETENSORS).unlink()
    (folder / PICKLE).write_bytes(content)
    refused(folder, str(folder / PICKLE), "convert to safetensors")


def test_a_pickle_of_something_else(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    torch.save([torch.zeros(1)], folder / PICKLE)
    refused(folder, "hold list, not a state dict of tensors")
    torch.save({"conv_in.bias": 3}, folder / PICKLE)
    refused(folder, "not a state dict of tensors")


# --- configs


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "Transformer2DModel", None, 7])
def test_another_model_class(folder: Path, name: Any) -> None:
    edit(folder / CONFIG, _class_name=name)
    refused(folder, f"model class {name!r} is not supported; supported: UNet2DModel, UNet2DCond", str(folder / CONFIG))


def test_different_channels_in_and_out(tmp_path: Path) -> None:
    save_model(tmp_path, in_channels=1, out_channels=3)
    refused(tmp_path, "in_channels 1 and out_channels 3 differ")


@pytest.mark.parametrize("size", [None, "8", [8], [8, 8, 8], 8.5])
def test_a_sample_size_that_is_none(folder: Path, size: Any) -> None:
    edit(folder / CONFIG, sample_size=size)
    refused(folder, f"sample_size is {size!r}", "an integer or two are expected")


@pytest.mark.parametrize(
    "changes", [{"down_block_types": ["NoBlock2D"]}, {"block_out_channels": [8, 16]}, {"norm_num_groups": 3}]
)
def test_a_config_that_diffusers_refuses(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / CONFIG, **changes)
    refused(folder, str(folder / CONFIG), "diffusers refuses it")


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER])
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "holds list")],
)
def test_a_config_that_is_none(folder: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    refused(folder, str(folder / name), words)


def test_a_scheduler_that_is_not_supported(folder: Path) -> None:
    edit(folder / SCHEDULER, _class_name="NoSuchScheduler")
    refused(folder, "scheduler 'NoSuchScheduler' is not supported; supported: DDIMScheduler, DDPMScheduler")
    edit(folder / SCHEDULER, _class_name="DDIMScheduler", thresholding=True)
    refused(folder, "thresholding")


# --- names


@pytest.mark.parametrize("model", ["no-such-model", "/no/such/folder", "./owner/name", "a/b/c", ""])
def test_a_model_that_does_not_exist(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the network was used"))
    refused(model or str(tmp_path / "empty"), "does not exist", "digits")


def test_a_file_is_no_model(tiny: Path) -> None:
    refused(tiny / SAFETENSORS, "is a file", "a diffusers folder, a hub id or one of digits")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("We couldn't connect to 'https://huggingface.co'\nand more"), "couldn't connect"),
        (ConnectionError(""), "ConnectionError"),
    ],
)
def test_a_hub_id_without_a_network(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = refused("google/ddpm-cifar10-32", words, kind=NotAvailableError)
    assert message.startswith("model google/ddpm-cifar10-32 is no local folder and could not be downloaded: ")
    assert NotAvailableError.exit_code == 3
    assert asked == [("google/ddpm-cifar10-32", ["*.json", "README.md", f"*{SAFETENSORS}"])]  # never a pickle


def test_a_hub_id_that_is_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / ("ab" * 20)
    snapshot.symlink_to(tiny, target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    checkpoint = load_checkpoint("owner/nice-model")
    assert checkpoint.sha256 == load_checkpoint(tiny).sha256
    assert checkpoint.name == "nice-model"


# --- folders that are something else


def test_a_folder_that_is_something_else_is_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    refused(other, "other holds no network: ", "config.json does not exist, nor unet/ nor transformer/; give")
    (other / "settings.json").write_text("{}")
    refused(other, "a run that is not finished; go on with finetune --resume --out")
    (other / "manifest.json").write_text("{}")
    refused(other, "other is a bundle; give the model or the run folder that it was built from")
    (folder / "manifest.json").write_text("{}")  # somebody's own file beside a model
    load_checkpoint(folder)


def test_no_model_and_one_misspelt() -> None:
    refused("", "no model is given; name one: digits")
    refused("digit", "model digit does not exist; did you mean digits?")
    refused("nowhere", "model nowhere does not exist; built in: digits")


def test_a_bare_model_without_its_scheduler_names_the_pipeline(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe" / "scheduler").mkdir(parents=True)
    bare = Path(shutil.copytree(folder, tmp_path / "pipe" / "unet"))
    shutil.move(bare / SCHEDULER, tmp_path / "pipe" / "scheduler")
    refused(bare, f"unet/{SCHEDULER} does not exist; give the pipeline folder {tmp_path / 'pipe'}, or copy the")
    (folder / SCHEDULER).unlink()
    refused(folder, f"{SCHEDULER} does not exist; copy the scheduler_config.json of its pipeline there")


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_labels_that_are_no_numbers_of_classes_are_refused(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", class_embed_type=kind)
    with pytest.raises(UsageError, match=f"class_embed_type is '{kind}', which is not supported; num_class_embeds is"):
        load_checkpoint(model)
