"""The builder's process, for real: every way in which it ends is one line with the exit code of "not available"."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest

from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.exit_codes import how_it_ended
from mmd_export.trt import worker
from mmd_export.trt.job import Job
from mmd_export.trt.lint import engine_faults, require_buildable
from mmd_export.trt.process import last_useful, run_job
from tests.trt.conftest import OneNode

pytestmark = pytest.mark.usefixtures("_rtx")


def job(onnx: Path, **changes: object) -> Job:
    fields = {"module": "tensorrt_rtx", "onnx": str(onnx), "engine": str(onnx.with_suffix(".plan")), **changes}
    return Job(**fields)  # type: ignore[arg-type]


def refusal(asked: Job, log: Path | None = None) -> str:
    with pytest.raises(NotAvailableError) as error:
        run_job(asked, "TensorRT-RTX", log, lambda _: None)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_crash_of_the_builder_is_one_line_and_its_log_is_kept(one_node: OneNode, tmp_path: Path) -> None:
    crashing, log = one_node("Attention", (1, 2, 4, 8), opset=23, inputs=3), tmp_path / "out.log"
    said = refusal(job(crashing, capabilities=("8.9",)), log)
    assert "TensorRT-RTX: its builder crashed (SIGSEGV); the last it said: [I] " in said
    assert f"all of it is in {log}" in said
    assert "Opset version: 23" in log.read_text()


def test_the_lint_keeps_such_a_graph_away_from_it(one_node: OneNode) -> None:
    crashing = one_node("Attention", (1, 2, 4, 8), opset=23, inputs=3)
    with pytest.raises(NotAvailableError, match=r"TensorRT-RTX cannot be given opset 23, .* and 1 more"):
        require_buildable(crashing, "TensorRT-RTX")
    assert len(engine_faults(ir.load(crashing))) == 2
    double = ir.load(one_node("Relu", (1, 2)))
    double.graph.node(0).outputs[0].dtype = ir.DataType.DOUBLE
    assert engine_faults(double) == ["float64 value 'sample'"]
    levels = ir.load(one_node("Identity", (1, 2)))
    levels.graph.node(0).outputs[0].dtype = ir.DataType.UINT8
    assert engine_faults(levels) == []
    levels.graph.outputs.clear()
    assert engine_faults(levels) == ["inner uint8 value 'sample'"]
    fine = one_node("Relu", (1, 2))
    assert require_buildable(fine, "TensorRT-RTX") == 1
    fine.write_bytes(fine.read_bytes()[:-9])
    with pytest.raises(BundleError, match=r"is no ONNX graph \(.*\); build the bundle again"):
        require_buildable(fine, "TensorRT-RTX")


def test_without_a_choice_it_is_built_for_all_that_have_the_precision(one_node: OneNode) -> None:
    relu = one_node("Relu", (1, 2))
    every = run_job(job(relu), "TensorRT-RTX", None, lambda _: None)["capabilities"]
    newer = run_job(job(relu, least_capability="8.9"), "TensorRT-RTX", None, lambda _: None)["capabilities"]
    assert every[:4] == ["8.0", "8.6", "8.9", "12.0"]
    assert newer == every[2:]


def test_timings_are_kept_and_read_again(one_node: OneNode, tmp_path: Path) -> None:
    """TensorRT-RTX has the interface, though it measures nothing; a file of something else is replaced."""
    timings = tmp_path / "timings.bin"
    asked = job(one_node("Relu", (1, 2)), capabilities=("8.9",), timing_cache=str(timings))
    run_job(asked, "TensorRT-RTX", None, lambda _: None)
    kept = timings.read_bytes()
    assert kept
    for log in (tmp_path / "built.log", tmp_path / "no folder" / "built.log"):  # a cache that cannot be written
        assert run_job(asked, "TensorRT-RTX", None, lambda _: None, log)["capabilities"] == ["8.9"]
    assert "[I]" in (tmp_path / "built.log").read_text()
    (tmp_path / "built.log").unlink()
    run_job(asked, "TensorRT-RTX", None, lambda _: None)
    timings.write_bytes(b"something else")
    run_job(asked, "TensorRT-RTX", None, lambda _: None)
    assert timings.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Relu.onnx", "Relu.plan", "timings.bin"]


def test_timings_that_cannot_be_kept_cost_no_engine(one_node: OneNode, tmp_path: Path) -> None:
    (timings := tmp_path / "timings.bin").mkdir()  # neither read nor replaced, whoever runs this
    asked, log = job(one_node("Relu", (1, 2)), capabilities=("8.9",), timing_cache=str(timings)), tmp_path / "log"
    assert run_job(asked, "TensorRT-RTX", None, lambda _: None, log)["capabilities"] == ["8.9"]
    assert f"[W] the timings are not kept in {timings}: " in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Relu.onnx", "Relu.plan", "log", "timings.bin"]


def test_options_reach_the_library(one_node: OneNode, tmp_path: Path) -> None:
    relu = one_node("Relu", (1, 2))
    run_job(job(relu, hardware_compat="ampere+", workspace=64), "TensorRT-RTX", None, lambda _: None)
    said = refusal(job(relu, version_compat=True), tmp_path / "out.log")
    assert "the build failed: " in said
    assert "nvinfer_lean" in said  # which is what it would embed
    assert "[E]" in (tmp_path / "out.log").read_text()


def test_older_and_newer_releases() -> None:
    """Without the check of every node, without names in its errors; with one kind of network only."""
    error = SimpleNamespace(desc=lambda: "no such op")
    parser = SimpleNamespace(num_errors=2, get_error=lambda _: error)
    assert worker._support(parser, Path("none")) is False
    assert worker._complaint(parser) == "it does not take node no such op and 1 more"
    assert worker._complaint(SimpleNamespace(num_errors=0)) == "it does not take the graph"
    assert worker._strongly_typed(SimpleNamespace()) == 0
    kinds = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    assert worker._strongly_typed(kinds) == 2
    with pytest.raises(worker.Refused, match=r"this release has no BuilderFlag.REFIT; leave the option out or update"):
        worker._member(SimpleNamespace(__name__="BuilderFlag"), "REFIT")
    assert worker._set_capabilities(SimpleNamespace(), None, job(Path("a"))) == []


def test_random_numbers_which_the_parser_takes_are_refused(one_node: OneNode) -> None:
    with pytest.raises(NotAvailableError, match="RandomNormalLike"):
        require_buildable(one_node("RandomNormalLike", (1, 2)), "TensorRT-RTX")


def test_every_node_that_it_does_not_take_is_in_the_log(one_node: OneNode, tmp_path: Path) -> None:
    graph = one_node("Det", (1, 1, 2, 2))
    model = ir.load(graph)
    second = ir.Node("", "Det", [model.graph.inputs[0]], name="another")
    taken = ir.Node("", "Relu", [model.graph.inputs[0]], name="taken")
    model.graph.extend((second, taken))
    model.graph.outputs.append(taken.outputs[0])
    taken.outputs[0].name = "third"
    model.graph.outputs.append(second.outputs[0])
    second.outputs[0].name = "other"
    ir.save(model, graph)
    said = refusal(job(graph, capabilities=("8.9",)), log := tmp_path / "out.log")
    assert f"and 1 more; it takes 1 other node; use --target onnx; all of it is in {log}" in said
    for name in ("the_node", "another"):
        assert f"not taken: '{name}' (Det): UNSUPPORTED_NODE" in log.read_text()


def test_a_node_that_it_does_not_take_is_named(one_node: OneNode, tmp_path: Path) -> None:
    said = refusal(job(one_node("Det", (1, 1, 2, 2)), capabilities=("8.9",)), tmp_path / "out.log")
    assert said.startswith("TensorRT-RTX: it does not take node 'the_node' (Det): UNSUPPORTED_NODE; it takes 0 other")
    assert said.endswith("; use --target onnx")
    assert not (tmp_path / "out.log").exists()


def test_a_capability_that_it_has_not_is_named(one_node: OneNode) -> None:
    said = refusal(job(one_node("Relu", (1, 2)), capabilities=("8.9", "9.0")))
    assert "it has no compute capability 9.0; it has 7.5, 8.0, " in said


def test_too_little_memory_says_so(one_node: OneNode) -> None:
    said = refusal(job(one_node("Relu", (1, 2)), capabilities=("8.9",), memory_limit=8))
    assert re.search(r"its builder took \d+ MiB of memory, --memory-limit is 8 MiB; try more", said)
    run_job(job(one_node("Relu", (1, 2)), capabilities=("8.9",), memory_limit=8192), "x", None, lambda _: None)


def test_a_library_that_cannot_be_loaded(one_node: OneNode) -> None:
    said = refusal(job(one_node("Relu", (1, 2)), module="mmd_no_such_library"))
    assert "ended with exit code 1" in said
    assert "ModuleNotFoundError: No module named 'mmd_no_such_library'" in said


def test_progress_is_told(one_node: OneNode) -> None:
    heard: list[str] = []
    done = run_job(job(one_node("Relu", (1, 2)), capabilities=("8.9",)), "TensorRT-RTX", None, heard.append)
    assert done["capabilities"] == ["8.9"]
    assert heard == ["TensorRT-RTX takes every node", "TensorRT-RTX: Building engine"]


def test_a_stop_while_it_builds_leaves_no_process(one_node: OneNode, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with pytest.raises(KeyboardInterrupt):
        run_job(job(one_node("Relu", (1, 2)), capabilities=("8.9",)), "TensorRT-RTX", None, stop)
    assert started[0].returncode == -9


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals of that kind")
def test_how_processes_end() -> None:
    assert how_it_ended(1) == "ended with exit code 1"
    assert how_it_ended(-11) == "crashed (SIGSEGV)"
    assert how_it_ended(-9) == "was killed, often for want of memory (SIGKILL)"
    assert how_it_ended(-6) == "gave up (SIGABRT)"
    assert how_it_ended(-15) == "was ended (SIGTERM)"


def test_the_last_useful_line() -> None:
    assert last_useful("[I] a\n[E] no memory\n[I] freed\n\n") == "[E] no memory"
    assert last_useful("[I] a\nterminate: std::bad_alloc\n[I] b") == "terminate: std::bad_alloc"
    assert last_useful("[I] a\n[I] b\n") == "[I] b"
    assert last_useful("") == "nothing"
