"""``bench`` on the command line: batches, baselines, cold starts, and gates that pass, fail and refuse."""

from __future__ import annotations

import json
import math
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.ci_files import Case, bench_cases, junit_xml, verify_cases
from mmd_export.commands.bench import bench
from mmd_export.commands.bench_gate import Gates, settled_gates
from mmd_export.commands.candidates import BenchOptions, Candidate, Checkpoints, candidates_of, inputs_of
from mmd_export.errors import UsageError
from mmd_export.latency import LatencyReport, measure
from mmd_export.manifest import DeferredInfo
from mmd_export.plan import StepPlan
from mmd_export.torch_baselines import baseline
from tests.cli.conftest import Command

QUICK = ("--threads", 1, "--cold", 0)


@pytest.fixture(scope="session")
def longer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three times the work of ``digits_bundle``, batches 1 and 3."""
    out = tmp_path_factory.mktemp("bundles") / "digits-6"
    build(BuildOptions("digits", "onnx", out, steps=6, batch="1,3", verify=False))
    return out


@pytest.fixture(scope="session")
def saved(digits_bundle: Path, longer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline: the short bundle against the long one."""
    from mmd_export.cli import app, run

    path = tmp_path_factory.mktemp("gates") / "baseline.json"
    arguments = ("bench", digits_bundle, "--against", longer_bundle, "--save-baseline", path, "--rounds", 12, *QUICK)
    assert run(app, [str(argument) for argument in arguments]) == 0
    return path


def test_throughput_and_cold_start(command: Command, longer_bundle: Path, tmp_path: Path) -> None:
    code, out, err = command(
        "bench", longer_bundle, "--against", "onnxruntime:cpu", "--batches", "1,3", "--rounds", 12, "--threads", 1,
        "--percentiles", "50,90", "--json", tmp_path / "bench.json", "--junit", tmp_path / "bench.xml",
    )  # fmt: skip
    assert code == 0, err
    assert "Throughput" in out
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["name"], row["batch"]): row for row in report["throughput"]}
    assert set(rows) == {(name, batch) for name in ("digits-6", "onnxruntime:cpu") for batch in (1, 3)}
    for row in rows.values():
        assert row["low"] <= row["images_per_second"] <= row["high"]
    cold = report["cold"]["digits-6"]
    assert cold["process"] > cold["load"] > 0 < cold["first"]
    assert cold["host_mib"] > 20
    environment = report["environment"]
    assert {"governor", "clock_mhz", "gpu", "cores_usable", "load_before", "packages"} <= set(environment)
    assert {case.attrib["name"] for case in ET.parse(tmp_path / "bench.xml").getroot().iter("testcase")} == {
        "digits-6: measured",
        "onnxruntime:cpu: measured",
    }


