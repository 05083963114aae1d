"""OpenVINO IR: on graphs made by hand what conversion keeps, on a small bundle what is written and what is refused."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmd_export import openvino_ir
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import BatchSpec, Bundle
from mmd_export.commands.bench import bench
from mmd_export.commands.candidates import BenchOptions
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError
from mmd_export.openvino_library import openvino
from mmd_export.parity import check_artefact
from mmd_export.runtime import RunOptions
from mmd_export.targets import get_target
from mmd_runtime.openvino import RUNTIME
from tests.models import new_unet, tiny
from tests.older import needs

__all__ = ["tiny"]  # the fixture
OPTIONS = RunOptions(threads=1)
WIDTH = 32
Arrays = dict[str, np.ndarray[Any, Any]]


def constants(seed: int = 0) -> Arrays:
    """A weight of 1,024 values, one that float16 cannot hold, and a bias."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    huge = weight.copy()
    huge[0, 0] = 7e4
    return {"weight": weight, "huge": huge, "bias": weight[0] / 3, "a": np.float32(0.3), "b": np.float32(0.7)}


def save_graph(path: Path, extra: str = "", values: Arrays | None = None) -> Arrays:
    """state.1 = a x; state.2 = (b state.1) W + bias; sample = tanh(state.2 H), or ``extra`` of it."""
    values = values or constants()
    nodes = [
        helper.make_node("Mul", ["noise", "a"], ["state.1"]),
        helper.make_node("Mul", ["state.1", "b"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["state.2"]),
        helper.make_node("MatMul", ["state.2", "huge"], ["last"]),
        helper.make_node(extra or "Tanh", ["last"], ["sample"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return values


def names_in(model: Any) -> set[str]:
    return {name for node in model.get_ordered_ops() for port in node.outputs() for name in port.get_names()}


# --- conversion


def test_no_state_is_lost_and_the_sample_is_the_only_output(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx")
    hidden = openvino_ir.convert(tmp_path / "model.onnx", [])
    assert "state.1" not in names_in(hidden)  # fused with the next factor
    save_graph(tmp_path / "model.onnx")
    model = openvino_ir.convert(tmp_path / "model.onnx", ["state.1", "state.2"])
    assert {"state.1", "state.2"} <= names_in(model)
    assert [port.get_any_name() for port in model.outputs] == ["sample"]


def test_equal_graphs_give_equal_files(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_graph(tmp_path / "model.onnx")
        openvino_ir.save(openvino_ir.convert(tmp_path / "model.onnx", ["state.1"]), tmp_path / f"{name}.xml")
    for suffix in ("xml", "bin"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    assert str(tmp_path) not in (tmp_path / "1.xml").read_text()


@pytest.mark.parametrize("half", [False, True])
def test_large_weights_are_halved_and_nothing_else(tmp_path: Path, half: bool) -> None:
    values = save_graph(tmp_path / "model.onnx")
    model = openvino_ir.convert(tmp_path / "model.onnx", ["state.1", "state.2"])
    if half:
        openvino_ir.halve_weights(model)
    openvino_ir.save(model, tmp_path / "model.xml")
    facts = openvino_ir.facts(tmp_path / "model.xml")
    assert facts["unique_weight_bytes"] == (tmp_path / "model.bin").stat().st_size
    assert facts["nodes"] == sum(facts["op_counts"].values()) == 6 + half
    found = layers(tmp_path / "model.xml")
    assert found.count(("Const", "f16", WIDTH * WIDTH)) == int(half)
    assert found.count(("Const", "f32", WIDTH * WIDTH)) == 2 - half  # the one beyond float16's range stays
    noise = np.random.default_rng(1).normal(size=(1, WIDTH)).astype(np.float32)
    expected = chain(noise, values, half=half)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino().Core().compile_model(str(tmp_path / "model.xml"), "CPU", settings)
    np.testing.assert_allclose(compiled({"noise": noise})[0], expected, rtol=0, atol=2e-4)
    assert np.abs(chain(noise, values, half=not half) - expected).max() > 1e-3  # and the other one is another


def layers(path: Path) -> list[tuple[str, str, int]]:
    """Type, element type and number of values of every constant."""
    found = []
    for layer in ET.parse(path).getroot().iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            shape = [int(size) for size in (data.get("shape") or "").split(",") if size.strip()]
            found.append(("Const", str(data.get("element_type")), int(np.prod(shape))))
    return found


def chain(noise: np.ndarray[Any, Any], values: Arrays, *, half: bool) -> np.ndarray[Any, Any]:
    """The graph in float64, its weight as it is stored."""
    weight = values["weight"].astype(np.float16) if half else values["weight"]
    state = (noise.astype(np.float64) * float(values["a"]) * float(values["b"])) @ weight.astype(np.float64)
    result: np.ndarray[Any, Any] = np.tanh((state + values["bias"]) @ values["huge"].astype(np.float64))
    return result


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx", extra="Det")
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with pytest.raises(NotAvailableError) as error:
        openvino_ir.convert(tmp_path / "model.onnx", [])
    assert (root.level, root.filters, root.handlers) == before
    needs("openvino", "2026.4", "it has other words for this")
    assert str(error.value) == (
        f"openvino {version('openvino')} cannot convert the graph: "
        "No conversion rule found for operations: Det-20; use --target onnx"
    )


def test_nothing_is_reported_and_nothing_written_to_the_home_folder(tmp_path: Path) -> None:
    save_graph(tmp_path / "model.onnx")
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys\nfrom pathlib import Path\nfrom mmd_export import openvino_ir\n"
        "from mmd_export.openvino_library import openvino\n"
        f"path = Path({str(tmp_path)!r})\n"
        "model = openvino_ir.convert(path / 'model.onnx', ['state.1'])\nopenvino_ir.save(model, path / 'model.xml')\n"
        "openvino().Core().compile_model(str(path / 'model.xml'), 'CPU')\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        "import openvino_telemetry\n"  # it is there, and can be had by others again
    )
    private = {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    environment = os.environ | private | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert not list(home.iterdir())


# --- a bundle


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two steps of Euler, whose network sees a scaled state; weights in half precision, bytes out."""
    out = tmp_path_factory.mktemp("openvino") / "bundle"
    options = BuildOptions(str(tiny), "openvino", out, "w16", "2", "uint8", steps=2, sampler="euler")
    return build(options)


def copy(bundle: Bundle, folder: Path) -> Bundle:
    """Another folder with the same manifest: what damage would be without the hashes."""
    shutil.copytree(bundle.folder, folder)
    return Bundle(folder, bundle.manifest)


def test_the_bundle_says_what_it_is(bundle: Bundle) -> None:
    manifest = Bundle.open(bundle.folder).manifest
    paths = [bundle.folder / name for name in ("model.xml", "model.bin")]
    assert bundle.artefact_bytes == sum(path.stat().st_size for path in paths)
    assert manifest.toolchain["openvino"] == version("openvino")
    assert manifest.graph.unique_weight_bytes == paths[1].stat().st_size
    parameters = sum(parameter.numel() for parameter in new_unet().parameters())
    assert 2 * parameters < manifest.graph.unique_weight_bytes < 4 * parameters  # once, and some of them halved
    assert manifest.graph.op_counts["Convolution"] % 2 == 0
    assert manifest.parity is not None
    assert {"sample", "state.1", "state.2 teacher-forced"} <= set(manifest.parity)


def test_a_multistep_plan_with_history_passes(tiny: Path, tmp_path: Path) -> None:
    built = build(BuildOptions(str(tiny), "openvino", tmp_path / "b", steps=3, sampler="dpmsolver"))
    rung = check_artefact(built, RUNTIME, OPTIONS)
    assert rung.verdict == "passed"
    assert len(rung.comparisons) == 7
    assert rung.worst < 2e-5


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.xml").write_text("no model"),
        lambda folder: (folder / "model.xml").write_bytes((folder / "model.xml").read_bytes()[:3000]),
        lambda folder: (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:100]),
        lambda folder: (folder / "model.bin").unlink(),
        lambda folder: (folder / "model.xml").unlink(),
    ],
    ids=["garbage", "short graph", "short weights", "no weights", "no graph"],
)
def test_a_damaged_model_is_a_damaged_bundle(bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damaged = copy(bundle, tmp_path / "b")
    damage(damaged.folder)
    for opener in (RUNTIME.open, RUNTIME.open_chain):
        with pytest.raises(BundleError, match=r"model.xml cannot be loaded: .+; rebuild the bundle") as error:
            opener(damaged, OPTIONS)
        assert "\n" not in str(error.value)


def test_a_state_without_its_name_is_found(bundle: Bundle, tmp_path: Path) -> None:
    nameless = copy(bundle, tmp_path / "b")
    path = nameless.folder / "model.xml"
    path.write_text(path.read_text().replace('names="state.1"', 'names="other"'))
    chain = RUNTIME.open_chain(nameless, OPTIONS)
    inputs = {"noise": bundle.golden().noise[:2]}
    for run in (lambda: chain.run_chain(inputs), lambda: chain.run_step(1, inputs)):
        with pytest.raises(BundleError, match=r"the graph has no value 'state.1', the golden file has"):
            run()


def test_a_graph_with_other_inputs_than_the_manifest_is_found(bundle: Bundle) -> None:
    noise = bundle.manifest.inputs[0]
    other = bundle.manifest.model_copy(update={"inputs": (noise, noise.model_copy(update={"name": "step_noise"}))})
    with pytest.raises(BundleError, match=r"model.xml takes \{'noise': 'float32'\}, the manifest says .*step_noise"):
        RUNTIME.open(Bundle(bundle.folder, other), OPTIONS)


def test_a_failure_while_running_is_one_line(bundle: Bundle) -> None:
    noise = bundle.manifest.inputs[0].model_copy(update={"shape": ("batch", 1, 8, 8)})
    wrong = bundle.manifest.model_copy(update={"batch": BatchSpec(range=(1, 8)), "inputs": (noise,)})
    with pytest.raises(MmdExportError, match=r"openvino failed while running it: .") as error:
        RUNTIME.open(Bundle(bundle.folder, wrong), OPTIONS).run({"noise": np.zeros((3, 1, 8, 8), np.float32)})
    assert "\n" not in str(error.value)


def test_bench_says_that_it_keeps_nothing_on_a_device(bundle: Bundle) -> None:
    with pytest.raises(NotAvailableError, match="runtime openvino keeps no inputs on the device; leave out --bound"):
        bench(BenchOptions((bundle.folder,), ("openvino",), rounds=1, bound=True))
    assert bench(BenchOptions((bundle.folder,), ("openvino",), rounds=1)).baselines == ("openvino",)


def test_a_missing_package_is_named_with_its_pip_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not RUNTIME.availability().available
    assert RUNTIME.availability().install == "pip install 'mmd-export[openvino]'"
    assert not get_target("openvino").availability().available
    with pytest.raises(NotAvailableError, match=r"openvino is not available .*pip install 'mmd-export\[openvino\]'"):
        RUNTIME.open(bundle, OPTIONS)
