"""A project of kit ``ray``, embedded and started: for its tests and for the load test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
        """Those of the service that run, with their titles."""
        return processes_of(self.mark)

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
    port, metrics = free_port(), free_port()
    command = [sys.executable, "app.py", "--port", port, "--metrics-port", metrics, "--num-cpus", cpus]
    with marked(command, project, environment) as (process, mark):
        service = Started(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", process, mark)
        assert process.stdout is not None
        if not (line := process.stdout.readline()).startswith(f"{service.url}/images"):
            raise RuntimeError(f"the service did not start: {line}")
        yield service


@contextmanager
def cluster(folder: Path, cpus: int, environment: Mapping[str, str]) -> Iterator[str]:
    """A cluster of Ray of one node, started in ``folder``: the address that ``serve deploy`` takes; gone afterwards."""
    dashboard = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port(),
             "ray-client-server-port": free_port(), "num-cpus": cpus}  # fmt: skip
    # Sockets have short names: not the folder of a test.
    with (
        TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
        marked(
            [*command, f"--temp-dir={temporary}", *(f"--{name}={value}" for name, value in ports.items())],
            folder,
            environment,
            signal.SIGKILL,  # asked otherwise, it waits 30 s for its node to drain
        ) as (process, _),
    ):
        assert process.stdout is not None
        if not any("Ray runtime started" in line for line in process.stdout):
            raise RuntimeError("the cluster did not start")
        yield f"http://127.0.0.1:{dashboard}"


@contextmanager
def marked(
    command: Sequence[object], folder: Path, environment: Mapping[str, str], end: signal.Signals = signal.SIGTERM
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the mark in the environment of all that it starts; all are gone afterwards, asked by ``end``."""
    mark = f"mmd-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, **environment, "MMD_SERVICE_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, mark
    finally:
        process.send_signal(end)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        for number in processes_of(mark):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def processes_of(mark: str) -> dict[int, str]:
    """Every process whose environment has the mark, with its title."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
    return found


def free_port() -> int:
    """One of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
