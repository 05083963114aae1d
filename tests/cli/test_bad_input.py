"""Bad input gets one clear line, the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import load_file, save_file

from mmd_export import __version__
from mmd_export.checkpoint import BUILT_IN
from mmd_export.cli import app, run
from mmd_export.cli_errors import _EXTRAS
from mmd_export.errors import NotAvailableError
from tests.cli.conftest import Command, fails

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("torch", NotAvailableError.exit_code, "error: torch is not installed; pip install 'mmd-export[tune]'"),
        ("sklearn", NotAvailableError.exit_code, "error: sklearn is not installed; pip install 'mmd-export[tune]'"),
        ("torch.new", 1, "unexpected error: ModuleNotFoundError: No module named 'torch.new'; set "),
        ("of_ours", 1, "unexpected error: ModuleNotFoundError: No module named 'of_ours'; set "),
    ],
)
def test_a_package_that_is_missing(name: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def lacking(**_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    assert run(lacking, []) == code
    assert f"mmd-export: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault", ["raise ImportError('no symbol')", "import no_such_part", "raise ImportError('a', name='onnx_ir.passes')"]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_package_that_does_not_import(
    fault: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a library that it needs is another one, or a part of it is missing."""
    (tmp_path / "onnx_ir.py").write_text(fault, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnx_ir", raising=False)

    def importing(**_: object) -> None:
        try:
            importlib.import_module("onnx_ir")
        except ImportError as error:
            if wrapped:
                raise RuntimeError("failed to import a part") from error
            raise

    assert run(importing, []) == NotAvailableError.exit_code
    said = capsys.readouterr().err
    assert re.search(r"error: onnx_ir is installed but does not import: \w+Error: .*; pip install --force-reinst", said)


class Importing(torch.nn.Module):
    """An error of its own, behind a call of torch."""

    def forward(self, error: ImportError) -> None:
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'a' from 'mmd_export.b'", name="mmd_export.b"),
        ImportError("cannot import name 'a' from 'torch'", name="torch"),
        ImportError("4-bit weights need bitsandbytes"),
    ],
)
def test_an_import_that_is_no_fault_of_a_package(error: ImportError, capsys: pytest.CaptureFixture[str]) -> None:
    def importing(**_: object) -> None:
        Importing()(error)

    assert run(importing, []) == 1
    assert f"unexpected error: ImportError: {error}" in capsys.readouterr().err


def test_what_a_package_asks_for_later_is_no_fault_of_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "def load():\n    raise ImportError('4-bit weights need another package')\n"
    (tmp_path / "onnx_ir.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnx_ir", raising=False)
    package = importlib.import_module("onnx_ir")
    del sys.modules["onnx_ir"]  # not by monkeypatch, which would put this one back
    assert run(lambda **_: package.load(), []) == 1
    assert "unexpected error: ImportError: 4-bit weights need" in capsys.readouterr().err


