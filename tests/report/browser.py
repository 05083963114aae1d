"""Debian's Chromium without a window: what a page says on its console, what it looks like, how wide it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REQUIRED = "MMD_EXPORT_REQUIRE_BROWSER"  # CI sets it: no browser is then a failure, not a skip
NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
)  # fmt: skip
_CONSOLE = re.compile(r"CONSOLE[^\]]*\] (.*)")
DARK, LIGHT = 0, 1


def find_browser() -> str:
    """The program; skips with the reason where there is none, fails where one is required."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        reason = f"none of {', '.join(NAMES)} here; apt-get install chromium"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set: {reason}")
        pytest.skip(reason)
    return program


def look(
    page: Path,
    folder: Path,
    *options: str,
    size: tuple[int, int] = (1280, 900),
    scheme: int = LIGHT,
    query: str = "",
) -> str:
    """Run Chromium on a page in a profile of its own; stdout. Raises AssertionError on anything on the console."""
    profile = folder / "profile"
    command = [
        find_browser(), *_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
        f"--blink-settings=preferredColorScheme={scheme}", *options, page.absolute().as_uri() + query,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    said = _CONSOLE.findall(done.stderr)
    assert not said, f"{page.name}: the console says {said}"
    return done.stdout
