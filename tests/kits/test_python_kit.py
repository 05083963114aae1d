"""The facade for apps, and the project of kit ``python``, run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmd_export.commands.embed import EmbedOptions, embed
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.errors import BundleError, NotAvailableError
from mmd_runtime.app import SelfTest, open_bundle
from tests.attacks import ATTACKS, Attack
from tests.kits.wrong import with_other_sample
from tests.project.checks import PACKAGES, ROOT

IMPORT_SHARE = 0.25  # of numpy's own import: onnxruntime, loaded at import, would be more
PATH = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)


@pytest.fixture(scope="module")
def project(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("projects") / "python"
    embed(EmbedOptions(digits_onnx, "python", out))
    return out


def run(project: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "app.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": PATH}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_the_self_test_passes(project: Path) -> None:
    done = run(project, "--self-test")
    assert done.returncode == 0, done.stderr
    assert "self-test passed: digits-2 in onnxruntime" in done.stdout
    assert "ms a batch" in done.stdout


def test_a_seed_gives_a_picture(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "seven.png"
    done = run(project, "--seed", 7, "--count", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(np.unique(np.asarray(Image.open(out)))) > 20


def test_no_images_are_refused(project: Path) -> None:
    done = run(project, "--count", 0)
    assert done.returncode == 2
    assert "--count is 0; it must be at least 1" in done.stderr


def test_a_damaged_bundle_is_refused(project: Path, attacks: Path) -> None:
    done = run(project, "--bundle", attacks / "edited-artefact", "--self-test")
    assert done.returncode == 5
    assert "'model.onnx' has SHA-256" in done.stderr


def test_a_wrong_image_fails_the_self_test(project: Path, digits_onnx: Path, tmp_path: Path) -> None:
    wrong = with_other_sample(digits_onnx, tmp_path / "wrong", 0.001)
    done = run(project, "--bundle", wrong, "--self-test")
    assert done.returncode == 4
    assert "self-test FAILED" in done.stdout


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_every_attack_is_refused(attack: Attack, attacks: Path) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(attacks / attack.id)
    assert attack.says in str(caught.value)


def test_the_undamaged_bundle_opens(digits_onnx: Path) -> None:
    assert open_bundle(digits_onnx).self_test(rounds=1).passed


def test_the_facade_draws_what_the_command_draws(digits_onnx: Path) -> None:
    found = open_bundle(digits_onnx).sample(seed=5, count=3, first=1)
    expected = sample(SampleOptions(str(digits_onnx), seed=5, count=4))[1:]
    np.testing.assert_array_equal(found, expected)


def test_a_runtime_of_another_format_is_refused(digits_onnx: Path) -> None:
    with pytest.raises(NotAvailableError, match="holds format onnx, runtime coreml runs mlpackage"):
        open_bundle(digits_onnx, runtime="coreml")


@pytest.mark.parametrize(
    ("worst", "fault", "passed"), [(1e-6, "", True), (1e-4, "", True), (2e-4, "", False), (0.0, "1 NaN values", False)]
)
def test_the_verdict(worst: float, fault: str, passed: bool) -> None:
    assert SelfTest("b", "r", 8, worst, 1e-4, fault, 1.0).passed == passed


def share_of_import(module: str) -> float:
    """What ``import module`` adds to ``import numpy``, as a share of it: the least of several fresh processes.

    Seconds of the processor, both in one process: a slow machine slows both, and other work only ever adds. The first
    process leaves the bytecode for the others: compiling numpy takes longer than importing it.
    """
    code = (
        "from time import process_time as now; start = now(); import numpy; between = now(); "
        f"import {module}; print((now() - between) / (between - start))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = PATH

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    return min(once() for _ in range(7))


def test_the_import_is_quick() -> None:
    assert share_of_import("mmd_runtime.app") < IMPORT_SHARE


def test_a_slow_import_is_found() -> None:
    assert share_of_import("mmd_runtime.app, onnxruntime") > IMPORT_SHARE


def test_neither_torch_nor_a_compiler_is_loaded(digits_onnx: Path) -> None:
    """The whole of a run, in a process where torch, onnx and the compilers cannot be imported at all."""
    blocked = ("torch", "onnx", "onnxscript", "diffusers", "coremltools", "openvino", "scipy", "sklearn")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from mmd_runtime.app import open_bundle\n"
        f"sampler = open_bundle({str(digits_onnx)!r})\n"
        "assert sampler.self_test(rounds=1).passed\n"
        "print(sampler.sample(seed=7, count=2).shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": PATH}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1, 8, 8)"
