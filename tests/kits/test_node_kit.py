"""Kit ``node``: its own tests, its command, and its noise and images against those of Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.sample import SampleOptions, sample
from mmd_export.noise import normal
from mmd_export.pictures import grid
from mmd_export.targets import get_target
from mmd_export.tolerance import uint8_tolerance
from tests.kits.npm import OLDEST_NODE, built_project, npm, require_node, summary
from tests.kits.wrong import with_other_artefact, with_other_sample, with_truncated_bytes
from tests.models import tiny_labels
from tests.project.checks import ROOT

__all__ = ["tiny_labels"]
VALUES = 1_000_000


@pytest.fixture(scope="module")
def project(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_node("node")
    return built_project("node", digits_onnx, tmp_path_factory.mktemp("projects") / "node")


def run(project: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["node", "dist/src/cli.js", *map(str, arguments)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


def evaluate(project: Path, code: str) -> bytes:
    """What a module says that imports the package by its name."""
    module = f'import * as kit from "mmd-sampler-node";\n{code}'
    command = ["node", "--input-type=module", "--eval", module]
    return subprocess.run(command, cwd=project, capture_output=True, check=True).stdout


def test_its_own_tests_pass(project: Path, attacks: Path) -> None:
    counts = summary(npm(project, "test", environment={"MMD_ATTACKS": str(attacks)}))
    assert counts["pass"] > 60, "the damaged bundles were not tried"
    assert counts["fail"] == counts["skipped"] == counts["cancelled"] == 0


@pytest.mark.parametrize("kit", ["node", "web"])
def test_a_package_names_the_oldest_node_that_its_sources_run_in(kit: str) -> None:
    oldest = ".".join(map(str, OLDEST_NODE))
    for name in ("package.json", "package-lock.json"):
        package = json.loads((ROOT / "runtimes" / kit / name).read_text(encoding="utf-8"))
        assert package.get("packages", {"": package})[""]["engines"] == {"node": f">={oldest}"}
    if kit == "node":
        assert f"Needs Node {oldest} or newer" in (ROOT / "runtimes/node/README.md").read_text(encoding="utf-8")


def test_the_lines_of_the_readme_run(project: Path) -> None:
    assert "self-test passed: digits-2 in onnxruntime-node, 4 images" in npm(
        project, "run", "sample", "--", "--self-test"
    )
    npm(project, "run", "sample", "--", "--seed", "7", "--out", "sample.png")
    assert (project / "sample.png").is_file()


def test_a_million_values_of_noise_are_those_of_python(project: Path) -> None:
    code = f"process.stdout.write(Buffer.from(kit.normal(20261126n, {VALUES}, 5, 2).buffer));"
    found = np.frombuffer(evaluate(project, code), dtype="<f4")
    expected = normal(20261126, (1, 1, VALUES), range(5, 6), stream=2).reshape(-1)
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    assert int((found != expected).sum()) == 0


def test_a_picture_is_that_of_python(project: Path, digits_onnx: Path, tmp_path: Path) -> None:
    done = run(project, "--seed", 2**40 + 3, "--count", 5, "--out", tmp_path / "node.png")
    assert done.returncode == 0, done.stderr
    found = np.asarray(Image.open(tmp_path / "node.png")).astype(int)
    expected = grid(sample(SampleOptions(str(digits_onnx), seed=2**40 + 3, count=5)))[:, :, 0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1  # a value near x.5 may round either way


@pytest.mark.parametrize(
    ("offset", "says"), [(0.001, ""), (5e-5, r" mean error 0\.0000(49|5)\d* \(limit 0\.0000125\)")]
)
def test_a_wrong_image_fails_the_self_test(
    offset: float, says: str, project: Path, digits_onnx: Path, tmp_path: Path
) -> None:
    """By more than the tolerance in one value, or by less in all."""
    done = run(project, "--bundle", with_other_sample(digits_onnx, tmp_path / "wrong", offset), "--self-test")
    assert done.returncode == 4
    assert re.match(f"self-test FAILED{says}: digits-2 in onnxruntime-node", done.stdout), done.stdout


def test_a_graph_that_is_none_is_refused(project: Path, digits_onnx: Path, tmp_path: Path) -> None:
    done = run(project, "--bundle", with_other_artefact(digits_onnx, tmp_path / "wrong", b"no graph"), "--self-test")
    assert done.returncode == 5
    assert "model.onnx cannot be loaded in onnxruntime-node" in done.stderr


def looked_at(project: Path, bundle: Path) -> dict[str, Any]:
    """The self-test and the errors of the states, in the package."""
    code = (
        f"const sampler = await kit.open({json.dumps(str(bundle))}, {{ threads: 1 }});"
        "const found = { test: await sampler.selfTest(1), errors: await sampler.stateErrors() };"
        "process.stdout.write(JSON.stringify(found));"
    )
    found: dict[str, Any] = json.loads(evaluate(project, code))
    return found


@pytest.fixture(scope="module")
def weights_beside(tiny_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A class-conditional model with its weights in a file of their own."""
    out = tmp_path_factory.mktemp("bundles") / "labels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_target("onnx"), "largest_file", 10_000)
        return build(BuildOptions(str(tiny_labels), "onnx", out, steps=2, batch="1..3"))


