"""Kit ``ray`` under four times its capacity, a painter killed in the middle -> benchmarks/results/ray_kit.json.

Starts the project of a digits bundle (5 steps, 1 to 8 images a run) on this machine with two painters, measures how
many requests a second it answers when 32 clients wait for each answer, then sends 10,000 requests at four times that
rate, whether answers come or not. A 503 is back-pressure: the request is sent again after a growing wait, as
``client.py`` does. Half way, one painter is killed. Every request must end with the image of its seed as the bundle
gives it directly.

    python -m benchmarks.ray_kit [--requests 10000] [--keep FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, write_result
from benchmarks.ray_service import Started, make_project, started
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_runtime.app import open_bundle

STEPS, BATCH, TIMES_CAPACITY, CLIENTS = 5, "1..8", 4, 32
ARGS = {"replicas": 2, "cpus": 0.5, "max_ongoing_requests": 32, "max_queued_requests": 64}
FIRST_WAIT, LONGEST_WAIT = 0.1, 8.0  # seconds between tries
PATIENCE = 1800.0  # seconds of asking again, after which a request counts as lost
# On a machine with other work Ray takes processes for dead that only got no time; what is tested here is one that is.
PATIENT_RAY = {"RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120", "RAY_health_check_timeout_ms": "120000"}


@dataclass
class Tally:
    """What became of the requests. ``statuses``: of every try, 0 where there was no answer at all."""

    direct: NDArray[np.float32]
    tolerance: float
    statuses: Counter[int] = field(default_factory=Counter)
    right: int = 0
    wrong: int = 0
    lost: int = 0
    same_bits: int = 0
    largest_difference: float = 0.0
    most_tries: int = 0

    @property
    def ended(self) -> int:
        """Requests that are over, one way or another."""
        return self.right + self.wrong + self.lost

    def take(self, seed: int, body: bytes, tries: int) -> None:
        """Compare an answer with the direct one."""
        found = np.frombuffer(body, "<f4").reshape(self.direct[seed].shape)
        difference = float(np.abs(found - self.direct[seed]).max())
        self.same_bits += bool((found == self.direct[seed]).all())
        self.largest_difference = max(self.largest_difference, difference)
        self.most_tries = max(self.most_tries, tries)
        if difference <= self.tolerance:
            self.right += 1
        else:
            self.wrong += 1


@asynccontextmanager
async def connections() -> AsyncIterator[aiohttp.ClientSession]:
    """As many as there are requests, which no answer keeps open."""
    connector = aiohttp.TCPConnector(limit=512)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def one(session: aiohttp.ClientSession, url: str, seed: int, tally: Tally) -> None:
    """A request, sent again until it is answered or its patience is at an end."""
    wait, end, tries = FIRST_WAIT, time.monotonic() + PATIENCE, 0
    while time.monotonic() < end:
        tries += 1
        try:
            async with session.get(f"{url}/images?seed={seed}&format=raw") as answer:
                body, status = await answer.read(), answer.status
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            body, status = b"", 0
        tally.statuses[status] += 1
        if status == 200:
            tally.take(seed, body, tries)
            return
        await asyncio.sleep(random.uniform(0.5, 1.0) * wait)
        wait = min(2 * wait, LONGEST_WAIT)
    tally.lost += 1


async def capacity(url: str, tally: Tally, requests: int) -> float:
    """Requests a second with ``CLIENTS`` clients, each of which waits for its answer."""
    seeds = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for seed in seeds:
            await one(session, url, seed, tally)

    async with connections() as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))  # the first requests are slow
        seeds = iter(range(requests))
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return requests / (time.perf_counter() - start)


async def overload(service: Started, tally: Tally, rate: float) -> dict[str, Any]:
    """All requests at ``rate`` a second, and a painter killed when half of them are over."""
    requests, start, killed = len(tally.direct), time.perf_counter(), dict[str, Any]()

    async def kill() -> None:
        while tally.ended < requests // 2:
            await asyncio.sleep(0.01)
        painters = service.painters()
        os.kill(painters[0], signal.SIGKILL)
        killed.update(painters=len(painters), after_answers=tally.ended)

    async with connections() as session:
        tasks = [asyncio.create_task(kill())]
        for seed in range(requests):
            await asyncio.sleep(max(0.0, start + seed / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session, service.url, seed, tally)))
        sent = time.perf_counter() - start
        await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    return {"sent_per_second": round(requests / sent, 1), "seconds": round(seconds, 1), "killed": killed}


def distinct(images: NDArray[np.float32], tolerance: float) -> int:
    """How many images are told apart at ``tolerance``: as many as there are, or a mixed-up answer could hide."""
    return len(np.unique(np.rint(images.reshape(len(images), -1) / (4 * tolerance)), axis=0))


def measure(requests: int, keep: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = (keep or Path(place)) / "digits"
        if not folder.exists():
            build(BuildOptions("digits", "onnx", folder, steps=STEPS, batch=BATCH, verify=False))
        bundle = Bundle.open(folder)
        sampler = open_bundle(bundle.folder, threads=1)
        direct = np.concatenate([sampler.sample(seed) for seed in range(requests)])
        tolerance = bundle.manifest.tolerance.atol
        tally = Tally(direct, tolerance)
        project = make_project(bundle.folder, Path(place) / "ray", ARGS)
        with started(project, 2, PATIENT_RAY) as service:
            rate = asyncio.run(capacity(service.url, Tally(direct, tolerance), max(CLIENTS, requests // 20)))
            print(f"capacity {rate:.1f} requests a second", flush=True)
            facts = asyncio.run(overload(service, tally, TIMES_CAPACITY * rate))
    return {
        "model": "digits", "steps": STEPS, "batch": BATCH, "settings": ARGS, "requests": requests,
        "capacity_per_second": round(rate, 1), "times_capacity": TIMES_CAPACITY, **facts,
        "right": tally.right, "wrong": tally.wrong, "lost": tally.lost, "same_bits": tally.same_bits,
        "distinct_images": distinct(direct, tolerance), "largest_difference": tally.largest_difference,
        "tolerance": tolerance, "most_tries": tally.most_tries,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="folder for the bundle that is built, used again if it is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "ray_kit.json")
    options = parser.parse_args()
    result = measure(options.requests, options.keep)
    print({name: value for name, value in result.items() if name != "settings"})
    if result["right"] != options.requests:
        sys.exit("an answer was lost or wrong; nothing was written")
    write_result(options.out, "benchmarks/ray_kit.py", result)


if __name__ == "__main__":
    main()
