"""Weights in a file of their own, as for models that one protobuf file cannot hold; the limit is lowered here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle, update_card
from mmd_export.commands.inspect import inspect
from mmd_export.commands.verify import verify
from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.plan_options import PlanOptions
from mmd_export.runtime import RunOptions
from mmd_export.targets import get_target
from mmd_export.targets.onnx import LARGEST_FILE, OnnxTarget, file_size, save
from mmd_runtime.registry import get_runtime
from tests.cli.conftest import Command, command
from tests.export.bundles import contents
from tests.models import ATTENTION, save_model

__all__ = ["command"]
STEPS, LIMIT = 2, 10_000
DATA = "model.onnx_data"


@pytest.fixture(scope="module")
def small_files() -> Iterator[None]:
    """The target with a limit of 10 kB a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_target("onnx"), "largest_file", LIMIT)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "attention", **ATTENTION)


@pytest.fixture(scope="module")
def bundle(small_files: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "large"
    return build(BuildOptions(str(model), "onnx", out, steps=STEPS, batch="1..3"))


def copied(bundle: Bundle, to: Path) -> Path:
    to.mkdir()
    for name, data in contents(bundle.folder).items():
        (to / name).write_bytes(data)
    return to


def test_the_limit_is_below_that_of_protobuf() -> None:
    assert 2**30 < LARGEST_FILE < 2**31 - 2**26
    assert OnnxTarget().largest_file == LARGEST_FILE


def test_the_weights_lie_beside_the_graph(bundle: Bundle) -> None:
    assert set(contents(bundle.folder)) == {"manifest.json", "README.md", "golden.safetensors", "model.onnx", DATA}
    entries = {entry.path: entry for entry in bundle.manifest.files}
    weights = bundle.manifest.graph.unique_weight_bytes
    assert 0.8 * weights < entries[DATA].size <= weights
    assert bundle.artefact_bytes == entries["model.onnx"].size + entries[DATA].size
    assert inspect(str(bundle.folder), PlanOptions())["bytes"] > bundle.artefact_bytes
    proto = onnx.load(bundle.artefact_path, load_external_data=False)
    external = [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {DATA}
    assert all(len(tensor.raw_data) <= 1024 for tensor in proto.graph.initializer)
    onnx.checker.check_model(str(bundle.artefact_path), full_check=True)


def test_every_state_is_right(bundle: Bundle, model: Path) -> None:
    report = verify(bundle, checkpoint=str(model))
    report.require()
    names = [comparison.name for comparison in report.rungs[-1].comparisons]
    found = [name for name in names if not name.startswith("fresh ")]
    assert found == ["sample", "state.1", "state.2", "state.1 teacher-forced", "state.2 teacher-forced"]


def test_a_loop(small_files: None, model: Path, tmp_path: Path) -> None:
    made = build(BuildOptions(str(model), "onnx", tmp_path / "loop", steps=STEPS, batch="1..3", form="loop"))
    assert made.manifest.graph.form == "loop"
    assert DATA in contents(made.folder)
    verify(made).require()


def test_it_is_the_graph_of_one_file(
    bundle: Bundle, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_target("onnx"), "largest_file", LARGEST_FILE)
    whole = build(BuildOptions(str(model), "onnx", tmp_path / "whole", steps=STEPS, batch="1..3"))
    assert DATA not in contents(whole.folder)
    assert onnx.load(whole.artefact_path).graph == _inlined(bundle).graph


def _inlined(bundle: Bundle) -> onnx.ModelProto:
    """The model with its weights read in, without the notes on where they lay."""
    model = onnx.load(bundle.artefact_path)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return model


def test_the_same_bytes_twice(bundle: Bundle, model: Path, tmp_path: Path) -> None:
    again = build(BuildOptions(str(model), "onnx", tmp_path / "again", steps=STEPS, batch="1..3"))
    assert contents(again.folder) == contents(bundle.folder)
    for data in contents(bundle.folder).values():
        assert str(tmp_path.parent).encode() not in data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("changed", f"'{DATA}' has SHA-256"),
        ("shortened", f"'{DATA}' has .* bytes, the manifest says"),
        ("missing", f"'{DATA}' is missing"),
        ("linked", f"'{DATA}' is a symbolic link"),
    ],
)
def test_a_damaged_data_file_is_refused(bundle: Bundle, tmp_path: Path, damage: str, message: str) -> None:
    folder = copied(bundle, tmp_path / "copy")
    path = folder / DATA
    data = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    elif damage == "shortened":
        path.write_bytes(data[:-4])
    elif damage == "linked":
        path.symlink_to(bundle.folder / DATA)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_a_data_file_lost_after_opening_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    opened = Bundle.open(copied(bundle, tmp_path / "copy"))
    (opened.folder / DATA).unlink()
    runtime = get_runtime("onnxruntime")
    for load in (
        lambda: runtime.open(opened, RunOptions()),
        lambda: runtime.open_chain(opened, RunOptions()).run_chain({"noise": opened.golden().noise[:1]}),
    ):
        with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded: .*; rebuild the bundle"):
            load()


def test_it_opens_by_any_path(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a linked folder, by a relative path, and after a change of the working folder."""
    copied(bundle, tmp_path / "place")
    (tmp_path / "link").symlink_to(tmp_path / "place", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    inputs = {"noise": bundle.golden().noise[:2]}
    for path in (Path("place"), Path("link"), tmp_path / "link", Path("place/../link")):
        opened = Bundle.open(path)
        runtime = get_runtime("onnxruntime")
        for found in (
            runtime.open(opened, RunOptions()).run(inputs),
            runtime.open_chain(opened, RunOptions()).run_chain(inputs),
        ):
            np.testing.assert_allclose(found["sample"], bundle.golden().sample[:2], rtol=0, atol=1e-5)


def test_a_new_card_keeps_the_data(bundle: Bundle, tmp_path: Path) -> None:
    opened = Bundle.open(copied(bundle, tmp_path / "copy"))
    inode = (opened.folder / DATA).stat().st_ino
    updated = update_card(opened, opened.card + "\nMeasured.\n")
    assert (updated.folder / DATA).stat().st_ino == inode  # a link, not a copy of gigabytes
    verify(Bundle.open(updated.folder)).require()


def test_the_command_line_counts_the_data(small_files: None, model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "bundle"
    code, shown, _ = command("build", model, "--target", "onnx", "--out", out, "--steps", 1)
    size = (out / "model.onnx").stat().st_size + (out / DATA).stat().st_size
    assert code == 0
    assert f"model.onnx {size / 1e6:.2f} MB" in shown


def test_a_graph_that_fails_the_check_leaves_neither_file(tmp_path: Path) -> None:
    weight = ir.tensor(np.ones((64, 64), np.float32), name="weight")
    value = ir.Value(name="weight", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((64, 64)), const_value=weight)
    node = ir.Node("", "NoSuchOperator", [value], num_outputs=1)
    node.outputs[0].name = "sample"
    graph = ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 20}, name="bad")
    bad = ir.Model(graph, ir_version=10)
    assert 4 * 64 * 64 < file_size(bad) < 4 * 64 * 64 + 4096
    with pytest.raises(NotAvailableError, match=r"fails onnx\.checker"):
        save(bad, tmp_path / "model.onnx", 1000)
    assert not list(tmp_path.iterdir())
