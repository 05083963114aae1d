"""The lowest versions that ``pyproject.toml`` allows, as constraints for pip: ``make floors`` tests with them.

The bound ``>=2.0`` of a package becomes ``==2.0``. Packages that are not named there are the newest that fit.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("tune", "finetune", "onnx", "openvino", "coreml", "report")  # targets that many install together


def floors(extras: Iterable[str] = EXTRAS) -> list[str]:
    """``name==version`` of the dependencies and of those of ``extras``, sorted, without this project's own extras.

    Raises ValueError for a range without a lower bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    wanted = (Requirement(line) for line in lines)
    return sorted({_pinned(each) for each in wanted if each.name != project["name"]})


def _pinned(requirement: Requirement) -> str:
    bounds = [each.version for each in requirement.specifier if each.operator == ">="]
    if not bounds:
        raise ValueError(f"{requirement} in pyproject.toml has no lower bound, >=")
    return f"{requirement.name}=={bounds[0]}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors()) + "\n")
