"""The onnxruntime adapter on a chain made by hand."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mmd_export.bundle import BatchSpec, Bundle
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, UsageError
from mmd_export.parity import check_artefact
from mmd_export.runtime import ChainSession, RunOptions, Runtime, Session
from mmd_runtime import registry
from mmd_runtime.chunks import run_in_batches
from mmd_runtime.onnxruntime import RUNTIME
from tests.runtime.chains import IMAGE, B, W, close, make, noises, reference

OPTIONS = RunOptions(threads=1)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "chain-2", BatchSpec(range=(1, 8)))


@pytest.fixture
def static(tmp_path: Path) -> Bundle:
    return make(tmp_path / "static", BatchSpec(sizes=(2,)))


# --- the registry


def test_the_runtime_is_found_by_its_file_name() -> None:
    assert "onnxruntime" in registry.runtime_names()
    assert registry.get_runtime("onnxruntime") is RUNTIME
    assert registry.runtime_for("onnx").name in registry.runtime_names()


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"runtime 'tvm' is unknown; known: .*onnxruntime"):
        registry.get_runtime("tvm")
    with pytest.raises(NotAvailableError, match=r"no runtime runs 'tvm' artefacts; known formats: .*onnx"):
        registry.runtime_for("tvm")


def test_looking_for_runtimes_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mmd_runtime import registry as r; "
        "[r.get_runtime(n).availability() for n in r.runtime_names()]; "
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'diffusers', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_keeps_the_protocols(bundle: Bundle) -> None:
    assert isinstance(RUNTIME, Runtime)
    assert isinstance(RUNTIME.open(bundle, OPTIONS), Session)
    assert isinstance(RUNTIME.open_chain(bundle, OPTIONS), ChainSession)
    assert RUNTIME.availability().available


# --- running


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_run_gives_the_sample(bundle: Bundle, threads: int) -> None:
    inputs = noises(3)
    outputs = RUNTIME.open(bundle, RunOptions(threads=threads)).run(inputs)
    assert set(outputs) == {"sample"}
    close(outputs["sample"], reference(**inputs)["sample"])


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("batch", ["1", "2", "1,4,8", "1..8", "4", "2..3"])
def test_any_number_of_images_in_batches(tmp_path: Path, batch: str, count: int) -> None:
    bundle = make(tmp_path / "b", BatchSpec.parse(batch))
    inputs = noises(count)
    close(run_in_batches(RUNTIME.open(bundle, OPTIONS), bundle, inputs), reference(**inputs)["sample"])


def test_batches_need_as_many_of_everything(bundle: Bundle) -> None:
    session = RUNTIME.open(bundle, OPTIONS)
    for wrong in ({}, {"noise": noises(0)["noise"]}, {**noises(3), "step_noise": noises(2)["step_noise"]}):
        with pytest.raises(UsageError, match="as many of everything else"):
            run_in_batches(session, bundle, wrong)


# --- inputs that do not fit


@pytest.mark.parametrize("method", ["run", "run_chain"])
def test_inputs_are_compared_with_the_manifest(static: Bundle, method: str) -> None:
    run: Any = getattr(
        RUNTIME.open(static, OPTIONS) if method == "run" else RUNTIME.open_chain(static, OPTIONS), method
    )
    good = noises(2)
    message = "input 'noise' has batch 3, bundle chain-2 was built for 2; build with --batch 3"
    with pytest.raises(UsageError) as error:
        run(noises(3))
    assert str(error.value) == message
    cases: list[tuple[dict[str, Any], str]] = [
        ({"noise": good["noise"]}, "bundle chain-2: input 'step_noise' is missing, given: noise; add it"),
        ({**good, "timestep": good["noise"]}, "input 'timestep' is unknown, the manifest says noise, step_noise"),
        ({**good, "noise": good["noise"].astype(np.float64)}, "input 'noise' is float64, the manifest says float32"),
        ({**good, "noise": good["noise"].tolist()}, "input 'noise' is list, the manifest says float32"),
        ({**good, "noise": good["noise"][0]}, r"'noise' is \(1, 2, 4\), the manifest says \(2, 1, 2, 4\)"),
        ({**good, "noise": np.zeros((2, 1, 4, 4), np.float32)}, r"'noise' is \(2, 1, 4, 4\), the manifest says"),
        ({**good, "noise": np.float32(0)}, "input 'noise' is "),
        ({**good, "step_noise": np.zeros((2, 2, *IMAGE), np.float32)}, r"the manifest says \(1, 2, 1, 2, 4\)"),
        ({**good, "step_noise": noises(1)["step_noise"]}, "input 'step_noise' has batch 1"),
    ]
    for inputs, expected in cases:
        with pytest.raises(UsageError, match=expected):
            run(inputs)
    close(run(good)["sample"], reference(**good)["sample"])


def test_one_step_noise_for_each_image(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'step_noise' has batch 2, 'noise' has 3"):
        RUNTIME.open(bundle, OPTIONS).run({**noises(3), "step_noise": noises(2)["step_noise"]})


# --- inside the chain


@pytest.mark.parametrize("external", [False, True])
def test_the_chain_shows_every_state(tmp_path: Path, external: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make(tmp_path / "b", BatchSpec(sizes=(2,)), external=external)
    assert (bundle.folder / "model.onnx_data").exists() == external
    monkeypatch.chdir("/")
    inputs = noises(2)
    expected = reference(**inputs)
    chain = RUNTIME.open_chain(Bundle.open(bundle.folder), OPTIONS)
    found = chain.run_chain(inputs)
    assert set(found) == {"state.1", "state.2", "sample"}
    for name, array in found.items():
        close(array, expected[name])
    close(chain.run_step(1, inputs), expected["state.1"])


def test_a_step_starts_from_the_given_state(bundle: Bundle) -> None:
    chain, inputs = RUNTIME.open_chain(bundle, OPTIONS), noises(3)
    forced = np.full((3, *IMAGE), 0.125, np.float32)
    output = inputs["noise"].astype(np.float64) @ W
    expected = B * forced + forced.astype(np.float64) @ W + output
    close(chain.run_step(2, {**inputs, "state.1": forced}), expected)
    close(chain.run_step(2, {"state.1": forced, "output.1": output.astype(np.float32)}), expected)
    close(chain.run_step(2, {"state.1": forced, "output.1": np.zeros_like(forced)}), expected - output)
    wrong = {"state.2": forced, "state.1": forced, "output.1": np.zeros_like(forced)}
    close(chain.run_step(2, wrong), expected - output)  # the goal itself is never taken from what is known


def test_a_step_works_for_other_batch_sizes_in_turn(bundle: Bundle) -> None:
    chain = RUNTIME.open_chain(bundle, OPTIONS)
    for count in (1, 4, 1):
        close(chain.run_step(1, noises(count)), reference(**noises(count))["state.1"])


def test_a_step_says_what_it_lacks(bundle: Bundle) -> None:
    chain, inputs = RUNTIME.open_chain(bundle, OPTIONS), noises(1)
    state = np.zeros((1, *IMAGE), np.float32)
    with pytest.raises(UsageError, match="step 3 is asked for; it has steps 1 to 2"):
        chain.run_step(3, {**inputs, "state.2": state})
    with pytest.raises(UsageError, match=r"step 2 starts from 'state.1'"):
        chain.run_step(2, inputs)
    with pytest.raises(UsageError, match="step 1 reads 'step_noise'"):
        chain.run_step(1, {"noise": inputs["noise"]})
    with pytest.raises(UsageError, match=r"'state.1' is \(1, 2, 4\)"):
        chain.run_step(2, {**inputs, "state.1": state[0]})


# --- what cannot be loaded


@pytest.mark.parametrize("broken", ["truncated", "garbage"])
def test_a_damaged_model_is_a_damaged_bundle(tmp_path: Path, broken: str) -> None:
    bundle = make(tmp_path / "b", BatchSpec(sizes=(2,)), broken=broken)
    for opener in (RUNTIME.open, RUNTIME.open_chain):
        with pytest.raises(BundleError, match=r"bundle chain-2: model.onnx cannot be loaded: .*; rebuild") as error:
            opener(bundle, OPTIONS)
        assert "\n" not in str(error.value)


def test_what_an_older_onnxruntime_does_to_fp8_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves a float8 value through Transpose, which opset 20 has for other types only."""
    bundle = make(tmp_path / "b", BatchSpec(sizes=(2,)))
    save_float8_transpose(bundle.artefact_path)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    with pytest.raises(NotAvailableError, match=r"onnxruntime is 1\.31\.1, fp8 needs 1\.32 or newer; upgrade"):
        RUNTIME.open(bundle, OPTIONS)
    monkeypatch.setattr("onnxruntime.__version__", "1.32.0")
    with pytest.raises(BundleError, match="rebuild the bundle"):
        RUNTIME.open(bundle, OPTIONS)


