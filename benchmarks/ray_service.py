"""A project of kit ``ray``, embedded and started: for its tests and for the load test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmd_export.commands.embed import EmbedOptions, embed

STOP_SECONDS = 120
PAINTER = "ray::ServeReplica:images:Painter"  # the title that Ray gives a process


@dataclass(frozen=True)
class Started:
    """A service: its address, that of its metrics, the process, and the mark of all processes that belong to it."""

    url: str
    metrics: str
    process: subprocess.Popen[str]
    mark: str

    def processes(self) -> dict[int, str]:
        """Every process whose environment has the mark, with its title."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        return found

    def painters(self) -> list[int]:
        """The processes that hold the model."""
        return [number for number, title in self.processes().items() if title.startswith(PAINTER)]


def make_project(bundle: Path, out: Path, settings: Mapping[str, Any]) -> Path:
    """Embed the bundle into ``out`` and write ``settings`` into its ``serve.yaml``."""
    embed(EmbedOptions(bundle, "ray", out))
    config = yaml.safe_load((out / "serve.yaml").read_text(encoding="utf-8"))
    config["applications"][0]["args"] |= settings
    (out / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return out


@contextmanager
def started(project: Path, cpus: int, environment: Mapping[str, str]) -> Iterator[Started]:
    """The service of a project on ports that are free; whatever it started is gone afterwards."""
    mark, port, metrics = f"mmd-{uuid.uuid4().hex}", free_port(), free_port()
    command = [sys.executable, "app.py", "--port", port, "--metrics-port", metrics, "--num-cpus", cpus]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=project,
        env={**os.environ, **environment, "MMD_SERVICE_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    service = Started(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", process, mark)
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline()).startswith(f"{service.url}/images"):
            raise RuntimeError(f"the service did not start: {line}")
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        for number in service.processes():
            os.kill(number, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
