"""``--device cpu`` of the onnx and openvino targets: another graph of the same sampler, at every step."""

from __future__ import annotations

from collections.abc import Iterator
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
from tests.models import ATTENTION, TWO_LEVELS, save_model

FOR_PROCESSORS = TargetOptions(device="cpu")
WIDE: dict[str, Any] = {"block_out_channels": (16, 32)}


@pytest.fixture(scope="module", autouse=True)
def _however_small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_winograd, "LEAST_PRODUCTS", 1)
        yield


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wide") / "model", **{**TWO_LEVELS, **WIDE})


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("attentive") / "model", **{**ATTENTION, **WIDE})


@pytest.fixture(scope="module")
def plain(attentive: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built(attentive, tmp_path_factory.mktemp("bundles") / "plain", TargetOptions(), verify=False)


@pytest.fixture(scope="module")
def fast(attentive: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built(attentive, tmp_path_factory.mktemp("bundles") / "fast")


def built(model: Path, out: Path, of_target: TargetOptions = FOR_PROCESSORS, **changes: Any) -> Bundle:
    options: dict[str, Any] = {"target": "onnx", "sampler": "ddim"} | changes
    return build(BuildOptions(str(model), out=out, steps=2, of_target=of_target, **options))


@pytest.mark.parametrize(("form", "batch"), [("unrolled", "1..3"), ("loop", "2")])
def test_it_is_verified_after_every_step(form: str, batch: str, wide: Path, tmp_path: Path) -> None:
    require_verified(built(wide, tmp_path / "out", form=form, batch=batch, sampler="ddpm"))


def test_attention_and_one_image_are_verified_after_every_step(fast: Bundle) -> None:
    require_verified(fast)


def require_verified(bundle: Bundle) -> None:
    """It keeps the tolerance of float32, and its convolutions are products of the transformed."""
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


def test_bisect_holds_it_against_a_graph_of_the_same_form(attentive: Path, plain: Bundle, fast: Bundle) -> None:
    for bundle, of_target in ((plain, TargetOptions()), (fast, FOR_PROCESSORS)):
        checkpoint = load_checkpoint(str(attentive))
        reference = checkpoint_graph(bundle, checkpoint, checkpoint.plan_for(2, sampler="ddim"))
        artefact = ir.load(bundle.artefact_path)
        assert GraphParts(reference).producer.keys() == GraphParts(artefact).producer.keys()
        assert bundle.manifest.graph.device == of_target.device


def test_weights_are_stored_once_and_the_same_twice(
    attentive: Path, plain: Bundle, fast: Bundle, tmp_path: Path
) -> None:
    again = built(attentive, tmp_path / "again", verify=False)
    assert fast.artefact_path.read_bytes() == again.artefact_path.read_bytes()
    assert onnx.load(plain.artefact_path) != onnx.load(fast.artefact_path)
    stored = [_bytes_of_weights(bundle.artefact_path) for bundle in (plain, fast)]
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
