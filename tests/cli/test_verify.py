"""``mmd-export verify``: its tolerances, what it says it did not check, and that a device needs no torch."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.comparison import NO_LIMITS, Limits, compare
from mmd_export.errors import ParityError
from mmd_export.manifest import GOLDEN_NAME
from mmd_export.measured import device_advice, measured
from mmd_export.parity_report import ParityReport, Rung
from mmd_export.runtime import Availability
from mmd_runtime.registry import get_runtime
from tests.cli.conftest import Command
from tests.export.bundles import draft, make


def report_of(command: Command, *arguments: object) -> tuple[int, dict[str, object], str]:
    code, out, err = command("verify", *arguments, "--json", "-")
    return code, json.loads(out), err


def test_the_golden_file_is_enough_within_3_seconds_and_without_torch(digits_bundle: Path) -> None:
    script = (
        "import sys\n"
        "from mmd_export.cli import app, run\n"
        f"code = run(app, ['verify', {str(digits_bundle)!r}])\n"
        "heavy = {'torch', 'diffusers', 'onnxscript', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of the processor, not of the clock: other tests run meanwhile.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 3.0
    assert "rung 1, 2, 3, 4, 5: the checkpoint 'digits' was not given; pass --checkpoint digits" in done.stderr
    assert "compared 100% of the artefact's outputs" in done.stderr
    assert done.stderr.endswith("mmd-export: passed: 1 of 6 rungs checked\n")


def test_the_json_says_what_was_compared_and_what_was_not(command: Command, digits_bundle: Path) -> None:
    code, report, _ = report_of(command, digits_bundle)
    assert code == 0
    assert report["verified_fraction"] == 1.0
    assert report["verified"] == {
        "outputs": {"compared": 1, "of": 1}, "states": {"compared": 2, "of": 2}, "steps": {"compared": 2, "of": 2},
        "inputs": {"compared": 1, "of": 1}, "batches": {"compared": 1, "of": 1},
    }  # fmt: skip
    lines = report["not_checked"]
    assert isinstance(lines, list)
    assert [line.split(":")[0] for line in lines] == [
        "rung 1, 2, 3, 4, 5", "noises other than the 4 of the golden file", "rung 7",
    ]  # fmt: skip
    assert report["bisect"] is None
    budget = report["error_budget"]
    assert isinstance(budget, dict)
    assert [row["step"] for row in budget["steps"]] == [1, 2]
    rung = report["rungs"][-1]  # type: ignore[index]
    assert rung["required_atol"] == rung["worst"] > 0
    assert all(row["passed"] and row["values"] == 256 for row in rung["comparisons"])


def test_with_the_checkpoint_fresh_noises_are_compared(command: Command, digits_bundle: Path) -> None:
    reports = [report_of(command, digits_bundle, "--checkpoint", "digits", "--seed", seed)[1] for seed in (5, 6)]
    for report in reports:
        names = [row["name"] for row in report["rungs"][-1]["comparisons"]]  # type: ignore[index]
        assert "fresh sample" in names
        assert "fresh state.2 teacher-forced" in names
        assert not any("noises" in line for line in report["not_checked"])  # type: ignore[attr-defined]
    errors = [[row["max_abs"] for row in report["rungs"][-1]["comparisons"]] for report in reports]  # type: ignore[index]
    half = len(errors[0]) // 2
    assert errors[0][:half] == errors[1][:half]  # the golden file's noises
    assert errors[0][half:] != errors[1][half:]


def test_states_that_batches_cannot_reach_are_said(command: Command, tmp_path: Path) -> None:
    build(BuildOptions("digits", "onnx", tmp_path / "b", steps=1, batch="1..4"))
    _, report, _ = report_of(command, tmp_path / "b")
    assert report["verified"]["batches"]["of"] == 4  # type: ignore[index]
    assert report["verified_fraction"] < 1.0  # type: ignore[operator]
    assert any(str(line).startswith("batch sizes ") for line in report["not_checked"])  # type: ignore[attr-defined]


def test_tolerances_from_the_command_line(command: Command, digits_bundle: Path) -> None:
    code, report, err = report_of(command, digits_bundle, "--atol", "1e-9")
    assert code == 4
    assert "the tolerance is 1e-09" in err
    wanted = report["rungs"][-1]["required_atol"]  # type: ignore[index]
    assert report_of(command, digits_bundle, "--atol", repr(wanted))[0] == 0
    assert report_of(command, digits_bundle, "--atol", repr(0.99 * wanted))[0] == 4
    code, report, err = report_of(command, digits_bundle, "--atol", "state.2:1e-12")
    assert code == 4
    failed = [row["name"] for row in report["rungs"][-1]["comparisons"] if not row["passed"]]  # type: ignore[index]
    assert failed == ["state.2", "state.2 teacher-forced"]
    assert report["error_budget"]["first_step"] == 2  # type: ignore[index]
    code, report, _ = report_of(command, digits_bundle, "--atol", "1e-12", "--rtol", "10")
    assert code == 0
    assert report["rungs"][-1]["required_atol"] == 0.0  # type: ignore[index]
    assert report["error_budget"]["first_step"] is None  # type: ignore[index]


def test_a_device_that_rounds_more_is_told_what_it_may_do() -> None:
    exact = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)

    def report(
        off: float, runtime: str, precision: str = "fp16", limits: Limits = NO_LIMITS, bias: float = 0.0
    ) -> ParityReport:
        found = exact + np.float32(bias)
        found[0, 0, 3, 4] += off
        rung = Rung(6, (compare("sample", found, exact),), atol=1e-2, mean=1e-2 / 8, limits=limits)
        advice = device_advice(draft(precision=precision), runtime, rung)
        return ParityReport("b", runtime, (rung,), advice=advice)

    with pytest.raises(ParityError, match=r"is 0.01; a device .* by 0.012; if .*:cuda is one, verify --atol 0.03 a"):
        report(0.012, "onnxruntime:cuda").require()
    asked = Limits({"": 1e-3})
    for other in (
        report(0.012, "onnxruntime"), report(0.012, "onnxruntime:cpu"), report(0.04, "onnxruntime:cuda"),
        report(0.012, "onnxruntime:cuda", "fp32"), report(0.012, "onnxruntime:cuda", limits=asked),
        report(0.0, "onnxruntime:cuda", bias=0.028),  # no rounding: --atol 0.03 would let another picture pass
    ):  # fmt: skip
        assert not other.passed
        assert other.advice == ""
    assert report(0.001, "onnxruntime:cuda").passed


def test_a_build_on_such_a_device_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine runs without its GPU: the comparison is made by hand."""
    exact = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    bundle = make(tmp_path / "b", draft=draft(target="tensorrt", precision="fp16"))
    engines, moves = get_runtime("tensorrt"), "make the bundle with --skip-verify"
    monkeypatch.setattr(type(engines), "availability", lambda _: Availability(True, "a GPU"))

    def failure(off: float) -> str:
        found = exact.copy()
        found[0, 0, 3, 4] += off
        rung = Rung(6, (compare("sample", found, exact),), atol=1e-2, mean=1.0)
        monkeypatch.setattr("mmd_export.measured.check_artefact", lambda *_: rung)
        with pytest.raises(ParityError) as error:
            measured(bundle, engines, moves=moves)
        return str(error.value)

    assert failure(0.02).endswith(f"if tensorrt is one, verify --atol 0.03 allows it; {moves}")
    assert "--atol" not in (said := failure(0.04))
    assert said.endswith(moves)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--atol", "many"), "--atol 'many': 'many' is no number; write [output:]value"),
        (("--rtol", "sample:"), "--rtol 'sample:': '' is no number"),
        (("--atol", "-1"), "--atol '-1': a tolerance is finite and not below 0, this is -1"),
        (("--atol", "nan"), "a tolerance is finite"),
        (("--atol", "1", "--atol", "2"), "--atol gives the default twice, 1 and 2"),
        (("--atol", "image:1"), "--atol names 'image', bundle digits-2 compares sample, state.1, state.2"),
        (("--count", "500"), "--count belongs to rung 7; add --distribution"),
        (("--seed", "5"), "--seed 5 is of fresh noises, which need the checkpoint; add --checkpoint or leave it out"),
        (("--distribution", "--count", "5"), "--count is 5, rung 7 needs at least 100"),
        (("--distribution", "--level", "0.001"), "999 permutations cannot tell p below 0.0005"),
    ],
)
def test_what_is_no_tolerance_is_refused(
    command: Command, digits_bundle: Path, arguments: tuple[str, ...], reason: str
) -> None:
    code, _, err = command("verify", digits_bundle, *arguments)
    assert code == 2, err
    assert reason in err
    assert len([line for line in err.splitlines() if line.startswith("mmd-export: error")]) == 1


def test_a_bundle_without_its_golden_file_is_refused(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(digits_bundle, broken)
    (broken / GOLDEN_NAME).unlink()
    code, _, err = command("verify", broken)
    assert code == 5
    assert f"'{GOLDEN_NAME}' is missing" in err


def test_bytes_may_be_one_level_off_but_not_on_average(command: Command, tmp_path: Path) -> None:
    build(BuildOptions("digits", "onnx", tmp_path / "b", steps=1, output="uint8"))
    code, report, _ = report_of(command, tmp_path / "b")
    assert code == 0
    sample = report["rungs"][-1]["comparisons"][0]  # type: ignore[index]
    assert (sample["name"], sample["atol"]) == ("sample", 1.0)
    assert Bundle.open(tmp_path / "b").golden().sample.dtype.name == "uint8"
