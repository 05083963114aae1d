"""The site: built strictly, complete, and whole without a network, its search too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import site_hooks
from tests.project.checks import ROOT
from tests.report.browser import look

FETCHED = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {Path(page).stem for page in site_hooks.ELSEWHERE}
    assert names | {"404"} == {path.stem for path in site.glob("*.html")}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert FETCHED.search('<script src="https://unpkg.com/x"></script>')
    found = {path.name: FETCHED.findall(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    assert {name: links for name, links in found.items() if links} == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\(\"?https?://|@import", styles)


@pytest.mark.parametrize(
    ("page", "words"),
    [("api", "UnrolledSampler"), ("commands", "--max-regression"), ("bundle", "peak_activation_bytes")],
)
def test_the_reference_comes_from_the_code(page: str, words: str, site: Path) -> None:
    assert words in (site / f"{page}.html").read_text(encoding="utf-8")


def test_the_search_works_from_the_folder(site: Path, tmp_path: Path) -> None:
    options = ("--virtual-time-budget=20000", "--dump-dom")
    found = look(site / "index.html", tmp_path, *options, query="?q=tolerance")
    assert re.search(r"[1-9]\d* matching documents", found), "the search found nothing"


def test_links_out_of_the_folder_lead_to_pages_of_the_site() -> None:
    text = "[a](../runtimes/README.md) [b](ci.md#github) [c](https://x.org/../runtimes/README.md)"
    assert site_hooks.relinked(text, ROOT / "docs") == text.replace("(../runtimes/README.md", "(contract.md", 1)
    assert site_hooks.moved("[d](../docs/noise.md)", "runtimes/README.md") == "[d](noise.md)"
