"""Conditional models on the command line: values from files, guidance from build to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from mmd_export.bundle import Bundle
from mmd_export.commands.sample import SampleOptions, sample
from tests.cli.conftest import Command
from tests.families import save_network

LENGTH, WIDTH = 6, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels of 3 channels, so that they can be drawn; text of width 12."""
    return save_network(tmp_path_factory.mktemp("cli") / "text", "text-labels", in_channels=3, out_channels=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    one, many = (generator.standard_normal((*rows, LENGTH, WIDTH)).astype(np.float32) for rows in ((), (3,)))
    np.save(folder / "one.npy", one)
    np.save(folder / "many.npy", many.astype(np.float64))
    np.save(folder / "wrong.npy", one[:, :5])
    np.save(folder / "labels.npy", np.array([0, 4, 2]))
    np.save(folder / "far.npy", np.array([0, 5, 2]))
    np.save(folder / "nan.npy", np.full_like(one, np.nan))
    (folder / "text.npy").write_text("a prompt")
    np.save(folder / "objects.npy", np.array([one, None], dtype=object))
    for name, shape in (("cut", "(6, 12"), ("vast", f"({10**20},)")):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}".encode().ljust(118) + b"}\n"
        (folder / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    safetensors.numpy.save_file({"encoder_hidden_states": one, "other": many}, folder / "both.safetensors")
    safetensors.numpy.save_file({"a": one, "b": one}, folder / "neither.safetensors")
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through the command line, with guidance."""
    from mmd_export.cli import app, run

    out = tmp_path_factory.mktemp("bundle") / "guided"
    options = ["--steps", "2", "--guidance-scale", "2", "--guidance-form", "doubled", "--text-length", str(LENGTH)]
    assert run(app, ["build", str(model), "--target", "onnx", "--out", str(out), *options]) == 0
    return out


def drawn(source: Path, **options: Any) -> NDArray[Any]:
    return sample(SampleOptions(str(source), 5, 3, **options))


def test_a_guided_bundle_and_its_model_draw_the_same(
    bundle: Path, model: Path, texts: Path, command: Command, tmp_path: Path
) -> None:
    manifest = Bundle.open(bundle).manifest
    assert [spec.name for spec in manifest.inputs] == [
        "noise", "encoder_hidden_states", "class_labels", "negative_prompt_embeds",
    ]  # fmt: skip
    given = [
        "--condition", f"encoder_hidden_states={texts / 'many.npy'}",
        "--condition", f"class_labels={texts / 'labels.npy'}",
        "--condition", f"negative_prompt_embeds={texts / 'one.npy'}", "--count", "3", "--seed", "5",
    ]  # fmt: skip
    network = ["--guidance-scale", "2", "--text-length", LENGTH]
    code, _, _ = command("sample", bundle, *given, "--out", tmp_path / "bundle.png")
    assert code == 0
    code, _, error = command("sample", model, *given, *network, "--steps", "2", "--out", tmp_path / "model.png")
    assert code == 0, error
    assert [spec.below for spec in manifest.inputs] == [None, None, 5, None]
    conditions = tuple(given[i] for i in (1, 3, 5))
    from_bundle, from_torch = (
        drawn(bundle, conditions=conditions),
        drawn(bundle, conditions=conditions, runtime="torch", checkpoint=str(model)),
    )
    assert float(np.abs(from_bundle - from_torch).max()) <= 1e-5
    others = drawn(bundle, conditions=(conditions[0].replace("many", "one"), *conditions[1:]))
    assert float(np.abs(from_bundle - others).max()) > 1e-3


def test_one_value_for_all_images_and_safetensors(model: Path, texts: Path) -> None:
    from mmd_export.network_options import NetworkOptions

    network = NetworkOptions(text_length=LENGTH)
    one, both = (
        drawn(model, steps=1, class_label=2, network=network, conditions=(f"encoder_hidden_states={texts / file}",))
        for file in ("one.npy", "both.safetensors")
    )
    assert np.array_equal(one, both)


TEXT = "encoder_hidden_states="


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), ("condition 'encoder_hidden_states' is missing", "float32, 6x12 for each image")),
        ((TEXT + "wrong.npy",), ("is (6, 5)", "(6, 12) for all images or (3, 6, 12) for each")),
        ((TEXT + "nan.npy",), ("holds NaN",)),
        ((TEXT + "none.npy",), ("none.npy cannot be read",)),
        ((TEXT + "text.npy",), ("text.npy cannot be read: it is no .npy; write it with numpy.save",)),
        ((TEXT + "objects.npy",), ("objects.npy cannot be read: it holds no plain numbers; write it",)),
        ((TEXT + "cut.npy",), ("cut.npy cannot be read: ",)),
        ((TEXT + "vast.npy",), ("vast.npy cannot be read: ",)),
        ((TEXT + "labels.npy",), ("holds int64, float32 is expected",)),
        ((TEXT + "neither.safetensors",), ("holds a, b; 'encoder_hidden_states' is expected",)),
        ((TEXT + "one.npy", TEXT + "many.npy"), ("encoder_hidden_states is given twice",)),
        ((TEXT + "one.npy", "prompt=one.npy"), ("condition 'prompt' is unknown; known: encoder_hidden_states",)),
        (("encoder_hidden_states",), ("name=FILE.npy",)),
        ((TEXT + "one.npy", "class_labels=far.npy"), ("holds 0 to 5; 0 to 4 are expected",)),
    ],
)
def test_conditions_that_do_not_fit(
    given: tuple[str, ...], words: tuple[str, ...], model: Path, texts: Path, command: Command, tmp_path: Path
) -> None:
    """One line and exit code 2, before anything is drawn."""
    out, arguments = tmp_path / "grid.png", []
    for text in given:
        name, equals, file = text.partition("=")
        arguments += ["--condition", f"{name}{equals}{texts / file if file else ''}"]
    code, _, error = command(
        "sample", model, "--steps", "1", "--count", "3", "--text-length", LENGTH, *arguments, "--out", out
    )
    assert code == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error
    assert not out.exists()


def test_ranges_and_golden_images_are_those_of_the_given_values(
    model: Path, texts: Path, command: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", 3.0 * np.load(texts / "many.npy"))
    arguments = ("build", model, "--target", "onnx", "--steps", 1, "--precision", "int8", "--calibration", 4)
    text = ("--text-length", LENGTH)
    for name, given in (("usual", ()), ("own", ("--condition", f"{TEXT}{tmp_path / 'wide.npy'}"))):
        code, _, error = command(*arguments, *text, *given, "--skip-verify", "--out", tmp_path / name)
        assert code == 0, error
        warned = "the int8 ranges are those of unit normal numbers in encoder_hidden_states, far from" in error
        assert warned == (name == "usual")
    usual, own = (Bundle.open(tmp_path / name) for name in ("usual", "own"))
    told = own.golden().inputs["encoder_hidden_states"]
    np.testing.assert_array_equal(told, np.load(tmp_path / "wide.npy")[np.arange(len(told)) % 3].astype(np.float32))
    assert usual.artefact_sha256 != own.artefact_sha256
    code, out, error = command("verify", own.folder, "--checkpoint", model)
    assert code == 0, error
    assert "not checked" not in out


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("wrong.npy", "is (6, 5); (6, 12) for all images or (N, 6, 12) for each is expected"),
        ("empty.npy", "is (0, 6, 12); (6, 12) for all images or (N, 6, 12) for each is expected"),
        ("nan.npy", "holds NaN"),
        ("none.npy", "none.npy cannot be read"),
    ],
)
def test_values_to_calibrate_with_that_do_not_fit(
    file: str, said: str, model: Path, texts: Path, command: Command, tmp_path: Path
) -> None:
    np.save(texts / "empty.npy", np.zeros((0, LENGTH, WIDTH), np.float32))
    arguments = ("build", model, "--target", "onnx", "--steps", 1, "--precision", "int8", "--text-length", LENGTH)
    code, _, error = command(*arguments, "--condition", f"{TEXT}{texts / file}", "--out", tmp_path / "b")
    assert (code, error.count("\n")) == (2, error.count("mmd-export:"))
    assert said in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--class-label", 5), "--class-label is 5; the model knows 0 to 4"),
        (("--condition", "class_labels=far.npy"), "holds 0 to 5; 0 to 4 are expected"),
    ],
)
def test_a_bundle_knows_the_range_of_its_labels(
    given: tuple[Any, ...], said: str, bundle: Path, texts: Path, command: Command, tmp_path: Path
) -> None:
    """The runtime is not asked: OpenVINO draws something of any label."""
    told = [str(word).replace("far.npy", str(texts / "far.npy")) for word in given]
    for name in ("encoder_hidden_states", "negative_prompt_embeds"):
        told += ["--condition", f"{name}={texts / 'one.npy'}"]
    out = tmp_path / "grid.png"
    code, _, error = command("sample", bundle, "--count", 3, *told, "--out", out)
    assert (code, error.strip().count("\n")) == (2, 0), error
    assert said in error
    assert not out.exists()


def test_labels_of_a_bundle_are_those_of_its_model_where_none_is_given(bundle: Path, texts: Path) -> None:
    np.save(texts / "first.npy", np.arange(3))
    conditions = tuple(f"{name}={texts / 'many.npy'}" for name in ("encoder_hidden_states", "negative_prompt_embeds"))
    found, expected = (
        drawn(bundle, conditions=(*conditions, *labels)) for labels in ((), (f"class_labels={texts / 'first.npy'}",))
    )
    np.testing.assert_array_equal(found, expected)


def test_a_bundle_without_its_text(bundle: Path, command: Command, tmp_path: Path) -> None:
    code, _, error = command("sample", bundle, "--class-label", 1, "--out", tmp_path / "grid.png")
    assert code == 2
    assert "condition 'encoder_hidden_states' is missing" in error


def test_network_options_of_a_bundle(bundle: Path, command: Command, tmp_path: Path) -> None:
    code, _, error = command("sample", bundle, "--guidance-scale", 2, "--out", tmp_path / "grid.png")
    assert code == 2
    assert "guidance and text length built in" in error


def test_inspect_names_the_conditions(model: Path, command: Command) -> None:
    code, out, _ = command("inspect", model, "--guidance-scale", 3, "--text-length", LENGTH, "--json", "-")
    assert code == 0
    assert '"negative_prompt_embeds"' in out
    assert '"guidance_scale": 3.0' in out


def test_a_conditional_model_is_not_tuned(model: Path, command: Command, tmp_path: Path) -> None:
    save_network(tmp_path / "plain", "text", in_channels=3, out_channels=3)
    code, _, error = command("finetune", tmp_path / "plain", "--steps", 2, "--out", tmp_path / "run")
    assert code == 2
    assert "is conditional on encoder_hidden_states; only unconditional ones are tuned" in error
