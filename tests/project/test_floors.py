"""The lower bounds that ``make floors`` tests with."""

from __future__ import annotations

import re

from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.project.checks import ROOT
from tests.project.floors import floors

PIN = re.compile(r"^(\S+)==(\S+)$", re.MULTILINE)


def test_each_package_has_one_and_the_pinned_version_is_not_below() -> None:
    lowest = {canonicalize_name(name): Version(bound) for name, bound in PIN.findall("\n".join(floors()))}
    assert {"numpy", "torch", "onnxruntime", "transformers"} <= set(lowest)
    assert len(lowest) == len(floors())
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {canonicalize_name(name): Version(version) for name, version in PIN.findall(constraints)}
    assert {name for name, bound in lowest.items() if pinned[name] < bound} == set()
