"""``bench`` on the command line: batches, baselines, cold starts, and what it refuses."""

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

from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.ci_files import Case, bench_cases, junit_xml, verify_cases
from mmd_export.commands.bench import bench
from mmd_export.commands.bench_gate import Gates
from mmd_export.commands.candidates import BenchOptions, Checkpoints, candidates_of, inputs_of
from mmd_export.latency import LatencyReport, measure
from mmd_export.manifest import DeferredInfo
from mmd_export.plan import StepPlan
from mmd_export.torch_baselines import baseline
from tests.cli.conftest import Command

QUICK = ("--threads", 1, "--cold", 0)


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
