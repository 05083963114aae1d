"""The action and the recipe that users take: they parse, agree with each other, and the recipe is run for real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.code_blocks import blocks_of
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "docs" / "examples" / "ci_gate.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def used_inputs(text: str) -> set[str]:
    return set(re.findall(r"inputs\.([a-z-]+)", text))


def test_the_action_reads_every_input_that_it_declares_and_no_other() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    action = load(ROOT / "action.yml")
    assert used_inputs(text) == set(action["inputs"])
    assert action["runs"]["using"] == "composite"
    for step in action["runs"]["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert "run" not in step or step["shell"] == "bash"
        assert "${{" not in step.get("run", ""), "an input pasted into a script is a way to run anything"


def test_the_action_sets_the_variables_that_the_recipe_reads() -> None:
    (step,) = (step for step in load(ROOT / "action.yml")["runs"]["steps"] if "ci_gate" in step.get("run", ""))
    described = set(re.findall(r"^#   ([A-Z_, ]+?)  ", RECIPE.read_text(), flags=re.MULTILINE))
    names = {name for part in described for name in part.split(", ")}
    assert set(step["env"]) | {"SUMMARY"} == names


USES_THE_ACTION = {"ci.yml", "coreml.yml"}  # swift.yml compiles a kit


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_give_the_action_inputs_that_it_has(path: Path) -> None:
    known = set(load(ROOT / "action.yml")["inputs"])
    steps = [step for job in load(path)["jobs"].values() for step in job["steps"]]
    given = [set(step["with"]) for step in steps if step.get("uses") == "./"]
    assert bool(given) == (path.name in USES_THE_ACTION), f"{path.name}: {len(given)} uses of the action"
    for each in given:
        assert each <= known
        assert "model" in each


def test_the_workflow_of_the_page_gives_the_action_inputs_that_it_has() -> None:
    (block,) = (block for block in blocks_of("docs/ci.md") if block.language == "yaml")
    (step,) = (step for step in yaml.safe_load(block.code)["jobs"]["gate"]["steps"] if "mmd-export" in step["uses"])
    assert {"model", "target", "max-regression"} == set(step["with"]) <= set(load(ROOT / "action.yml")["inputs"])


def test_the_page_lists_what_the_recipe_writes() -> None:
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    written = set(re.findall(r"\$OUT/([a-z]+\.[a-z]+)", RECIPE.read_text()))
    assert written - {"summary.md"} == {name for name in written if name in page}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as the base branch would give it."""
    out = tmp_path_factory.mktemp("base") / "base.bundle"
    build(BuildOptions("digits", "onnx", out, steps=2, verify=False))
    return out


OURS = f'exec {sys.executable} -m mmd_export.cli "$@"'
NOTED = 'echo "$1 $2" >> commands.txt'  # instead of any work


def recipe(tmp_path: Path, command: str = OURS, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with mmd-export from this tree, or what stands for it."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "mmd-export").write_text(f"#!/bin/sh\n{command}\n")
    (commands / "mmd-export").chmod(0o755)
    folders = (ROOT, ROOT / "finetune", ROOT / "runtimes" / "python")
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": ":".join(map(str, folders)),
        "MODEL": "digits", "OUT": str(tmp_path / "out"), "BENCH_OPTIONS": "--threads 1 --rounds 12", **variables,
    }  # fmt: skip
    return subprocess.run([str(RECIPE)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_the_recipe_builds_verifies_benches_and_reports(base: Path, tmp_path: Path) -> None:
    done = recipe(tmp_path, STEPS="2", BASE=str(base), MAX_REGRESSION="100%")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert Bundle.open(out / "new.bundle").name == "digits-2"
    for name, least in (("verify.xml", 6), ("bench.xml", 1)):
        suite = ET.parse(out / name).getroot()
        assert int(suite.attrib["tests"]) >= least
        assert suite.attrib["failures"] == "0"
    summary = (out / "summary.md").read_text()
    assert "## Parity of digits-2: passed" in summary
    assert "## Latency of digits-2" in summary
    assert json.loads((out / "bench.json").read_text())["gates"][0]["verdict"] in ("pass", "undecided")
    assert "<!doctype html>" in (out / "report.html").read_text()


def test_the_recipe_fails_on_a_slower_bundle_and_reports_all_the_same(base: Path, tmp_path: Path) -> None:
    """The base was built with 2 steps, the change has 8."""
    done = recipe(tmp_path, STEPS="8", BASE=str(base), BENCH_OPTIONS="--threads 1 --seconds 4")
    assert done.returncode == 6, done.stderr
    suite = ET.parse(tmp_path / "out" / "bench.xml").getroot()
    assert suite.attrib["failures"] == "1"
    assert (tmp_path / "out" / "report.html").exists()


def test_the_recipe_fails_on_a_broken_model(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mmd_export" / "models" / "digits", tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = recipe(tmp_path, MODEL=str(tmp_path / "model"), STEPS="2")
    assert done.returncode == 2
    assert not (tmp_path / "out" / "new.bundle").exists()


def test_the_recipe_takes_no_base_that_is_not_there(tmp_path: Path) -> None:
    """A bundle built again of the same model would pass any gate."""
    done = recipe(tmp_path, NOTED, BASE="old.bundel")
    assert (done.returncode, done.stderr) == (2, "BASE old.bundel is neither a bundle nor a checkout; no such folder\n")
    assert not (tmp_path / "commands.txt").exists()


@pytest.mark.parametrize("model", ["{}", "guided:{}?num_heads=4&image_size=64", "ddim:{}"])
@pytest.mark.parametrize("there", [False, True])
def test_the_recipe_says_where_the_base_has_no_weights_of_its_own(tmp_path: Path, model: str, there: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "base" / ("run" if there else "")).mkdir(parents=True)
    done = recipe(tmp_path, NOTED, MODEL=model.format("run"), BASE="base")
    said = "" if there else "base has no run; the base is built from the same weights"
    assert (done.returncode, done.stderr.rstrip("\n")) == (0, said)
    built = [line for line in (tmp_path / "commands.txt").read_text().splitlines() if line.startswith("build")]
    assert built == [f"build {model.format(each)}" for each in ("run", "base/run" if there else "run")]
