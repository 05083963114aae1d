"""Every command on the built-in model, end to end in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmd_export.bundle import Bundle
from tests.cli.conftest import Command


def test_build_says_size_and_error(command: Command, tmp_path: Path) -> None:
    code, out, err = command("build", "digits", "--target", "onnx", "--steps", 1, "--out", tmp_path / "b")
    assert code == 0, err
    assert "model.onnx" in out
    assert "tolerance 0.0001" in out
    assert Bundle.open(tmp_path / "b").manifest.parity is not None


def test_verify_passes_all_six_rungs(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    code, out, err = command("verify", digits_bundle, "--checkpoint", "digits", "--json", tmp_path / "parity.json")
    assert code == 0, err
    report = json.loads((tmp_path / "parity.json").read_text())
    assert [rung["verdict"] for rung in report["rungs"]] == ["passed"] * 6
    assert "exported program" in out


def test_verify_in_the_torch_reference(command: Command, digits_bundle: Path) -> None:
    code, out, err = command("verify", digits_bundle, "--runtime", "torch", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["runtime"] == "torch"


def test_one_seed_is_one_image_in_every_runtime(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    pictures = []
    for runtime in ("onnxruntime", "torch"):
        path = tmp_path / f"{runtime}.png"
        code, _, err = command("sample", digits_bundle, "--seed", 5, "--count", 6, "--runtime", runtime, "--out", path)
        assert code == 0, err
        pictures.append(np.asarray(Image.open(path)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.ptp(pictures[0]) > 100


def test_sample_from_the_model_equals_the_bundle(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    command("sample", "digits", "--steps", 2, "--seed", 5, "--count", 3, "--out", tmp_path / "model.png")
    command("sample", digits_bundle, "--seed", 5, "--count", 3, "--out", tmp_path / "bundle.png")
    model, bundle = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("model", "bundle"))
    assert np.abs(model - bundle).max() <= 1


@pytest.mark.parametrize("name", ["sample", "evaluate"])
@pytest.mark.parametrize(("flag", "value"), [("--runtime", "onnxruntime"), ("--checkpoint", "digits")])
def test_a_model_has_no_runtime_and_no_checkpoint(command: Command, name: str, flag: str, value: str) -> None:
    code, out, err = command(name, "digits", "--steps", 2, flag, value)
    assert (code, out) == (2, "")
    assert f"{flag} {value} goes with a bundle, digits is none; build one or leave it out" in err


def test_bench_measures_three_candidates(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    code, out, err = command("bench", digits_bundle, "--rounds", 8, "--json", tmp_path / "bench.json")
    assert code == 0, err
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["candidates"] == ["digits-2"]
    assert set(report["seconds"]) == {"digits-2", "torch", "per-step"}
    assert all(len(seconds) == 8 for seconds in report["seconds"].values())
    assert "per-step" in out


@pytest.mark.parametrize(("max_ratio", "code"), [(1000.0, 0), (1e-6, 6)])
def test_gate_decides_the_exit_code(
    command: Command, digits_bundle: Path, tmp_path: Path, max_ratio: float, code: int
) -> None:
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"gates": [{"against": "torch", "max_ratio": max_ratio}]}))
    found, _, err = command("bench", digits_bundle, "--against", "torch", "--rounds", 8, "--gate", gate)
    assert found == code, err
    assert len(err.strip().splitlines()[-1]) < 400


NO_LIMIT = {"against": "torch", "max_ratio": float("nan")}


@pytest.mark.parametrize("limits", [[], [NO_LIMIT], [{**NO_LIMIT, "max_ratio": 0}]])
def test_a_gate_that_could_not_fail_is_refused(
    command: Command, digits_bundle: Path, tmp_path: Path, limits: list[dict[str, object]]
) -> None:
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"gates": limits}))
    code, _, err = command("bench", digits_bundle, "--against", "torch", "--rounds", 8, "--gate", gate)
    assert code == 2
    assert "at least one limit, each finite and above 0" in err


def test_a_gate_is_not_dropped_to_save_a_baseline(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "baseline.json"
    asked = ("--against", "torch", "--max-regression", "5%", "--save-baseline", saved)
    code, _, err = command("bench", digits_bundle, *asked)
    assert code == 2
    assert "--save-baseline measures a new baseline and judges nothing" in err
    assert not saved.exists()


def test_card_carries_the_measured_latency(command: Command, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    command("build", "digits", "--target", "onnx", "--steps", 1, "--out", bundle)
    code, _, err = command("bench", bundle, "--against", "torch", "--rounds", 6, "--update-card")
    assert code == 0, err
    card = Bundle.open(bundle).card
    assert "| torch |" in card
    assert "Not measured" not in card
    assert "runtime onnxruntime" in card


def test_inspect_prints_the_plan(command: Command, digits_bundle: Path) -> None:
    code, out, _ = command("inspect", digits_bundle)
    assert code == 0
    assert "500" in out  # the first of the two timesteps
    code, out, _ = command("inspect", "digits", "--steps", 3, "--sampler", "ddpm", "--json", "-")
    assert code == 0
    assert [step["timestep"] for step in json.loads(out)["plan"]["steps"]] == [666.0, 333.0, 0.0]


def test_doctor_lists_targets_and_runtimes(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "-")
    assert code == 0
    parts = {(part["kind"], part["name"]) for part in json.loads(out)["parts"]}
    assert {("target", "onnx"), ("runtime", "onnxruntime"), ("runtime", "torch")} <= parts


def test_doctor_says_what_runs_what(command: Command) -> None:
    code, out, _ = command("doctor", "--json", "-")
    assert code == 0
    parts = json.loads(out)["parts"]
    targets = {part["name"]: part for part in parts if part["kind"] == "target"}
    runtimes = {part["name"]: part for part in parts if part["kind"] == "runtime"}
    for part in targets.values():
        known = {*part["runs_in"], *part["could_run_in"]}
        assert known == {name for name, runtime in runtimes.items() if part["format"] in runtime["formats"]}
        assert all(runtimes[name]["available"] for name in part["runs_in"])
        assert not any(runtimes[name]["available"] for name in part["could_run_in"])
    assert {"onnxruntime", "onnxruntime:cpu"} <= set(targets["onnx"]["runs_in"])
    for part in parts:
        assert part["detail"]
        by_pip = part["kind"] == "target" or part["name"].startswith("onnxruntime")  # a GPU or a Mac does not come so
        assert part["available"] or not by_pip or "pip install" in part["install"]
    code, out, _ = command("doctor")
    assert code == 0
    assert "builds here" in out
    assert "fp32" in out


def test_openvino_from_build_to_picture(command: Command, tmp_path: Path) -> None:
    bundle, report = tmp_path / "b", tmp_path / "report.json"
    code, out, err = command("build", "digits", "--target", "openvino", "--steps", 1, "--out", bundle)
    assert code == 0, err
    assert "model.xml" in out
    assert command("verify", bundle, "--checkpoint", "digits", "--json", report)[0] == 0
    assert json.loads(report.read_text())["runtime"] == "openvino"
    code, _, err = command("bench", bundle, "--against", "openvino", "--rounds", 2, "--json", report)
    assert code == 0, err
    assert set(json.loads(report.read_text())["seconds"]) == {"digits-1", "openvino"}
    assert command("sample", bundle, "--seed", 5, "--count", 3, "--out", tmp_path / "openvino.png")[0] == 0
    command("sample", "digits", "--steps", 1, "--seed", 5, "--count", 3, "--out", tmp_path / "model.png")
    drawn, model = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("openvino", "model"))
    assert np.abs(drawn - model).max() <= 1
    code, _, err = command("verify", bundle, "--runtime", "onnxruntime:cpu")
    assert code == 2
    assert "holds openvino, runtime onnxruntime:cpu opens onnx" in err


def test_verify_and_bench_say_where_nodes_run(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, _, err = command("verify", digits_bundle, "--runtime", "onnxruntime:cpu", "--json", report)
    assert code == 0, err
    assert "nodes run on CPUExecutionProvider" in err
    assert json.loads(report.read_text())["rungs"][-1]["placement"]["taken"] > 100
    code, _, err = command(
        "bench", digits_bundle, "--runtime", "onnxruntime:cpu", "--bound", "--against", "onnxruntime", "--rounds", 2,
        "--json", report,
    )  # fmt: skip
    assert code == 0, err
    assert "digits-2: " in err
    assert json.loads(report.read_text())["placements"]["digits-2"]["elsewhere"] == {}
    code, _, err = command("verify", digits_bundle, "--runtime", "onnxruntime:dml")
    assert code == 3
    assert "pip install onnxruntime-directml" in err


def test_tune_build_sample(command: Command, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    (tmp_path / "few.toml").write_text("evaluate_count = 16\n")
    few = ("--config", tmp_path / "few.toml")
    small = (*few, "--steps", 2, "--iterations", 1, "--batch-size", 8, "--out", run)
    code, out, err = command("finetune", "digits", *small, "--json", tmp_path / "result.json")
    assert code == 0, err
    number = r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    assert re.search(rf"held-out Frechet distance {number} -> {number}, best at iteration [01] of 1, ", out)
    assert "next: mmd-export build" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["folder"], result["iterations"], set(result["held_out"])) == (str(run), 1, {"digits-mlp"})
    code, _, err = command("build", run, "--target", "onnx", "--out", bundle)
    assert code == 0, err
    code, _, err = command("verify", bundle, "--checkpoint", run)
    assert code == 0, err
    code, _, err = command("build", run, "--target", "onnx", "--steps", 3, "--out", tmp_path / "other")
    assert code == 2
    assert "tuned for ddim with 2 steps" in err


def test_verify_without_the_checkpoint_says_what_it_left_out(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from mmd_export.checkpoint import BUILT_IN

    model, bundle = tmp_path / "mine", tmp_path / "b"
    shutil.copytree(BUILT_IN["digits"], model)
    assert command("build", model, "--target", "onnx", "--steps", 1, "--out", bundle)[0] == 0
    code, out, err = command("verify", bundle)
    assert code == 0, err
    assert out.count("not checked") == 5
    assert "pass --checkpoint" in err
