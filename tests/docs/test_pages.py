"""The code in the pages runs, and says what the pages say; what does not run says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.code_blocks import RUNS, RUNS_IN_A_PROJECT, Block, blocks_of, pages
from tests.docs.conftest import Reader
from tests.docs.page_runner import conversations, differs, joined, quick, same
from tests.project.checks import ROOT

OF_KITS = ("docs/embedding.md", "docs/embedding-web.md")  # test_pages_of_kits.py
BLOCKS = [block for page in pages() for block in blocks_of(page)]
RUNNING = [page for page in pages() if page not in OF_KITS and any(block.runs for block in blocks_of(page))]


@pytest.mark.parametrize("page", RUNNING)
def test_the_code_of_a_page_runs(page: str, read: Reader) -> None:
    read(page)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_has_a_language_and_runs_or_says_why_not(block: Block) -> None:
    assert block.language, f"{block.place}: a block without a language; ```text is for what is no code"
    if block.is_code and not block.runs:
        reason = block.notes.get("not run", "") + block.notes.get("run by", "")
        assert reason, f"{block.place}: {block.language} runs only as one of {RUNS + RUNS_IN_A_PROJECT}; say why not"


@pytest.mark.parametrize("block", [block for block in BLOCKS if "run by" in block.notes], ids=lambda block: block.place)
def test_the_test_that_runs_a_block_exists(block: Block) -> None:
    file, _, name = block.notes["run by"].partition("::")
    assert re.search(rf"^def {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_few_blocks_do_not_run() -> None:
    code = [block for block in BLOCKS if block.is_code]
    idle = [block for block in code if "not run" in block.notes]
    assert len(idle) <= len(code) / 4, "\n".join(f"{block.place}: {block.notes['not run']}" for block in idle)


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in target]
    assert [target for target in targets if not (folder / target).exists()] == []


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_a_page_ends_with_the_next_step(page: str) -> None:
    *_, last = (ROOT / page).read_text(encoding="utf-8").strip().split("\n\n")
    assert re.match(r"Next: .*\]\(", last, re.DOTALL), f"{page} ends with {last[:60]!r}"


def test_a_wrong_word_of_the_output_is_found() -> None:
    said = "grid.png: 64 images of seed 7\n\nmmd-export: done"
    assert not differs("grid.png: 16 images of seed 3", said, exact=False)
    assert not differs("...\nmmd-export: done", said, exact=False)
    assert "expected" in differs("grid.png: 64 pictures of seed 7", said, exact=False)
    assert "expected" in differs("grid.png: 64 images of seed 8", said, exact=True)
    assert "did not come" in differs("...\nmmd-export: saved", said, exact=False)
    assert "found 'grid.png" in differs("mmd-export: done", said, exact=False)


def test_numbers_and_rules_in_an_output() -> None:
    assert same("1 800 +25.7554 x", "1 800 +25.7560 x", exact=True)
    assert not same("1 800 +25.7554 x", "1 800 +25.9 x", exact=True)
    assert not differs("a\n─────\nb", "a\n───────────\n\nb", exact=True)


def test_commands_of_a_block() -> None:
    assert list(joined(["one \\", "  two", "", "three"])) == ["one   two", "three"]
    assert conversations("$ one\nsays\n$ two \\\n   more\n") == [("one", "says"), ("two more", "")]
    with pytest.raises(AssertionError, match="begins with a command"):
        conversations("says")
    with pytest.raises(AssertionError, match="goes on"):
        list(joined(["one \\"]))


def test_what_the_page_says_wins_over_what_makes_it_quick(tmp_path: Path) -> None:
    assert quick(["evaluate", "b", "--count", "8"], tmp_path) == ["evaluate", "b", "--count", "8", "--bootstrap", "40"]