def save_float8_transpose(path: Path) -> None:
    kind = onnx.TensorProto.FLOAT8E4M3FN
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Transpose", ["noise"], ["sample"])
    graph = onnx.helper.make_graph([node], "g", [value("noise", kind, (2, 1))], [value("sample", kind, (1, 2))])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)


def test_a_state_without_its_name_is_found(tmp_path: Path) -> None:
    chain = RUNTIME.open_chain(make(tmp_path / "b", BatchSpec(sizes=(2,)), broken="unnamed"), OPTIONS)
    with pytest.raises(BundleError, match=r"the graph has no value 'state.2'"):
        chain.run_chain(noises(2))


def test_a_graph_with_other_inputs_than_the_manifest_is_found(static: Bundle) -> None:
    only_noise = static.manifest.model_copy(update={"inputs": static.manifest.inputs[:1]})
    with pytest.raises(BundleError, match=r"model.onnx takes .*step_noise.*, the manifest says \{'noise'"):
        RUNTIME.open(Bundle(static.folder, only_noise), OPTIONS)


def test_a_failure_while_running_is_one_line(static: Bundle) -> None:
    wrong = static.manifest.model_copy(
        update={
            "batch": BatchSpec(range=(1, 8)),
            "inputs": tuple(
                spec.model_copy(
                    update={
                        "shape": tuple(
                            "batch" if size == 2 and axis < 2 else size for axis, size in enumerate(spec.shape)
                        )
                    }
                )
                for spec in static.manifest.inputs
            ),
        }
    )
    with pytest.raises(MmdExportError, match="bundle chain-2: onnxruntime failed while running it") as error:
        RUNTIME.open(Bundle(static.folder, wrong), OPTIONS).run(noises(3))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_its_pip_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotAvailableError, match=r"pip install 'mmd-export\[onnx\]'"):
        RUNTIME.open(bundle, OPTIONS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    monkeypatch.setattr("mmd_export.runtime.find_spec", importlib.util.find_spec)
    assert not RUNTIME.availability().available
    assert RUNTIME.availability().install == "pip install 'mmd-export[onnx]'"
    with pytest.raises(NotAvailableError, match=r"needs the onnx package.*pip install 'mmd-export\[onnx\]'"):
        RUNTIME.open_chain(bundle, OPTIONS)


@pytest.mark.parametrize("whole", [True, False])
def test_the_artefact_is_opened_again_unless_the_chain_runs_it_whole(
    static: Bundle, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    chain: Any = RUNTIME.open_chain(static, OPTIONS)
    session, opened = RUNTIME.open(static, OPTIONS), []

    def note(*_: Any) -> Session:
        opened.append(session)
        return session

    chain.whole = whole
    monkeypatch.setattr(type(RUNTIME), "open_chain", lambda *_: chain)
    monkeypatch.setattr(type(RUNTIME), "open", note)
    assert check_artefact(static, RUNTIME, OPTIONS).passed
    assert len(opened) == (0 if whole else 1)
