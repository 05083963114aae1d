"""What the recipes of the Makefile find in their environment."""

from __future__ import annotations

import os
import subprocess

from tests.project.checks import ROOT

PROBE = "include Makefile\nprobe:\n\t@printenv PYTHONDONTWRITEBYTECODE || echo unset\n"


def test_python_keeps_its_bytecode_whatever_the_environment_says() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--no-print-directory", "-f", "-", "probe"]
    done = subprocess.run(command, input=PROBE, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "unset\n"), done.stderr
