"""What typer says of wrong options, and Python of packages that are missing, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The extra that brings a package, by the name under which it is imported; what is needed everywhere is in none.
_EXTRAS = {
    **dict.fromkeys(("torch", "diffusers", "sklearn", "matplotlib"), "tune"),
    **dict.fromkeys(("accelerate", "datasets", "peft", "tensorboard", "transformers"), "finetune"),
    **dict.fromkeys(("onnx", "onnxscript", "onnx_ir", "onnxruntime"), "onnx"),
    "coremltools": "coreml", "coreai": "coreai", "coreai_torch": "coreai", "executorch": "executorch",
    "jinja2": "report", "openvino": "openvino",
}  # fmt: skip


def missing_line(error: ModuleNotFoundError) -> str | None:
    """``torch is not installed; pip install 'mmd-export[tune]'``; None for a module that no extra brings."""
    extra = _EXTRAS.get(error.name or "")  # of a package that is there, a part may be missing: another fault
    return f"{error.name} is not installed; pip install 'mmd-export[{extra}]'" if extra else None


def broken_line(error: BaseException) -> str | None:
    """``onnx is installed but does not import: ...`` with the next move, of an error of an import or what it caused.

    None where the import that failed is not one of a package that an extra brings.
    """
    while not isinstance(error, ImportError):
        if error.__cause__ is None:
            return None
        error = error.__cause__
    importing, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "<module>":  # a module that is being imported, the innermost last
            importing = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        trace = trace.tb_next
    if importing not in _EXTRAS:
        return None
    from mmd_export.commands.doctor import repair

    why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return f"{importing} is installed but does not import: {why}; {repair(importing, why)}"


def usage_line(error: Exception, arguments: Sequence[str]) -> str | None:
    """``No such option: --chekpoint (Possible options: --checkpoint); see mmd-export bench --help``.

    None for what is no usage error, "" for the help that a command line without a command gets. The errors are known
    by what they have: they are click's, which newer releases of typer hold a copy of under a private name.
    """
    told = getattr(error, "format_message", None)
    if told is None:
        return None
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is shown by then
        return ""
    message = " ".join(str(told()).split())
    command = _command(getattr(error, "ctx", None), arguments)
    return f"{_with_value(message, error.__cause__).rstrip('.?')}; see {command} --help"


def _with_value(message: str, cause: BaseException | None) -> str:
    """The message with the value that it is about, which pydantic's does not repeat."""
    problems = getattr(cause, "errors", None)
    if problems is None:
        return message
    value = repr(problems()[0]["input"])
    return message if value in message else message.replace("Invalid value", f"Invalid value {value}", 1)


def _command(context: Any, arguments: Sequence[str]) -> str:
    """``mmd-export bench``, however the program was started; an option without its value comes without a context."""
    if context is None:
        return " ".join(["mmd-export", *arguments[:1]])
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(["mmd-export", *names])