def test_a_fresh_process_that_is_killed_is_one_line(
    command: Command, longer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'mmd_export.commands.cold' in sys.orig_argv:\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    against = ("--against", "onnxruntime:cpu", "--rounds", 12, "--threads", 1)
    code, _, err = command("bench", longer_bundle, *against)
    assert code == 3, err
    last = err.splitlines()[-1]
    assert "a fresh process that ran it was killed, often for want of memory (SIGKILL); try --cold 0" in last


def test_the_checkpoint_is_read_once(longer_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of torch baselines, batches and blocks."""
    read: list[str] = []

    def counted(model: str, **options: Any) -> Checkpoint:
        read.append(model)
        return load_checkpoint(model, **options)

    monkeypatch.setattr("mmd_export.checkpoint.load_checkpoint", counted)
    options = BenchOptions(
        (longer_bundle,), ("torch", "per-step", "diffusers"), rounds=6, threads=1, batches=(1, 3), cold=0
    )  # fmt: skip
    assert len(bench(options).latency.seconds) == 4
    assert read == ["digits"]
    gated = bench(replace(options, against=("torch",), batches=(1,), rounds=12), gates=Gates())
    assert gated.verdicts
    assert read == ["digits", "digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batches", "2"), "batch 2, bundle digits-6 was built for 1,3; build with --batch 1,2,3"),
        (("--batches", "1..3"), "--batches is '1..3'"),
        (("--rounds", 50, "--percentiles", "99"), "p99 takes at least 100 rounds, this run has 50"),
        (("--percentiles", "often"), "--percentiles is 'often'"),
        (("--max-regression", "often"), "--max-regression is 'often'"),
        (("--max-regression", "500%"), "--max-regression is 500%, 500 %"),
        (("--max-regression", "5%"), "a gate takes a reference that is measured now; pass --against"),
        (("--max-regression", "5%", "--against", "onnxruntime", "--rounds", 5), "at least 6 rounds, this run has 5"),
        (("--max-regression", "5%", "--against", "onnxruntime", "--seconds", 90), "at most 60 s, --seconds is 90"),
        (("--max-regression", "5%", "--against", "onnxruntime", "--batches", "1,3"), "--batches names 2; name one"),
        (
            ("--max-regression", "5%", "--against", "onnxruntime", "--percentiles", "50"),
            "a gate makes as many rounds as it needs, which may be few; give --percentiles --rounds too",
        ),
        (
            ("--max-regression", "5%", "--against", "onnxruntime", "--rounds", 50, "--percentiles", "99"),
            "p99 takes at least 100 rounds, this run has 50",
        ),
        (
            ("--max-regression", "5%", "--against", "onnxruntime", "--cold", 1),
            "a gate starts no fresh processes, --cold is 1; leave it out, or the gate",
        ),
        (("--against", "nothing"), "--against 'nothing' is none of torch, diffusers, per-step, torch-compile"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    command: Command, longer_bundle: Path, arguments: tuple[object, ...], message: str
) -> None:
    code, _, err = command("bench", longer_bundle, *arguments)
    assert code == 2
    assert message in err
    assert "measuring" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--cold", -1), "--cold is -1; it must be at least 0"),
        (("bench", "--threads", -1), "--threads is -1; it must be at least 0"),
        (
            ("bench", "--threads", 100_000),
            f"--threads is 100000, this machine has {os.cpu_count()} cores; give at most",
        ),
        (("bench", "--seconds", 0), "--seconds is 0; it must be above 0"),
        (("bench", "--seconds", "nan"), "--seconds is nan; it must be above 0"),
        (("bench", "--percentiles", "50,101"), "percentile 101 is not reported; p50, p90 and p99 are"),
        (("report", "--seconds", -1), "--seconds is -1; it must be at least 0"),
        (("report", "--seconds", "inf"), "--seconds is inf; it must be at least 0"),
    ],
)
def test_what_is_no_number_of_anything_is_refused_before_a_bundle_is_opened(
    command: Command, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    name, *options = arguments
    code, _, err = command(name, tmp_path / "nowhere", *options)
    assert code == 2
    assert message in err


def test_bench_says_what_is_left_out_and_what_ran(
    command: Command, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmd_export.commands.bench.BUILT_IN", ())
    code, _, err = command("bench", digits_bundle, "--rounds", 2, *QUICK)
    assert code == 0, err
    assert "torch and per-step are left out: the checkpoint 'digits' was not given; pass --checkpoint MODEL" in err
    assert "preparing digits-2, batch 1\n" in err
    assert "digits-2 runs in onnxruntime: onnxruntime 1." in err
    code, _, err = command("bench", digits_bundle, "--against", "onnxruntime:cpu", "--rounds", 2, *QUICK)
    assert code == 0, err
    assert "left out: the checkpoint" not in err
    assert "preparing digits-2, onnxruntime:cpu, batch 1\n" in err
    assert "onnxruntime:cpu runs in onnxruntime:cpu: " in err


def test_the_time_asked_for_bounds_the_warm_up(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def at_once(calls: Any, rounds: int, *, rest: float, seconds: float) -> LatencyReport:
        given.append(seconds)
        return measure(calls, 1, warmup=0)

    monkeypatch.setattr("mmd_export.commands.bench.measure", at_once)
    options = BenchOptions((digits_bundle,), ("onnxruntime",), threads=1)
    for changes in ({"seconds": 2.0}, {}, {"rounds": 2, "seconds": 4.0}, {"rounds": 2}):
        bench(replace(options, **changes))
    assert given == [2.0, 30.0, 4.0, math.inf]  # with --rounds alone there is no time to keep to


def test_a_deferred_bundle_is_told_from_its_engine(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    recipe = DeferredInfo(format="tensorrt", artefact="model.plan")
    waiting = replace(bundle, manifest=bundle.manifest.model_copy(update={"deferred": recipe}))
    (found,) = candidates_of([waiting], (), 1, BenchOptions((digits_bundle,)), Checkpoints())
    assert found.told.startswith("digits-2 runs in onnxruntime: onnxruntime 1.")
    assert found.told.endswith(f", not the tensorrt engine; run mmd-export finalize {digits_bundle} first")


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


def test_diffusers_own_pipeline_draws_images(digits_bundle: Path) -> None:
    """The pipeline draws its own noise, so that its images are compared by their range and shape alone."""
    bundle, checkpoint = Bundle.open(digits_bundle), load_checkpoint("digits")
    plan, inputs = StepPlan.from_dict(bundle.manifest.plan), inputs_of(bundle, 1)
    call, detail = baseline("diffusers", checkpoint, plan, inputs, threads=1)
    images = call()
    assert images.shape == (1, 8, 8, 1)
    assert 0.0 <= images.min() < images.max() <= 1.0
    assert detail.startswith("diffusers 0.")


def test_every_batch_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sizes: torch takes the second for one of many unless told, and keeps eight graphs, two of each size."""
    graphs: list[list[Any]] = []

    def recorded(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recorded))
    checkpoint = load_checkpoint("python:tests.foreign_nets:Plain")
    plan = checkpoint.plan_for(steps=2)
    for batch in range(1, 6):
        graphs.clear()
        call, _ = baseline("torch-compile", checkpoint, plan, {"noise": np.zeros((batch, 1, 8, 8), np.float32)})
        call()
        assert graphs, f"batch {batch} ran uncompiled"
        assert [each for inputs in graphs for each in inputs if not isinstance(each, torch.Tensor)] == [], batch


def test_inputs_are_repeated_up_to_the_batch(longer_bundle: Path) -> None:
    bundle = Bundle.open(longer_bundle)
    three = inputs_of(bundle, 3)
    assert three["noise"].shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(three["noise"], bundle.golden().noise[:3])


def test_verify_writes_junit_and_summary(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    files = ("--junit", tmp_path / "v.xml", "--summary", tmp_path / "s.md")
    assert command("verify", digits_bundle, *files)[0] == 0
    assert command("verify", digits_bundle, *files)[0] == 0
    suite = ET.parse(tmp_path / "v.xml").getroot()
    names = [case.attrib["name"] for case in suite.iter("testcase")]
    assert names[-1] == "rung 6: artefact in its runtime (onnxruntime)"
    assert (tmp_path / "s.md").read_text().count("## Parity of digits-2: passed") == 2


def test_junit_of_a_failure_and_of_what_xml_cannot_hold() -> None:
    rungs = [
        {"rung": 5, "title": "program", "verdict": "not checked", "skipped": "no checkpoint", "comparisons": []},
        {"rung": 6, "title": "artefact", "verdict": "failed", "atol": 1e-4, "worst": 0.1, "skipped": "",
         "comparisons": [{"name": "sample", "max_abs": 0.1, "atol": 1e-4, "passed": False},
                         {"name": "state.1", "max_abs": 0.2, "atol": 1.0, "passed": True}]},
    ]  # fmt: skip
    root = ET.fromstring(junit_xml("suite", verify_cases({"rungs": rungs})))
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["skipped"]) == ("2", "1", "1")
    (failure,) = root.iter("failure")
    assert failure.attrib["message"].endswith("off: sample 0.1 (tolerance 0.0001)")
    told = verify_cases({"rungs": rungs, "runtime": "coreml-reference", "detail": "reference evaluation"})
    assert [case.name for case in told] == ["rung 5: program", "rung 6: artefact (coreml-reference)"]
    assert told[1].detail.endswith("; reference evaluation")
    strange = ET.fromstring(junit_xml("a<b>&\x00", [Case("\x1b[31mred", failure='"]]>')]))
    assert next(strange.iter("testcase")).attrib["name"] == "?[31mred"
    gate = {"candidate": "a", "against": "b", "limit": 1.05, "verdict": "undecided", "message": "undecided: ..."}
    (case,) = bench_cases({"gates": [gate]})
    assert case.skipped
    assert not case.failure


def test_a_damaged_reference_is_refused(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(digits_bundle, damaged)
    (damaged / "golden.safetensors").unlink()
    code, _, err = command("bench", digits_bundle, "--against", damaged, "--max-regression", "5%", *QUICK)
    assert code == 5
    assert f"{damaged}: bundle digits-2: 'golden.safetensors' is missing" in err  # both are called digits-2
