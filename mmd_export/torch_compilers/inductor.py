"""AOTInductor: a program of torch.export to one shared library, packed with its metadata as a ``.pt2`` archive.

The archive holds what loading needs and nothing of the building machine: torch's own packer adds the generated sources
and their compiler command lines, and its C++ macros leave the path of torch's headers in the library.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mmd_export.errors import NotAvailableError

STEM = "sampler"
ROOT = "model"
FOLDER = f"{ROOT}/data/aotinductor/model"
_MARCH = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
_DATE = (1980, 1, 1, 0, 0, 0)  # what zip calls its first day


def compiler() -> str | None:
    """The C++ compiler that Inductor would call, if it is there."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def compile_package(exported: ExportedProgram, path: Path, device: str) -> None:
    """Compile ``exported`` and write the archive to ``path``; raises NotAvailableError if Inductor cannot."""
    from torch._inductor import aot_compile
    from torch._inductor.exc import InductorError

    arguments, keywords = exported.example_inputs
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a library of more than 2 GB carries a random number
        folder = Path(scratch) / STEM
        folder.mkdir()
        try:
            aot_compile(exported.module(check_guards=False), arguments, keywords, options=settings(folder, device))
        except InductorError as error:
            raise NotAvailableError(f"target torch: {_first_line(error)}") from error
        write_archive(folder, path)
