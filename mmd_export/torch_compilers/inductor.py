"""AOTInductor: a program of torch.export to one shared library, in a ``.pt2`` archive that holds nothing else.

Torch's own packer adds the generated sources with their compiler command lines, and the C++ macros of its headers leave
paths in the library. Neither is in this archive: the first is left out, the second overwritten.
"""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mmd_export.environment import cpu_kind
from mmd_export.errors import NotAvailableError, one_line
from mmd_export.folders import scratch_folder
from mmd_export.specialise import quiet_copies
from mmd_export.torch_device import BASE_ISA, PLAIN, cpu_vectors

FOLDER = "model/data/aotinductor/model"
_STEM = "sampler"
_MARCH = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}  # instead of `native`: runs wherever the vector width is there
_DATE = (1980, 1, 1, 0, 0, 0)  # the first day of zip
_BUILD_ID = re.compile(rb"(\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0).{20}", re.DOTALL)


def moved(exported: ExportedProgram, device: str) -> ExportedProgram:
    """The program with its weights and example inputs on ``device``."""
    if device == "cpu":
        return exported
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(exported, device)


def compile_package(exported: ExportedProgram, path: Path) -> dict[str, int]:
    """Compile ``exported`` and write the archive; returns the calls of kernels and operators in one run, by name.

    Raises NotAvailableError for what Inductor cannot compile.
    """
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError

    assert exported.example_inputs is not None
    arguments, keywords = exported.example_inputs
    with scratch_folder() as scratch, torch.random.fork_rng(devices=[]), quiet_copies():
        torch.manual_seed(0)  # a library above 2 GB carries a random number
        folder = scratch / _STEM
        folder.mkdir()
        module = exported.module(check_guards=False)
        try:
            aot_compile(module, arguments, keywords, options=settings(folder))
        except InductorError as error:
            raise NotAvailableError(f"target torch cannot compile it: {one_line(error)}; use --target onnx") from error
        write_archive(folder, path, private_folders(str(scratch)))
        return _calls((folder / f"{_STEM}.wrapper.cpp").read_text(encoding="utf-8"))


def settings(folder: Path) -> dict[str, Any]:
    """Inductor's options: weights once (no freezing), no debug lines, nothing that depends on the thread count."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.model_name_for_generated_files": _STEM,
        "freezing": False,
        "cpp.dynamic_threads": True,
        "comment_origin": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.enable_line_tables": False,
        "aot_inductor.precompile_headers": False,  # read once: precompiling them only adds to a build
        "cpp.march": _march(),
    }
    return {name: value for name, value in options.items() if _has_option(name) and value is not None}


def _has_option(name: str) -> bool:
    return name in torch._inductor.config.get_config_copy()


def _march() -> str | None:
    """For Linux, where torch would take ``native``, of which the manifest cannot tell; None for other machines.

    Behind it Inductor adds one of its own for SVE.
    """
    return _MARCH.get(cpu_vectors()) or BASE_ISA.get(platform.machine())


def private_folders(scratch: str) -> tuple[str, ...]:
    """Where the code that is compiled comes from on this machine, longest first: none of it may be in the archive."""
    torch_home = Path(torch.__file__).parent
    schemes = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sys.prefix, sys.base_prefix)
    places = {scratch, str(torch_home), str(torch_home.parent), str(Path.home()), *schemes}
    return tuple(sorted(places - {"/"}, key=lambda place: (-len(place), place)))


def write_archive(folder: Path, path: Path, private: tuple[str, ...]) -> None:
    """The library, its metadata and what makes a zip a ``.pt2``; ``private`` are paths to be overwritten."""
    entries = {
        "model/archive_format": b"pt2",
        "model/archive_version": b"0",
        "model/.data/version": b"6\n",
        "model/byteorder": sys.byteorder.encode(),
    }
    for file in sorted(folder.iterdir()):
        if file.suffix in (".so", ".cubin", ".json") and "kernel_metadata" not in file.name:
            data = file.read_bytes()
            entries[f"{FOLDER}/{file.name}"] = without_paths(data, private)
    entries[f"{FOLDER}/{_STEM}.wrapper.cpp"] = b""  # the loader derives the name of the metadata from it
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), data)


def without_paths(data: bytes, private: tuple[str, ...]) -> bytes:
    """Each of those folders overwritten by slashes, and the linker's hash, which was made with them in, by zeros.

    Only where text goes on behind it, to the end of a string: weights may hold the bytes of a short folder by chance.
    """
    for folder in private:
        name = folder.encode()
        data = re.sub(re.escape(name) + rb"(?=/[ -~]*[\0\n\"])", b"/" * len(name), data)
    return _BUILD_ID.sub(rb"\g<1>" + bytes(20), data, count=1)


def _calls(wrapper: str) -> dict[str, int]:
    """Calls in the wrapper: generated kernels together, torch's operators by name."""
    found = Counter(re.findall(r"\baoti_torch_(?:cpu|cuda)_(\w+)\(", wrapper))
    found["generated kernel"] = len(re.findall(r"^ +(?:cpp_fused|call_triton)\w*\(", wrapper, re.MULTILINE))
    return dict(sorted(found.items()))


def hardware(device: str) -> dict[str, str]:
    """What the compiled code needs, to be compared before it is loaded."""
    vectors = cpu_vectors()
    facts = {"device": device, "system": platform.system(), "machine": platform.machine(), "vectors": vectors}
    if sys.platform == "linux" and not _has_option("cpp.march"):  # torch before 2.13 compiles for `native` there
        facts["cpu"] = cpu_kind()
    elif vectors in PLAIN:
        facts["vectors"] = BASE_ISA.get(platform.machine(), vectors)
    if device == "cuda":  # beside what calls its kernels
        major, minor = torch.cuda.get_device_capability()
        facts |= {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    return facts
