"""Runs the code of one page as a reader would: block after block, in an empty folder, with the tool of this tree."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.code_blocks import Block
from mmd_export.cli import app, run
from tests.project.checks import PACKAGES, ROOT

Supply = Callable[[Path], None]

# What the commands of the pages get besides what the page says, so that a page takes seconds; what it says wins.
QUICK: Mapping[str, Mapping[str, str]] = {
    "finetune": {"--config": "{quick}"},
    "bench": {"--rounds": "6", "--cold": "0"},
    "evaluate": {"--count": "64", "--bootstrap": "40"},
    "report": {"--seconds": "1"},
}
QUICK_TUNING = "iterations = 2\nbatch_size = 64\nevaluate_every = 2\nevaluate_count = 64\n"
GATES = ("--max-regression", "--gate")  # a gate makes its own rounds
SECONDS_OF_A_GATE = "2"
SAMPLES_OF_RUNG_7 = "200"
SERVER = {"npm run dev": re.compile(r"http://localhost:\d+/")}
SERVER_SECONDS = 60
NUMBER = re.compile(r"(?<![A-Za-z_])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@dataclass
class PageRun:
    """The folder of a page, and where in it the last shell block ended."""

    folder: Path
    supplies: Mapping[str, Supply]
    here: Path = field(init=False)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def __post_init__(self) -> None:
        self.here = self.folder

    def run(self, block: Block) -> None:
        """Run it; AssertionError says where and what went wrong."""
        for name in filter(None, re.split(r",\s*", block.notes.get("starts with", ""))):
            assert name in self.supplies, f"{block.place}: {name!r} is not among {sorted(self.supplies)}"
            if not (self.folder / name).exists():
                self.supplies[name](self.folder / name)
        getattr(self, f"_{block.language}")(block)

    def _python(self, block: Block) -> None:
        with contextlib.chdir(self.here), contextlib.redirect_stdout(io.StringIO()):
            code = compile("\n" * block.line + block.code, str(ROOT / block.page), "exec")
            exec(code, self.names)

    def _bash(self, block: Block) -> None:
        self.here = self.folder
        for command in joined(block.code.splitlines()):
            self._command(command, block)

    def _console(self, block: Block) -> None:
        self.here = self.folder
        for command, expected in conversations(block.code):
            said = self._command(command, block)
            problem = "" if block.recorded else differs(expected, said, exact="exact numbers" in block.notes)
            assert not problem, f"{block.place}: $ {command}\n{problem}\n--- it said:\n{said}"

    def _cpp(self, block: Block) -> None:
        """In the place of the project's own program, which an earlier block built."""
        source = f'#include "mmd_bundle.h"\nint main() {{\n{block.code}\nreturn images.shape.empty();\n}}\n'
        (self.here / "main.cpp").write_text(source)
        self._process(["cmake", "--build", "build", "--config", "Release"], block)
        self._process(["build/mmd_sample"], block)

    def _js(self, block: Block) -> None:
        (self.here / "snippet.mjs").write_text(block.code)
        self._process(["node", "snippet.mjs"], block)

    def _command(self, command: str, block: Block) -> str:
        """What one command says: stdout, then stderr."""
        words = shlex.split(command, comments=True)
        if not words:
            return ""
        if words[0] == "cd" and len(words) == 2:
            self.here = self.here / words[1]
            assert self.here.is_dir(), f"{block.place}: {command}: no such folder"
            return ""
        if command in SERVER:
            return self._serve(command, block)
        if words[0] == "mmd-export" and not re.search(r"[|&;<>$`]", command):
            return self._mmd_export(quick(words[1:], self.folder), command, block)
        if words[:2] == ["pip", "install"]:
            return self._process([sys.executable, "-m", *words[:2], *DRY, *words[2:]], block)
        return self._process(["bash", "-euo", "pipefail", "-c", command], block)

    def _mmd_export(self, arguments: list[str], command: str, block: Block) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(app, arguments)
        said = out.getvalue() + "\n" + err.getvalue()
        right = [int(code) for code in block.notes.get("exits", "0").split(",")]
        assert code in right, f"{block.place}: $ {command}: exit {code}, not {right}\n{said}"
        return said

    def _process(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command, cwd=self.here, env=environment(self.folder), capture_output=True, text=True, check=False
        )
        said = done.stdout + "\n" + done.stderr
        assert done.returncode == 0, f"{block.place}: {' '.join(command)}: exit {done.returncode}\n{said}"
        return said

    def _serve(self, command: str, block: Block) -> str:
        """Start it, read the page that it names, stop it."""
        with subprocess.Popen(
            shlex.split(command), cwd=self.here, env=environment(self.folder), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        ) as server:  # fmt: skip
            try:
                assert server.stdout is not None
                said = ""
                for line in server.stdout:
                    said += line
                    if found := SERVER[command].search(re.sub(r"\x1b\[[0-9;]*m", "", line)):
                        with urllib.request.urlopen(found[0], timeout=SERVER_SECONDS) as page:
                            assert page.status == 200
                            return said
                raise AssertionError(f"{block.place}: {command} named no address\n{said}")
            finally:
                os.killpg(server.pid, 15)


