"""Kit ``swift``, which no machine here compiles: what its sources and texts must share with the package."""

from __future__ import annotations

import re

from mmd_export.coreml.convert import DEFAULT_SYSTEM, SYSTEMS
from mmd_export.kits import get_kit
from mmd_export.tolerance import mean_tolerance
from mmd_runtime.coreml import _MACOS_OF
from tests.project.checks import ROOT

KIT = ROOT / "runtimes/swift"
SAMPLER = (KIT / "Sources/MMDBundle/Sampler.swift").read_text(encoding="utf-8")


def test_every_deployment_target_is_held_to_its_system() -> None:
    """The same years of iOS and macOS as in Python, and every system that ``build`` knows."""
    years = {f"iOS{ios}": int(macos) for ios, macos in re.findall(r"\(iOS: (\d+), macOS: (\d+)\)", SAMPLER)}
    assert years == _MACOS_OF
    assert set(SYSTEMS) == {*years, *(f"macOS{macos}" for macos in years.values())}
    assert "try Self.requireSystem(manifest)" in SAMPLER


def test_the_limit_of_the_mean_error_is_that_of_the_package() -> None:
    assert re.findall(r"meanLimit: atol / (\d+)", SAMPLER) == [f"{1 / mean_tolerance(1.0):.0f}"]


def test_the_package_and_its_texts_name_the_systems() -> None:
    default, oldest = DEFAULT_SYSTEM.removeprefix("iOS"), min(_MACOS_OF, key=lambda system: _MACOS_OF[system])
    named = f"iOS {default} and macOS {_MACOS_OF[DEFAULT_SYSTEM]}"
    readme = " ".join((KIT / "README.md").read_text(encoding="utf-8").split())
    assert f"{named} by default" in readme
    assert f"by default for {named} on" in get_kit("swift").summary
    package = (KIT / "Package.swift").read_text(encoding="utf-8")
    assert f"[.iOS(.v{oldest.removeprefix('iOS')}), .macOS(.v{_MACOS_OF[oldest]})]" in package
