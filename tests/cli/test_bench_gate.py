"""Gates of ``bench``: on a bundle measured now, on limits, on a saved baseline; they pass, fail and refuse."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmd_export.bundle import Bundle
from mmd_export.cli import app, run
from mmd_export.commands.bench_gate import Gates, settled_gates
from mmd_export.commands.candidates import BenchOptions, Candidate, Checkpoints, candidates_of
from mmd_export.errors import UsageError
from tests.cli.conftest import Command

QUICK = ("--threads", 1, "--cold", 0)


@pytest.fixture(scope="session")
def saved(digits_bundle: Path, longer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline: the short bundle against the long one."""
    path = tmp_path_factory.mktemp("gates") / "baseline.json"
    arguments = ("bench", digits_bundle, "--against", longer_bundle, "--save-baseline", path, "--rounds", 12, *QUICK)
    assert run(app, [str(argument) for argument in arguments]) == 0
    return path


def test_a_gate_against_a_bundle_measured_now(
    command: Command, digits_bundle: Path, longer_bundle: Path, tmp_path: Path
) -> None:
    gate = ("--max-regression", "5%", "--batches", 1, "--rounds", 12, *QUICK)
    code, out, err = command("bench", digits_bundle, "--against", longer_bundle, *gate)
    assert code == 0, err
    assert "gate pass: digits-2 takes 0." in out
    files = ("--junit", tmp_path / "gate.xml", "--summary", tmp_path / "summary.md", "--json", tmp_path / "gate.json")
    code, out, err = command("bench", longer_bundle, "--against", digits_bundle, *gate, *files)
    assert code == 6, out
    assert "the limit is 1.050; make it faster or raise the limit" in err
    suite = ET.parse(tmp_path / "gate.xml").getroot()
    assert suite.attrib["failures"] == "1"
    assert "- **fail**: fail: digits-6 takes" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "gate.json").read_text())["gates"][0]["verdict"] == "fail"


def test_json_on_stdout_stands_alone_beside_a_gate(command: Command, digits_bundle: Path, longer_bundle: Path) -> None:
    gate = ("--against", longer_bundle, "--max-regression", "5%", "--batches", 1, "--rounds", 12, *QUICK)
    code, out, err = command("bench", digits_bundle, *gate, "--json", "-")
    assert code == 0, err
    (verdict,) = json.loads(out)["gates"]
    assert f"mmd-export: gate {verdict['message']}\n" in err


def test_limits_of_a_file_take_no_other_limit(command: Command, tmp_path: Path) -> None:
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"gates": [{"against": "torch", "max_ratio": 2.0}]}))
    code, _, err = command("bench", tmp_path / "nowhere", "--gate", limits, "--max-regression", "1%")
    assert code == 2
    assert f"--max-regression 1% has no place beside --gate {limits}, which has limits of its own: torch 2; " in err


def test_a_gate_between_two_runtimes_is_for_those_who_name_them(
    digits_bundle: Path, longer_bundle: Path, tmp_path: Path
) -> None:
    options = BenchOptions((digits_bundle,), runtime="onnxruntime:cpu", threads=1)

    def held_against(name: str) -> tuple[Candidate, ...]:
        return candidates_of([Bundle.open(digits_bundle)], (name,), 1, options, Checkpoints())

    found = held_against(str(longer_bundle))
    (limit,) = settled_gates(Gates(), found, 1, 1, options).limits
    assert (limit.candidate, limit.against, limit.most) == ("digits-2", "digits-6", 1.05)
    found[1].runtime = "openvino"  # as of a bundle that the runtime asked for does not open
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"gates": [{"against": "digits-6", "max_ratio": 1}]}))
    for gates in (Gates(), Gates.of(limits, None, None)):
        assert gates is not None
        with pytest.raises(UsageError, match="runs in onnxruntime:cpu and digits-6 in openvino; if that is meant"):
            settled_gates(gates, found, 1, 1, options)
    for name in (f"{longer_bundle}@onnxruntime", "onnxruntime"):
        assert settled_gates(Gates(), held_against(name), 1, 1, options).limits


