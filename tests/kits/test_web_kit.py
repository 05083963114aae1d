"""Kit ``web``: its own tests in a browser, its lock files, and what it weighs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kits.npm import built_project, npm, require_chromium, require_node, summary
from tests.project.checks import ROOT

LARGEST_PAGE = 150_000  # bytes of everything but ONNX Runtime and the bundle


@pytest.fixture(scope="module")
def project(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_node("web")
    require_chromium("web")
    return built_project("web", digits_onnx, tmp_path_factory.mktemp("projects") / "web")


def test_its_own_tests_pass_in_a_browser(project: Path, attacks: Path) -> None:
    environment = {"MMD_ATTACKS": str(attacks), "CHROMIUM": require_chromium("web")}
    counts = summary(npm(project, "test", environment=environment))
    assert counts["pass"] > 50, "the damaged bundles were not tried"
    assert counts["fail"] == counts["skipped"] == counts["cancelled"] == 0


def test_the_page_is_light(project: Path) -> None:
    dist = project / "dist"
    files = {path.relative_to(dist).as_posix(): path.stat().st_size for path in dist.rglob("*") if path.is_file()}
    own = {name: size for name, size in files.items() if not re.match(r"bundle/|assets/ort[.-]", name)}
    assert sum(own.values()) <= LARGEST_PAGE, own
    assert {Path(name).suffix for name in own} == {".css", ".html", ".js", ".svg"}


@pytest.mark.parametrize("kit", ["node", "web"])
def test_the_lock_file_names_no_registry(kit: str) -> None:
    """Packages come from the registry in use, and are checked against their hashes."""
    text = (ROOT / "runtimes" / kit / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in text
    packages = text.count('"node_modules/')
    assert packages > 10
    assert text.count('"integrity": "sha512-') == packages
