"""The C++ compiler that Inductor calls. No torch here: whether it is there is asked before anything is loaded."""

from __future__ import annotations

import os
import shutil
import sys


def find_compiler() -> str | None:
    """Its path, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
