"""A finished package with attention: what is in it, and what reference evaluation says of faults seeded into it."""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmd_export.bundle import Bundle
from mmd_export.cli import app, run
from mmd_export.errors import BundleError, MmdExportError, NotAvailableError, ParityError
from mmd_export.parity import ParityReport, check_artefact
from mmd_export.runtime import RunOptions, runs_whole
from mmd_runtime.coreml import require_system
from mmd_runtime.coreml_reference import RUNTIME
from mmd_runtime.mil.program import Type, read_package

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def test_fp32_is_the_sampler_to_float32_rounding(built: Callable[..., Bundle], tiny_attention: Path) -> None:
    bundle = built(tiny_attention, steps=2)
    assert max((bundle.manifest.parity or {"": 1.0}).values()) <= 1e-5
    assert set(bundle.manifest.parity or {}) == {
        "sample", "state.1", "state.2", "state.1 teacher-forced", "state.2 teacher-forced",
    }  # fmt: skip
    assert "reference evaluation" in bundle.card
    assert "not Core ML" in bundle.card


def test_the_package_is_what_the_manifest_says(built: Callable[..., Bundle], tiny_attention: Path) -> None:
    bundle = built(tiny_attention, steps=2)
    program = read_package(bundle.artefact_path)
    assert dict(program.inputs) == {"noise": Type("fp32", (1, 2, 8, 12))}
    assert program.outputs == ("sample",)
    assert {feature.kind for feature in program.features} == {"fp32"}
    assert program.opset == "CoreML7"
    graph = bundle.manifest.graph
    assert graph.nodes == sum(graph.op_counts.values()) == sum(op.kind != "const" for op in program.ops)
    assert {"layer_norm", "softmax", "conv"} <= set(graph.op_counts)
    assert "scaled_dot_product_attention" not in graph.op_counts
    assert (graph.peak_activation_bytes or 0) >= 2 * math.prod(program.inputs["noise"].shape) * 4
    assert bundle.manifest.hardware == {"deployment_target": "iOS17", "compute_units": "all"}
    files = {path.relative_to(bundle.artefact_path).as_posix() for path in bundle.artefact_path.rglob("*.*")}
    model = "Data/com.apple.CoreML"
    assert files - {model} == {"Manifest.json", f"{model}/model.mlmodel", f"{model}/weights/weight.bin"}


@pytest.fixture
def copy(built: Callable[..., Bundle], tiny_attention: Path, tmp_path: Path) -> Bundle:
    """A bundle whose package may be changed; its hashes are not looked at again."""
    bundle = built(tiny_attention, steps=2)
    shutil.copytree(bundle.folder, tmp_path / "copy")
    return Bundle(tmp_path / "copy", bundle.manifest)


def check(bundle: Bundle) -> None:
    ParityReport(bundle.name, RUNTIME.name, (check_artefact(bundle, RUNTIME, RunOptions()),)).require()


def change(bundle: Bundle, edit: Callable[[Any], None]) -> None:
    """Edit the operations of the model as the converter's own protobuf classes see them."""
    from coremltools.proto import Model_pb2

    path = bundle.artefact_path / MODEL
    spec = Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    edit(spec)
    path.write_bytes(spec.SerializeToString(deterministic=True))


def block(spec: Any) -> Any:
    (found,) = spec.mlProgram.functions["main"].block_specializations.values()
    return found


def ops(spec: Any, kind: str) -> Iterator[Any]:
    return (op for op in block(spec).operations if op.type == kind)


def number(op: Any) -> Any:
    """The list of a const's float."""
    return op.attributes["val"].immediateValue.tensor.floats.values


def rescale_attention(spec: Any) -> None:
    scale = 1.0 / math.sqrt(8)
    found = [op for op in ops(spec, "const") if list(number(op)) and abs(number(op)[0] - scale) < 1e-6]
    assert found
    for op in found:
        number(op)[0] = 1.1 * scale


