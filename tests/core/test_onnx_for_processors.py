"""``--device cpu`` of the onnx and openvino targets: another graph of the same sampler, at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from mmd_export import onnx_winograd
from mmd_export.blame import checkpoint_graph
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import load_checkpoint
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.graph_parts import GraphParts
from mmd_export.target_options import TargetOptions
from tests.models import ATTENTION, save_model

FOR_PROCESSORS = TargetOptions(device="cpu")
WIDE: dict[str, Any] = {"block_out_channels": (16, 32), "in_channels": 1, "out_channels": 1}


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_winograd, "LEAST_PRODUCTS", 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def built(model: Path, out: Path, of_target: TargetOptions = FOR_PROCESSORS, **changes: str) -> Bundle:
    options: dict[str, Any] = {"target": "onnx", "sampler": "ddim"} | changes
    return build(BuildOptions(str(model), out=out, steps=2, of_target=of_target, **options))


@pytest.mark.parametrize(
    ("form", "batch", "sampler"), [("unrolled", "1", "ddim"), ("unrolled", "1..3", "ddpm"), ("loop", "2", "ddpm")]
)
def test_it_is_verified_after_every_step(form: str, batch: str, sampler: str, wide: Path, tmp_path: Path) -> None:
    bundle = built(wide, tmp_path / "out", form=form, batch=batch, sampler=sampler)
    assert bundle.manifest.parity is not None
    assert max(bundle.manifest.parity.values()) <= 1e-5
    counts = bundle.manifest.graph.op_counts
    assert counts["BatchNormalization"] > 0
    graph = onnx.load(bundle.artefact_path).graph
    (body,) = [node.attribute[0].g for node in graph.node if node.op_type == "Loop"] or [graph]
    groups = [attribute.i for node in body.node for attribute in node.attribute if attribute.name == "group"]
    assert {4, 6} <= set(groups)  # F(2, 3) of 4 rows and F(4, 3) of 8
    weights = {value.name for value in graph.initializer}
    assert {name for node in graph.node if node.op_type == "MatMul" for name in node.input[1:]} & weights


def test_bisect_holds_it_against_a_graph_of_the_same_form(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **WIDE, **ATTENTION)
    for name, of_target in (("plain", TargetOptions()), ("cpu", FOR_PROCESSORS)):
        bundle = built(model, tmp_path / name, of_target)
        checkpoint = load_checkpoint(str(model))
        reference = checkpoint_graph(bundle, checkpoint, checkpoint.plan_for(2, sampler="ddim"))
        artefact = ir.load(bundle.artefact_path)
        assert GraphParts(reference).producer.keys() == GraphParts(artefact).producer.keys()
        assert bundle.manifest.graph.device == of_target.device


def test_weights_are_stored_once_and_the_same_twice(wide: Path, tmp_path: Path) -> None:
    plain, *twice = (
        built(wide, tmp_path / name, of_target).artefact_path
        for name, of_target in (("plain", TargetOptions()), ("one", FOR_PROCESSORS), ("two", FOR_PROCESSORS))
    )
    assert twice[0].read_bytes() == twice[1].read_bytes()
    assert onnx.load(plain) != onnx.load(twice[0])
    stored = [_bytes_of_weights(path) for path in (plain, twice[0])]
    assert stored[1] <= stored[0]


def _bytes_of_weights(path: Path) -> int:
    initializers = onnx.load(path).graph.initializer
    return sum(len(value.raw_data) for value in initializers if value.name.startswith("unet."))


def test_openvino_takes_it(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    bundle = built(wide, tmp_path / "out", target="openvino")
    assert bundle.manifest.parity is not None
    assert bundle.manifest.graph.op_counts["GroupConvolution"] > 0


@pytest.mark.parametrize(
    ("device", "changes", "says"),
    [
        ("cpu", {"precision": "fp16"}, "--device cpu is a form of fp32, --precision is fp16"),
        ("cpu", {"target": "openvino", "precision": "w16"}, "--device cpu is a form of fp32, --precision is w16"),
        ("cuda", {}, "--device is 'cuda'; without it, what onnx writes runs on any device"),
    ],
)
def test_what_would_change_nothing_is_refused(
    device: str, changes: dict[str, str], says: str, wide: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        built(wide, tmp_path / "out", TargetOptions(device=device), **changes)


def test_devices_and_targets_that_there_are_not(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device is 'tpu'; give cpu or cuda"):
        TargetOptions(device="tpu")
    for target in ("coreml", "tensorrt"):
        with pytest.raises(NotAvailableError, match=f"target {target} has no --device"):
            built(wide, tmp_path / "out", target=target)
