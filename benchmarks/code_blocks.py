"""The code in the pages: every fenced block, what stands before it, and whether a test runs it.

A block of ``console``, ``bash`` or ``python`` runs. Any other, and one that cannot run, says why in a comment in front:

    <!-- not run: REASON -->            <!-- run by: tests/FILE.py::TEST -->

Further comments for a block that runs: ``starts with: NAMES`` puts things into the page's folder (tests/docs has the
list), ``exits: CODES`` names the exit codes that are right, ``exact numbers`` compares the numbers of the output too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.precision_tables import Table

ROOT = Path(__file__).parents[1]
RUNS = ("console", "bash", "python")
RUNS_IN_A_PROJECT = ("cpp", "js")  # in the project of a kit that an earlier block of the page made
NO_CODE = ("text",)
NOTES = ("not run", "run by", "starts with", "exits", "exact numbers")
_FENCE = re.compile(r"^( *)```(\S*)\s*$")
_NOTE = re.compile(r"^ *<!-- ([a-z ]+?)(?:: (.*))? -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` of its fence, counted from 1, and the comments in front of it.

    ``recorded``: it stands in a generated table, so its commands run, but the output is that of a run on record.
    """

    page: str
    line: int
    language: str
    code: str
    notes: Mapping[str, str]
    recorded: bool = (
        False  # stands in a generated table: the commands run, their output is of the run that was recorded
    )

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def is_code(self) -> bool:
        """Whether it is something that could run."""
        return self.language not in NO_CODE

    @property
    def runs(self) -> bool:
        """Whether the tests of the pages run it."""
        elsewhere = "not run" in self.notes or "run by" in self.notes
        return self.language in (*RUNS, *RUNS_IN_A_PROJECT) and not elsewhere


def pages() -> list[str]:
    """Every page with code for readers, relative to the repository."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "runtimes/README.md", *docs]


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page in order."""
    return list(_parse(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def _parse(page: str, lines: list[str]) -> Iterator[Block]:
    notes: dict[str, str] = {}
    table = False
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if opening := _FENCE.match(line):
            indent, language = opening.groups()
            code: list[str] = []
            for _, inner in numbered:
                if inner.strip() == "```":
                    break
                code.append(inner.removeprefix(indent))
            yield Block(page, number, language, "\n".join(code), notes, table)
            notes = {}
        elif line.startswith(("<!-- table ", "<!-- end -->")):
            table = line.startswith("<!-- table ")
        elif (note := _NOTE.match(line)) and note[1] in NOTES:
            notes = notes | {note[1]: note[2] or ""}
        elif line.strip():
            notes = {}


def block_rows() -> Table:
    """How much of the code runs in the tests, and why the rest does not."""
    found = [block for page in pages() for block in blocks_of(page) if block.is_code]
    rows: list[tuple[str, ...]] = [
        ("run page by page, in order, in an empty folder", f"{sum(block.runs for block in found)}", ""),
        *_grouped(found, "run by", "run by `{}`"),
        *_grouped(found, "not run", "not run: {}"),
    ]
    return ("code in the pages", "blocks", "pages"), rows


def _grouped(blocks: list[Block], note: str, text: str) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for block in blocks:
        if note in block.notes:
            groups.setdefault(block.notes[note], []).append(f"`{block.page}`")
    return [(text.format(why), f"{len(where)}", ", ".join(dict.fromkeys(where))) for why, where in groups.items()]
