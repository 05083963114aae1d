"""What mkdocs does beyond the files of this folder: pages of the repository that lie elsewhere, and links to them.

Links are written so that they work where the files lie; on the site those pages stand beside all others.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page of the site -> the file that it is.
ELSEWHERE = {"contract.md": "runtimes/README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
ICON = ROOT / "runtimes/web/public/icon.svg"
_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of ``ELSEWHERE`` and the icon of the web kit, as if they lay in docs/."""
    for page, file in ELSEWHERE.items():
        files.append(File.generated(config, page, content=moved((ROOT / file).read_text(encoding="utf-8"), file)))
    files.append(File.generated(config, "images/icon.svg", abs_src_path=str(ICON)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ to a page of ``ELSEWHERE`` become links to that page."""
    del page, config, files
    return relinked(markdown, ROOT / "docs")


def moved(text: str, file: str) -> str:
    """The text of a file of the repository with links as from docs/."""
    return relinked(text, (ROOT / file).parent)


def relinked(text: str, folder: Path) -> str:
    """``text`` of a file in ``folder`` with every relative link to a page of the site written as from docs/."""
    pages = {(ROOT / file).resolve(): page for page, file in ELSEWHERE.items()}

    def place(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        path = (folder / target).resolve()
        if path in pages:
            return match[1] + pages[path]
        inside = path.is_relative_to(ROOT / "docs")
        return match[1] + (path.relative_to(ROOT / "docs").as_posix() if inside else target)

    return _LINK.sub(place, text)