def test_labels_step_noise_and_weights_in_a_file_of_their_own(
    project: Path, weights_beside: Bundle, tmp_path: Path
) -> None:
    bundle = weights_beside
    assert (bundle.folder / "model.onnx_data").is_file()
    found = looked_at(project, bundle.folder)
    assert found["test"]["passed"], found
    assert max(found["errors"]) <= bundle.manifest.tolerance.atol
    refused = run(project, "--bundle", bundle.folder, "--out", tmp_path / "any.png")
    assert refused.returncode == 2
    assert "input 'class_labels' is missing" in refused.stderr
    outside = run(project, "--bundle", bundle.folder, "--class-label", 5, "--out", tmp_path / "any.png")
    assert outside.returncode == 2
    assert "input 'class_labels' holds 5, the manifest says 0 to 4" in outside.stderr
    drawn = run(project, "--bundle", bundle.folder, "--class-label", 3, "--count", 4, "--out", tmp_path / "three.png")
    assert drawn.returncode == 0, drawn.stderr
    options = SampleOptions(str(bundle.folder), seed=0, count=4, class_label=3)
    difference = np.asarray(Image.open(tmp_path / "three.png")).astype(int) - grid(sample(options))[:, :, 0]
    assert np.abs(difference).max() <= 1


def test_weights_too_large_to_hold_are_read_by_onnx_runtime(
    project: Path, weights_beside: Bundle, tmp_path: Path
) -> None:
    """As above 2 GiB, where readFile stops; here the bound is just below the size of the weights."""
    folder = shutil.copytree(weights_beside.folder, tmp_path / "copy")
    weights = folder / "model.onnx_data"
    size = weights.stat().st_size
    assert all(path.stat().st_size < size for path in folder.iterdir() if path != weights)
    code = (
        f"const source = kit.folderSource({json.dumps(str(folder))}, {size - 1});"
        "const said = async (work) => { try { return await work() } catch (error) { return error.message } };"
        "const opened = await said(() => kit.Sampler.open(source, kit.cpuEngine({ threads: 1 })));"
        "const found = typeof opened === 'string' ? opened"
        " : { test: await opened.selfTest(1), states: await said(() => opened.stateErrors()) };"
        "process.stdout.write(JSON.stringify(found));"
    )
    found = json.loads(evaluate(project, code))
    assert found["test"]["passed"], found
    assert f"shows no states: 'model.onnx_data' has {size} bytes" in found["states"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "'model.onnx_data' has SHA-256 " in json.loads(evaluate(project, code))


def test_a_loop_and_pixels_of_bytes(project: Path, tiny_labels: Path, tmp_path: Path) -> None:
    options = BuildOptions(str(tiny_labels), "onnx", tmp_path / "loop", steps=3, batch="2", form="loop", output="uint8")
    bundle = build(options)
    assert bundle.manifest.graph.form == "loop"
    found = looked_at(project, bundle.folder)
    assert found["test"]["passed"], found
    assert found["test"]["meanLimit"] == pytest.approx(uint8_tolerance(bundle.manifest.tolerance.atol)[1])
    assert len(found["errors"]) == 3
    assert max(found["errors"]) <= bundle.manifest.tolerance.atol
    wrong = looked_at(project, with_truncated_bytes(bundle.folder, tmp_path / "truncated"))["test"]
    assert wrong["worst"] <= wrong["tolerance"] == 1, wrong
    assert wrong["mean"] > 0.1, wrong
    assert not wrong["passed"]