def drop_clamp(spec: Any) -> None:
    first = next(ops(spec, "clip"))
    bounds = {first.inputs[name].arguments[0].name: sign for name, sign in (("alpha", -1.0), ("beta", 1.0))}
    for op in ops(spec, "const"):
        if op.outputs[0].name in bounds:
            number(op)[0] = 1e6 * bounds[op.outputs[0].name]


def test_reports_say_what_was_run(
    built: Callable[..., Bundle], tiny_attention: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = str(built(tiny_attention, steps=2).folder)
    report = tmp_path / "report.json"
    assert run(app, ["verify", folder, "--json", str(report)]) == 0
    assert "coreml-reference: reference evaluation by numpy" in capfd.readouterr().err
    facts = json.loads(report.read_text(encoding="utf-8"))
    assert facts["runtime"] == "coreml-reference"
    assert "not Core ML" in facts["detail"]
    assert run(app, ["bench", folder]) == 3
    assert "reference evaluation says nothing of the speed" in capfd.readouterr().err
    if sys.platform != "darwin":
        assert run(app, ["verify", folder, "--runtime", "coreml"]) == 3
        assert "Core ML is on macOS alone" in capfd.readouterr().err


def test_the_copy_passes(copy: Bundle) -> None:
    check(copy)


def test_the_package_is_read_once_and_run_once(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = RUNTIME.open_chain(copy, RunOptions())
    assert runs_whole(chain)
    golden = copy.golden()
    inputs = {name: array[:1] for name, array in golden.inputs.items()}
    whole = RUNTIME.open(copy, RunOptions()).run(inputs)["sample"]
    assert np.array_equal(chain.run_chain(inputs)["sample"], whole)
    monkeypatch.setattr(type(RUNTIME), "open", None)
    check(copy)


@pytest.mark.parametrize("edit", [rescale_attention, drop_clamp])
def test_a_wrong_number_in_the_graph(copy: Bundle, edit: Callable[[Any], None]) -> None:
    change(copy, edit)
    with pytest.raises(ParityError, match="is off by"):
        check(copy)


def test_a_wrong_byte_in_a_weight(copy: Bundle) -> None:
    path = copy.artefact_path / WEIGHTS
    data = bytearray(path.read_bytes())
    records = [at for at in range(64, len(data), 64) if struct.unpack_from("<I", data, at)[0] == 0xDEADBEEF]
    largest = max(records, key=lambda at: struct.unpack_from("<Q", data, at + 8)[0])
    start = struct.unpack_from("<Q", data, largest + 16)[0]
    data[start + 3] ^= 0x04  # exponent of the first float32
    path.write_bytes(data)
    with pytest.raises(ParityError):
        check(copy)


def test_a_shape_that_is_not_what_the_op_gives(copy: Bundle) -> None:
    def edit(spec: Any) -> None:
        next(ops(spec, "conv")).outputs[0].type.tensorType.dimensions[1].constant.size += 1

    change(copy, edit)
    with pytest.raises(
        BundleError, match=r"\(conv\) gives .* float32 \(1, 8, 8, 12\), it declares fp32 \(1, 9, 8, 12\)"
    ):
        check(copy)


def test_a_type_that_is_not_what_the_op_gives(copy: Bundle) -> None:
    def edit(spec: Any) -> None:
        next(ops(spec, "conv")).outputs[0].type.tensorType.dataType = 10

    change(copy, edit)
    with pytest.raises(BundleError, match="it declares fp16"):
        check(copy)


def test_an_unknown_op_is_named(copy: Bundle) -> None:
    def edit(spec: Any) -> None:
        next(ops(spec, "softmax")).type = "gru"

    change(copy, edit)
    with pytest.raises(NotAvailableError, match=r"no rule for it: op '.*softmax.*' is 'gru'; verify it on macOS"):
        check(copy)


def rename_state(spec: Any) -> None:
    for op in block(spec).operations:
        for output in op.outputs:
            output.name = output.name.replace("state_1", "other_1")
        for argument in op.inputs.values():
            for bound in argument.arguments:
                if bound.name == "state_1":
                    bound.name = "other_1"


def rename_input(spec: Any) -> None:
    spec.mlProgram.functions["main"].inputs[0].name = "noises"


def rename_output(spec: Any) -> None:
    block(spec).outputs[0] = "state_1"


def lose_a_value(spec: Any) -> None:
    next(ops(spec, "conv")).inputs["x"].arguments[0].name = "nowhere"


def lose_an_argument(spec: Any) -> None:
    del next(ops(spec, "conv")).inputs["weight"]


def describe_another_shape(spec: Any) -> None:
    spec.description.input[0].type.multiArrayType.shape[-1] += 1


def describe_another_output(spec: Any) -> None:
    spec.description.output.add().CopyFrom(spec.description.output[0])
    spec.description.output[1].name = "ghost"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (describe_another_shape, r"it describes 'noise' as fp32 \(1, 2, 8, 13\), the manifest says \(1, 2, 8, 12\)"),
        (describe_another_output, r"it describes \['ghost'\], which the manifest does not have"),
        (rename_state, "'state_1', the state after step 1, is no such value"),
        (rename_input, "it takes {'noises'"),
        (rename_output, "it gives {'state_1'"),
        (lose_a_value, "'nowhere' is given by no op and no input"),
        (lose_an_argument, r"\(conv\) cannot be computed: it has no 'weight'"),
    ],
)
def test_a_broken_graph(copy: Bundle, edit: Callable[[Any], None], message: str) -> None:
    change(copy, edit)
    with pytest.raises(BundleError, match=message):
        check(copy)


