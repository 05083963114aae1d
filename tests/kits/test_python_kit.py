"""The facade for apps, and the project of kit ``python``, run as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmd_export.bundle import Bundle, TensorSpec, Tolerance
from mmd_export.commands.embed import EmbedOptions, embed
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.noise import normal
from mmd_export.parity import artefact_rung
from mmd_runtime.app import Sampler, SelfTest, open_bundle
from tests.attacks import ATTACKS, Attack
from tests.export.bundles import draft, make
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


@pytest.mark.parametrize(("offset", "says"), [(0.001, ""), (5e-5, r" mean error \S+e-05 \(limit 1\.25e-05\)")])
def test_a_wrong_image_fails_the_self_test(
    offset: float, says: str, project: Path, digits_onnx: Path, tmp_path: Path
) -> None:
    """By more than the tolerance in one value, or by less in all."""
    wrong = with_other_sample(digits_onnx, tmp_path / "wrong", offset)
    done = run(project, "--bundle", wrong, "--self-test")
    assert done.returncode == 4
    assert re.match(f"self-test FAILED{says}: digits-2 in onnxruntime", done.stdout), done.stdout


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
    ("worst", "mean", "fault", "says"),
    [
        (1e-6, 1e-7, "", "passed: "),
        (1e-4, 1.25e-5, "", "passed: "),
        (2e-4, 1e-6, "", "FAILED: "),
        (2e-4, 1e-4, "", "FAILED: "),
        (9e-5, 2e-5, "", "FAILED mean error 2e-05 (limit 1.25e-05): "),
        (0.0, 0.0, "1 NaN values", "FAILED 1 NaN values: "),
    ],
)
def test_the_verdict(worst: float, mean: float, fault: str, says: str) -> None:
    found = SelfTest("b", "r", 8, worst, 1e-4, mean, 1.25e-5, fault, 1.0)
    assert found.passed == says.startswith("passed")
    told = f"b in r, 8 images, largest error {worst:.3g} (tolerance 0.0001), 1.00 ms a batch"
    assert str(found) == f"self-test {says}{told}"


class StandIn:
    """A session that answers golden noise with ``images``."""

    def __init__(self, bundle: Bundle, images: NDArray[Any]) -> None:
        self._noise, self._images = bundle.golden().noise, images

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        rows = [int(np.flatnonzero((self._noise == noise).all((1, 2, 3)))[0]) for noise in inputs["noise"]]
        return {"sample": self._images[rows]}


def of_images(folder: Path, images: NDArray[Any], shape: tuple[int, ...], **fields: Any) -> Bundle:
    """A bundle whose golden sample is ``images``, each of ``shape``."""
    noise = normal(7, (1, 8, 8), range(len(images)))
    tensors = {"noise": noise, "state.1": noise / 2, "state.2": noise / 4, "sample": images}
    inputs = (TensorSpec(name="noise", dtype="float32", shape=(1, 1, 8, 8)),)
    dtype: Any = images.dtype.name
    outputs = (TensorSpec(name="sample", dtype=dtype, shape=(1, *shape)),)
    return make(folder, draft=draft(inputs=inputs, outputs=outputs, **fields), golden=tensors)


def judged(bundle: Bundle, images: NDArray[Any]) -> SelfTest:
    """The self-test of ``images``, which rung 6 judges by the same limits."""
    session = StandIn(bundle, images)
    found, rung = Sampler(bundle, "stand-in", session).self_test(rounds=1), artefact_rung(bundle, session, None)
    (sample,) = rung.comparisons
    assert (found.worst, found.mean, found.passed) == (sample.max_abs, sample.mean_abs, rung.passed)
    assert (found.tolerance, found.mean_limit) == (rung.limit(sample), rung.mean_limit(sample))
    return found


def test_bytes_that_are_all_a_level_too_low_fail(tmp_path: Path) -> None:
    """As where levels are truncated: no byte is off by more than the one level that rounding may take."""
    right = np.random.default_rng(0).integers(1, 256, (4, 8, 8, 1), dtype=np.uint8)
    bundle = of_images(tmp_path / "bytes", right, (8, 8, 1))
    assert judged(bundle, right).passed
    rounded = right.copy()
    rounded[0, 3, 3] -= 1  # one beside x.5
    assert judged(bundle, rounded).passed
    found = judged(bundle, right - 1)
    assert not found.passed
    assert str(found).startswith("self-test FAILED mean error 1 (limit 0.0128): digits-2 in stand-in, 4 images, ")
    assert ", largest error 1 (tolerance 1), " in str(found)


def test_half_of_another_image_fails_within_a_wide_tolerance(tmp_path: Path) -> None:
    right = np.random.default_rng(0).uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32)
    wide = Tolerance(atol=1.6, reason="4-bit weights")
    bundle = of_images(tmp_path / "wide", right, (1, 8, 8), precision="w4", tolerance=wide)
    off = right.copy()
    off[0, 0, 3, 3] += 1.5  # as a chain does that spreads
    assert judged(bundle, off).passed
    found = judged(bundle, (right + np.roll(right, 1, axis=0)) / 2)
    assert not found.passed
    assert found.worst <= 1.6
    assert str(found).startswith("self-test FAILED mean error 0.3")
    assert "(limit 0.2): digits-2 in stand-in" in str(found)


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