# pip says without a network whether what a line installs is there.
DRY = ("--dry-run", "--no-index", "--disable-pip-version-check", "--quiet")


def environment(folder: Path) -> dict[str, str]:
    """As after ``. .venv/bin/activate``, with the commands of this tree first."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    for name, module in (("mmd-export", "-m mmd_export.cli"), ("python", "")):
        if not (tools / name).exists():
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            (tools / name).chmod(0o755)
    folders = [ROOT, *((ROOT / package).parent for package in PACKAGES)]
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(str, folders)))}


def quick(arguments: list[str], folder: Path) -> list[str]:
    """The arguments of a command with what makes it quick, where the page does not say otherwise."""
    name, *rest = arguments or [""]
    gate = name == "bench" and any(option in rest for option in GATES)
    added = {"--seconds": SECONDS_OF_A_GATE, "--cold": "0"} if gate else QUICK.get(name, {})
    if name == "verify" and "--distribution" in rest:
        added = {"--count": SAMPLES_OF_RUNG_7}
    settings = folder / ".quick.toml"
    settings.write_text(QUICK_TUNING)
    more = [(option, value.format(quick=settings)) for option, value in added.items() if option not in rest]
    return [*arguments, *(word for pair in more for word in pair)]


def joined(lines: list[str]) -> Iterator[str]:
    """Commands of a script: a line that ends in a backslash goes on."""
    command = ""
    for line in lines:
        command += line.removesuffix("\\")
        if not line.endswith("\\"):
            if command.strip():
                yield command.strip()
            command = ""
    assert not command.strip(), f"{command!r} goes on after the end"


def conversations(text: str) -> list[tuple[str, str]]:
    """``$ command`` and the lines below it."""
    found: list[tuple[str, list[str]]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            found.append((command, []))
        else:
            assert found, f"a console block begins with a command, not with {line!r}"
            found[-1][1].append(line)
    return [(command, "\n".join(said)) for command, said in found]


def differs(expected: str, said: str, *, exact: bool) -> str:
    """Why ``said`` is not as expected, or nothing.

    Spaces and empty lines do not count, ``...`` stands for any lines, and more may follow. Numbers are any numbers, or
    with ``exact`` the same within a thousandth.
    """
    wanted, lines = shortened(expected), iter(shortened(said))
    anywhere = False
    for want in wanted:
        if want == "...":
            anywhere = True
            continue
        for line in lines:
            if same(want, line, exact=exact):
                break
            if not anywhere:
                return f"expected {want!r}, found {line!r}"
        else:
            return f"expected {want!r}, which did not come"
        anywhere = False
    return ""


def shortened(text: str) -> list[str]:
    """Lines without colours, double spaces and empty ones; a drawn rule has one length."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = (re.sub(r"[─-]{3,}", "---", " ".join(line.split())) for line in plain.splitlines())
    return [line for line in lines if line]


def same(want: str, line: str, *, exact: bool) -> bool:
    """Whether the words agree, and with ``exact`` the numbers."""
    if NUMBER.sub("#", want) != NUMBER.sub("#", line):
        return False
    pairs = zip(NUMBER.findall(want), NUMBER.findall(line), strict=True)
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return not exact or all(abs(a - b) <= 1e-3 * abs(a) + 1e-4 for a, b in values)


def copied(source: Path) -> Supply:
    """A supply that is a copy of a file or a folder."""

    def supply(place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)

    return supply