def test_a_baseline_that_cannot_be_saved_loses_no_other_file(
    command: Command, digits_bundle: Path, longer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str, *__: str) -> None:
        raise UsageError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr("mmd_export.cli_bench.write_text", full)
    save = ("--save-baseline", tmp_path / "ratio.json", "--batches", 1, "--rounds", 12, *QUICK)
    files = ("--json", tmp_path / "bench.json", "--junit", tmp_path / "bench.xml", "--summary", tmp_path / "summary.md")
    code, out, err = command("bench", digits_bundle, "--against", longer_bundle, *save, *files)
    assert code == 2
    assert "ratio.json cannot be written: No space left on device" in err
    assert "digits-6" in out
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.xml", "summary.md"}


def test_a_gate_on_a_baseline(command: Command, digits_bundle: Path, longer_bundle: Path, saved: Path) -> None:
    gate = ("--against", longer_bundle, "--gate", saved, "--rounds", 12, *QUICK)
    code, out, err = command("bench", digits_bundle, *gate, "--max-regression", "90%")
    assert code == 0, err
    assert "times the baseline's 0." in out
    faster = json.loads(saved.read_text())
    for key in ("median", "low", "high"):
        faster["ratio"][key] /= 3
    assert faster.pop("cuda_graph") is False  # a file from before it was noted is read as that
    other = saved.with_name("faster.json")
    other.write_text(json.dumps(faster))
    code, _, err = command("bench", digits_bundle, "--against", longer_bundle, "--gate", other, "--rounds", 12, *QUICK)
    assert code == 6, err


def changed(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> object:
        *parents, last = key.split(".")
        for parent in parents:
            data = data[parent]
        old, data[last] = data[last], value
        return old

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("machine.cpu", "Another 9000", "of another machine: cpu is Another 9000 there and"),
        ("machine.cores", 128, "of another machine: cores is 128 there and"),
        ("model.sha256", "ab" * 32, "of another model: sha256 is abababababababab there and"),
        ("model.steps", 50, "of another model: steps is 50 there and 2 now"),
        ("model.batch", 8, "of another model: batch is 8 there and 1 now"),
        ("reference.sha256", "ab" * 32, "of another reference: sha256 is abababababababab there and"),
        ("reference.runs_in", "onnxruntime: 0.1", "of another reference: runs_in is onnxruntime: 0.1 there and"),
        ("threads", 7, "of another run: threads is 7 there and 1 now"),
        ("cuda_graph", True, "of another run: cuda_graph is True there and False now"),
        ("schema_version", 99, "has schema 99, this version reads schema 1"),
        ("ratio.median", -1.0, "ratio.median: Input should be greater than 0"),
    ],
)
def test_a_baseline_of_something_else_is_refused_with_both_values(
    command: Command, digits_bundle: Path, longer_bundle: Path, saved: Path, key: str, value: object, message: str
) -> None:
    data = json.loads(saved.read_text())
    old = changed(key, value)(data)
    other = saved.with_name("other.json")
    other.write_text(json.dumps(data))
    code, _, err = command("bench", digits_bundle, "--against", longer_bundle, "--gate", other, "--rounds", 12, *QUICK)
    assert code == 2
    assert message in err
    assert "measuring" not in err
    if " there and" in message:
        assert str(old)[:16] in err


def test_a_baseline_names_what_it_is_held_against(command: Command, digits_bundle: Path, saved: Path) -> None:
    code, _, err = command("bench", digits_bundle, "--gate", saved, *QUICK)
    assert code == 2
    assert "pass --against with the reference of its baseline" in err
    code, _, err = command("bench", digits_bundle, "--against", "onnxruntime", "--gate", saved, *QUICK)
    assert code == 2
    assert "is held against 'digits-6'; measured are onnxruntime" in err
