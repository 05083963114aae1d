"""Projects of the kits in TypeScript: made, installed, built and run as a user would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mmd_export.commands.embed import EmbedOptions, embed
from tests.contract.required import skip

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
OLDEST_NODE = (20, 19)


def require_node(kit: str) -> None:
    """Skip, or fail where the kit is required, without npm and a Node that is new enough."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        skip("kit", kit, "node or npm missing; install Node 20.19 or newer")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_NODE:
        skip("kit", kit, f"node is {version.strip()}; install 20.19 or newer")


def require_chromium(kit: str) -> str:
    """The path of a Chromium; skip, or fail where the kit is required, without one."""
    places = [os.environ.get("CHROMIUM"), *(shutil.which(name) for name in CHROMIUM)]
    found = next((place for place in places if place and Path(place).is_file()), None)
    if found is None:
        skip("kit", kit, "no Chromium; install one, or set CHROMIUM to its path")
    return found


def npm(project: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What an npm command says; AssertionError with all of it if it fails."""
    command = ["npm", *arguments]
    done = subprocess.run(
        command, cwd=project, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built_project(kit: str, bundle: Path, out: Path) -> Path:
    """The project of ``bundle``, installed from its lock file and built."""
    embed(EmbedOptions(bundle, kit, out))
    npm(out, "ci", "--no-audit", "--no-fund", "--prefer-offline")
    npm(out, "run", "build")
    return out


def summary(output: str) -> dict[str, int]:
    """The counts at the end of what ``node --test`` says."""
    return {name: int(count) for name, count in re.findall(r"^\W (pass|fail|cancelled|skipped) (\d+)$", output, re.M)}
