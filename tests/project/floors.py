"""The lowest versions that ``pyproject.toml`` allows, as constraints for pip: ``make floors`` tests with them.

The bound ``>=2.0`` of a package becomes ``==2.0``. Packages that are not named there are the newest that fit.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement

from tests.project.checks import ROOT

EXTRAS = ("tune", "finetune", "onnx", "openvino", "coreml", "report")  # targets that many install together
_NAME = "mmd-export"


def floors(extras: Iterable[str] = EXTRAS) -> list[str]:
    """``name==version`` of the dependencies and of those of ``extras``, sorted, without this project's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return sorted({pinned for line in lines if (pinned := _pinned(Requirement(line)))})


def _pinned(requirement: Requirement) -> str | None:
    bounds = [each.version for each in requirement.specifier if each.operator == ">="]
    return None if requirement.name == _NAME else f"{requirement.name}=={bounds[0]}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors()) + "\n")
