"""The lower bounds that ``make floors`` tests with."""

from __future__ import annotations

import re
import tomllib

from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.project.floors import ROOT, floors

PIN = re.compile(r"^(\S+)==(\S+)$", re.MULTILINE)


def test_each_package_has_one_and_the_pinned_version_is_not_below() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = floors(set(project["optional-dependencies"]) - {"dev"})
    lowest = {canonicalize_name(name): Version(bound) for name, bound in PIN.findall("\n".join(lines))}
    assert {"numpy", "torch", "onnxruntime-gpu", "transformers", "ray"} <= set(lowest)
    assert len(lowest) == len(lines)
    assert lowest[canonicalize_name("onnxruntime-gpu")] == lowest[canonicalize_name("onnxruntime")]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {canonicalize_name(name): Version(version) for name, version in PIN.findall(constraints)}
    assert {name for name, bound in lowest.items() if pinned.get(name, bound) < bound} == set()