def test_the_extras_are_those_of_the_project() -> None:
    imported = {"scikit-learn": "sklearn", "coreai-core": "coreai"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, extra in _EXTRAS.items():
        names = [re.split("[>=;\\[ ]", line)[0] for line in extras[extra]]
        assert package in [imported.get(name, name.replace("-", "_")) for name in names], (package, extra)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in diffusers folder to damage."""
    return Path(shutil.copytree(BUILT_IN["digits"], tmp_path / "model"))


def build(model: object, out: Path, *more: object) -> tuple[object, ...]:
    return ("build", model, "--target", "onnx", "--out", out, "--steps", 2, *more)


def test_missing_weights(command: Command, model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).unlink()
    fails(command, 2, "do not exist", *build(model, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_truncated_weights(command: Command, model: Path, tmp_path: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])
    fails(command, 2, "cannot be read", *build(model, tmp_path / "b"))


def test_nan_weights(command: Command, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["conv_in.weight"] = np.full_like(tensors["conv_in.weight"], np.nan)
    save_file(tensors, model / WEIGHTS)
    fails(command, 2, "conv_in.weight holds NaN", *build(model, tmp_path / "b"))


def test_unknown_scheduler(command: Command, model: Path, tmp_path: Path) -> None:
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "MysteryScheduler"}))
    fails(command, 2, "MysteryScheduler", *build(model, tmp_path / "b"))


def test_unknown_scheduler_setting(command: Command, model: Path, tmp_path: Path) -> None:
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", "warp": 9}))
    fails(command, 2, "'warp'", *build(model, tmp_path / "b"))


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--steps", 0), 2, "--steps is 0"),
        (("--steps", 1001), 2, "1001"),
        (("--batch", "0"), 2, "--batch"),
        (("--batch", "many"), 2, "--batch is 'many'"),
        (("--target", "abacus"), 2, "abacus"),
        (("--sampler", "magic"), 2, "magic"),
        (("--spacing", "odd"), 2, "--spacing 'odd' is unknown; known: leading, trailing, linspace, mmd-ddm"),
        (("--text-length", 7), 2, "error: model digits takes no text, --text-length is 7; leave it out"),
        (("--eta", "-1"), 2, "-1"),
        (("--precision", "fp3"), 2, "target onnx has no --precision fp3; it has fp32"),
        (("--precision", "w16"), 3, "target onnx has no --precision w16"),
        (("--form", "rolled"), 2, "target onnx has no --form rolled"),
        (("--precision", "int8", "--calibration", "0"), 2, "--calibration is 0; it must be from 1 to 4,096 images"),
        (
            ("--precision", "int8", "--calibration", "4097"),
            2,
            "--calibration is 4097; it must be from 1 to 4,096 images",
        ),
        (("--calibration", "8"), 2, "--calibration is 8, but --precision fp32 has no ranges to set"),
        (("--output", "int3"), 2, "target onnx has no --output int3"),
        (("--output", "float", "--target", "torch", "--form", "loop"), 3, "target torch has no --form loop"),
    ],
)
def test_wrong_options(command: Command, tmp_path: Path, more: tuple[object, ...], code: int, says: str) -> None:
    fails(command, code, says, *build("digits", tmp_path / "b", *more))
    assert list(tmp_path.iterdir()) == []


def test_calibration_without_ranges_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    _, _, err = command(*build("digits", tmp_path / "b", "--calibration", 5))
    assert err == ("mmd-export: error: --calibration is 5, but --precision fp32 has no ranges to set; leave it out\n")


def test_model_that_does_not_exist(command: Command, tmp_path: Path) -> None:
    fails(command, 2, "does not exist", *build(tmp_path / "nowhere", tmp_path / "b"))


def test_folder_that_exists(command: Command, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep me")
    fails(command, 2, "already exists", *build("digits", tmp_path / "b"))
    assert (tmp_path / "b" / "mine.txt").read_text() == "keep me"


def test_batch_the_graph_was_not_built_for(digits_bundle: Path) -> None:
    from mmd_export.bundle import Bundle
    from mmd_export.errors import UsageError
    from mmd_export.runtime import RunOptions
    from mmd_runtime.registry import runtime_for

    session = runtime_for("onnx").open(Bundle.open(digits_bundle), RunOptions())
    with pytest.raises(UsageError, match=r"batch 2.*built for 1.*--batch 2"):
        session.run({"noise": np.zeros((2, 1, 8, 8), np.float32)})


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors", "manifest.json", "README.md"])
@pytest.mark.parametrize("place", [0.0, 0.37, 0.999])
def test_edited_bundle(command: Command, digits_bundle: Path, tmp_path: Path, name: str, place: float) -> None:
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "b"))
    data = bytearray((bundle / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    for arguments in (("verify", bundle), ("bench", bundle), ("sample", bundle), ("inspect", bundle)):
        fails(command, 5, "bundle", *arguments)


def test_bundle_of_another_checkpoint(command: Command, digits_bundle: Path, model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, model / WEIGHTS)
    fails(command, 2, "was built from", "verify", digits_bundle, "--checkpoint", model)


def test_not_a_bundle(command: Command, tmp_path: Path) -> None:
    fails(command, 2, "is not a bundle", "verify", tmp_path)


def test_a_plan_that_is_not_known_is_refused_before_the_table(command: Command, tmp_path: Path) -> None:
    code, out, err = command("inspect", "digits", "--plot", tmp_path / "plan.png")
    assert (code, out) == (2, "")
    assert "no plan is known to draw; give --steps or --timesteps" in err


def test_a_file_of_a_bundle_is_told_from_a_missing_folder(command: Command, digits_bundle: Path) -> None:
    fails(command, 2, f"is a file of a bundle; give its folder {digits_bundle}", "verify", digits_bundle / "model.onnx")


def test_a_runtime_of_another_format_names_those_that_fit(command: Command, digits_bundle: Path) -> None:
    says = "runtime openvino opens openvino; onnx runs in onnxruntime, or build with a --target that makes openvino"
    fails(command, 2, says, "sample", digits_bundle, "--runtime", "openvino")


def test_unknown_runtime(command: Command, digits_bundle: Path) -> None:
    fails(command, 2, "unknown", "verify", digits_bundle, "--runtime", "abacus")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fly",), "No such command 'fly'; see mmd-export --help"),
        (("bild",), "No such command 'bild'. Did you mean 'build'; see mmd-export --help"),
        (("build", "digits"), "Missing option '--target'; see mmd-export build --help"),
        (("bench", "b", "--chekpoint", "d"), "--chekpoint (Possible options: --checkpoint); see mmd-export bench --h"),
        (("bench", "b", "--rounds", "many"), "Invalid value 'many' for '--rounds': Input should be a valid integer"),
        (("verify", "b", "--seed"), "Option '--seed' requires an argument; see mmd-export verify --help"),
        (("verify", "b", "c"), "(c); see mmd-export verify --help"),
    ],
)
def test_wrong_usage_is_one_line(command: Command, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mmd-export: error: ")
    assert says in err


def test_help_keeps_its_brackets(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes [output:] for markup unless it is escaped, and drops it."""
    monkeypatch.setenv("COLUMNS", "300")
    for name, each in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        _, out, _ = command(name, "--help")
        texts = (each.help, each.epilog, *(getattr(param, "help", None) for param in each.params))
        kept = re.findall(r"\[.*?\]", " ".join(filter(None, texts)).replace("\\[", "["))
        assert [part for part in kept if part not in out] == [], name
        assert "\\[" not in out
    assert "[output:]value" in command("verify", "--help")[1]


def test_no_command_gets_the_help_and_version_its_number(command: Command) -> None:
    code, out, err = command()
    assert (code, err) == (2, "")
    assert "Commands" in out
    assert command("--version") == (0, f"mmd-export {__version__}\n", "")


def test_a_full_disk_leaves_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(command, 1, "No space left on device", *build("digits", tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


# What is started in the background inherits an ignored SIGINT; at a terminal Ctrl-C finds Python's own handler.
BUILD_THAT_WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from mmd_export.targets.onnx import OnnxTarget
real = OnnxTarget.compile
def slow(self, program, folder, options):
    facts = real(self, program, folder, options)
    print("compiled", flush=True)
    time.sleep(60)
    return facts
OnnxTarget.compile = slow
from mmd_export.cli import main
model, out = "python:tests.foreign_nets:Plain", sys.argv[1]
sys.argv = ["mmd-export", "build", model, "--target", "onnx", "--steps", "1", "--out", out]
main()
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_build_that_is_stopped_leaves_nothing_finished(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    out = tmp_path / "b"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD_THAT_WAITS, str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "compiled"
    time.sleep(0.2)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not out.exists()
    assert ("interrupted" in err) == (stop is signal.SIGINT)
    if stop is not signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_the_build_after_a_killed_one_works(command: Command, tmp_path: Path) -> None:
    stale = tmp_path / ".b.partial-999999999"
    stale.mkdir()
    assert command(*build("digits", tmp_path / "b"))[0] == 0
    assert not stale.exists()


def test_gate_file_that_is_no_gate(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.json").write_text("[]")
    arguments = ("bench", digits_bundle, "--against", "torch", "--rounds", 6, "--gate", tmp_path / "gate.json")
    fails(command, 2, "--gate", *arguments)


def test_demo_does_not_touch_a_folder_of_others(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    fails(command, 2, "already exists", "demo", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "mine.txt").exists()
