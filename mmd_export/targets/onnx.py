"""Target ``onnx``: one network call through torch.onnx, K of them composed with the plan, one file."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability, uninstalled
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    import onnx_ir as ir

    from mmd_export.program import SamplerProgram

# An unrolled graph runs faster (benchmarks/results/forms.json), so ``auto`` unrolls as long as it also loads quickly:
# up to the most steps measured there and in forms_large.json that load within so many CPU seconds.
LOADS_WITHIN, LOOP_ABOVE = 2.0, 20
PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir")
# A protobuf message holds less than 2 GiB (https://protobuf.dev/programming-guides/proto-limits): above this weights
# go into a file of their own beside the graph, as ONNX external data.
LARGEST_FILE = 2**31 - 2**27
DATA_SUFFIX = "_data"
_NODE_BYTES = 2048  # what a node takes at most
_INLINE_BYTES = 1024  # shapes and numbers of the plan stay in the graph, where shape inference reads them


class OnnxTarget:
    """ONNX; ``model.onnx_data`` beside it where one file would pass ``largest_file`` bytes.

    Opset 20, but 21 for w4 and 22 for bf16, which have it from there on. What a precision is, and what it costs:
    ``docs/precision.md``.
    """

    name = "onnx"
    format = "onnx"
    artefact = "model.onnx"
    modules: tuple[str, ...] = ("torch", "onnx", "onnxscript", "onnx_ir")
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8", "w8", "w4")
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled", "loop")
    options: tuple[str, ...] = ("calibration", "device")
    several_batches = True
    extra = "onnx"

    def __init__(self, largest_file: int = LARGEST_FILE) -> None:
        self.largest_file = largest_file

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", "pip install 'mmd-export[tune,onnx]'")
        return Availability(True, f"onnx {version('onnx')}")

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """``model.onnx`` [+ ``model.onnx_data``]: checked by onnx.checker, linted; one program gives the same bytes."""
        from mmd_export.onnx_calls import exact_calls, graph_spec
        from mmd_export.onnx_compose import compose
        from mmd_export.onnx_forms import make_lean, suit_processors
        from mmd_export.onnx_lint import report, require_clean
        from mmd_export.onnx_loop import compose_loop
        from mmd_export.precision.lower import lower
        from mmd_export.precision.quantise import Recipe

        exact, spec = exact_calls(program), graph_spec(program, options.output)
        if options.precision == "fp32":  # grids and islands of the others are those of the network's own layers
            make_lean(exact.model, spec)
        form = chosen_form(options.form, program.plan.step_count)
        # TensorRT takes a scale that is a constant, not one that a loop reads from a table.
        recipe = Recipe(per_step=form == "unrolled")
        calls = lower(
            exact,
            options.precision,
            options.target.calibration,
            recipe,
            options.notify,
            options.tuned,
            frozenset(options.float32),
        )
        write = compose_loop if form == "loop" else compose
        model = write(calls.model, program.plan, calls.constants, spec)
        if options.target.device == "cpu":
            suit_processors(model)
        clean_up(model)
        require_clean(model, program.conditions, options.precision)
        save(model, folder / self.artefact, self.largest_file)
        toolchain = {name: version(name) for name in PACKAGES}
        folded = [value for k in range(program.plan.step_count) for value in program.constants(k)]
        facts = report(model, program.batch or options.batch.smallest).to_dict()
        facts |= {"folded_values": len(folded), "folded_bytes": sum(value.nbytes for value in folded)}
        return Compiled(facts | {"device": options.target.device}, toolchain)


def chosen_form(form: str, steps: int) -> str:
    """``form`` itself, or what ``auto`` stands for."""
    if form == "auto":
        return "loop" if steps > LOOP_ABOVE else "unrolled"
    return form


def clean_up(model: ir.Model) -> None:
    """Equal constants once, nothing unused, no metadata, topological order."""
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes

    Sequential(
        passes.DeduplicateInitializersPass(size_limit=2**20),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)


def save(model: ir.Model, path: Path, largest_file: int = LARGEST_FILE) -> None:
    """Write, then check the file in full (shapes inferred, strictly); the copy in memory is gone by then.

    What would be larger than ``largest_file`` has its weights in ``<path>_data``; they are streamed into it.
    """
    import onnx
    import onnx_ir as ir

    data = path.with_name(path.name + DATA_SUFFIX)
    if file_size(model) > largest_file:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    else:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        path.unlink()
        data.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise NotAvailableError(f"the ONNX graph fails onnx.checker: {reason}") from error


def file_size(model: ir.Model) -> int:
    """At most so many bytes as one file; nothing is serialised to find out."""
    from mmd_export.onnx_nodes import weights_of

    weights = [value.const_value for value in weights_of(model)]
    nodes = sum(1 for _ in model.graph.all_nodes())
    return sum(weight.nbytes for weight in weights if weight is not None) + _NODE_BYTES * nodes


TARGET = OnnxTarget()
