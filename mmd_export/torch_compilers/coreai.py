"""A sampler as a Core AI asset, by Apple's coreai-torch (beta). Every method is a function of one program.

``main``: inputs of the manifest -> sample. ``chain``: the same -> (sample, state_1, ..., state_K).
``step_<k>``: inputs, state_1, ..., state_<k-1> -> state_<k>. Weights are stored once for all of them.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from mmd_export.errors import NotAvailableError
from mmd_export.program import SamplerProgram
from mmd_export.specialise import quiet_copies
from mmd_export.unrolled_program import unroll, unroll_step

MAIN = "main"
_DATE = "20270101T000000Z"  # an asset of no certain day, so that one program is the same bytes every day


def write_asset(program: SamplerProgram, output: str, path: Path) -> dict[str, int]:
    """Convert and save all functions; returns the operators of ``main``. NotAvailableError names one it lacks."""
    coreai_torch = _coreai_torch()
    TorchConverter, get_decomp_table = coreai_torch.TorchConverter, coreai_torch.get_decomp_table
    from coreai_torch.debugging.debug_info import strip_debug_info

    converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
    counts: Counter[str] = Counter()
    with _fixed_names(), quiet_copies(), redirect_stdout(sys.stderr):  # it draws a progress bar
        for name, (exported, outputs) in _functions(program, output).items():
            lowered = exported.run_decompositions(get_decomp_table())
            inputs = [each for each in lowered.graph_signature.user_inputs if isinstance(each, str)]
            with _in_one_line():
                converter.add_exported_program(lowered, input_names=inputs, output_names=outputs, entrypoint_name=name)
            if name == MAIN:
                counts = _op_counts(lowered)
        with _in_one_line():
            converted = converter.to_coreai()
    strip_debug_info(converted)
    converted.save_asset(path)
    _settle_metadata(path / "metadata.json")
    return dict(sorted(counts.items()))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Its ValueError, for an operator that it lacks, as NotAvailableError."""
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise NotAvailableError(f"target coreai: {reason}; use --target onnx or coreml") from error


def _coreai_torch() -> Any:
    """The package; 0.4.3 warns that torch 2.13.0+cpu is newer than 2.13.0. Delete when it leaves out local versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coreai-torch has only been validated", UserWarning)
        return importlib.import_module("coreai_torch")


def _functions(program: SamplerProgram, output: str) -> dict[str, tuple[ExportedProgram, list[str]]]:
    """Each function with the names of its outputs."""
    states = [f"state_{k}" for k in range(1, program.plan.step_count + 1)]
    return {
        MAIN: (unroll(program, output), ["sample"]),
        "chain": (unroll(program, output, states=True), ["sample", *states]),
        **{f"step_{k}": (unroll_step(program, k), [f"state_{k}"]) for k in range(1, program.plan.step_count + 1)},
    }


def _op_counts(exported: ExportedProgram) -> Counter[str]:
    """How often the program calls each operator that computes something."""
    names = (str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if "getitem" not in name and "_assert" not in name)


@contextmanager
def _fixed_names() -> Iterator[None]:
    """Names of composite operators that are the same each time: coreai-core 1.0.0b3 ends them in eight random letters.

    ``choice`` in coreai/authoring/graph_builder.py, line 528, and func.py, line 447, is that of ``secrets``. Delete
    when two conversions of one program are the same bytes without it.
    """
    from coreai.authoring import func, graph_builder

    modules: tuple[Any, ...] = (func, graph_builder)
    kept, letters = [module.choice for module in modules], random.Random(0)
    for module in modules:
        module.choice = letters.choice
    try:
        yield
    finally:
        for module, choice in zip(modules, kept, strict=True):
            module.choice = choice


def _settle_metadata(path: Path) -> None:
    """Keys in order, and no time of day."""
    metadata = json.loads(path.read_text(encoding="utf-8")) | {"creationDate": _DATE}
    path.write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