def test_damaged_files(copy: Bundle) -> None:
    package = copy.artefact_path
    manifest = json.loads((package / "Manifest.json").read_text(encoding="utf-8"))
    outside = json.loads(json.dumps(manifest).replace("com.apple.CoreML/model.mlmodel", "../../golden.safetensors"))
    damages: list[tuple[str, bytes, str]] = [
        ("Manifest.json", b"{}", "names no root model"),
        ("Manifest.json", json.dumps(outside).encode(), "leads out of the package"),
        (MODEL, b"", "holds no ML Program"),
        (MODEL, (package / MODEL).read_bytes()[:-100], "ends behind the end"),
        (WEIGHTS, b"", "is no blob storage"),
        (WEIGHTS, (package / WEIGHTS).read_bytes()[:-64], "behind the end"),
        (WEIGHTS, (package / WEIGHTS).read_bytes().replace(b"\xef\xbe\xad\xde", b"\0\0\0\0"), "starts with 0x0"),
    ]
    for name, data, message in damages:
        whole = (package / name).read_bytes()
        (package / name).write_bytes(data)
        with pytest.raises(BundleError, match=message) as error:
            RUNTIME.open(copy, RunOptions())
        assert "\n" not in str(error.value)
        (package / name).write_bytes(whole)
    check(copy)


def test_garbage_is_never_an_unexpected_error(copy: Bundle) -> None:
    """Single wrong bytes all over the model: refused in words, or evaluated."""
    path = copy.artefact_path / MODEL
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 15):
        data = bytearray(whole)
        data[place] ^= 0x55
        path.write_bytes(data)
        try:
            RUNTIME.open(copy, RunOptions()).run({"noise": copy.golden().noise[:1]})
        except MmdExportError as error:
            assert "\n" not in str(error)  # noqa: PT017 - what did raise is looked at, nothing has to


def test_an_older_system_than_the_deployment_target() -> None:
    for target, macos in (
        ("iOS17", "14.0"),
        ("macOS15", "15.1"),
        ("iOS26", "16.0"),
        ("iOS26", "26.1"),
        ("new", "13.0"),
    ):
        require_system("b", target, macos)
    for target, macos, oldest in (("iOS18", "14.7", 15), ("macOS26", "15.5", 26)):
        with pytest.raises(
            NotAvailableError, match=f"built for {target}, which is macOS {oldest} or newer, here is macOS"
        ):
            require_system("b", target, macos)
