"""Ask a service of ``app.py`` for images, with nothing but the standard library.

``fetch`` asks again while the service says 503 and while no connection comes about: an answer depends on the request
alone, so asking twice is harmless.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds; doubled each time, and spread so that clients do not come back at once


def fetch(url: str, timeout: float = 60.0, patience: float = 60.0) -> bytes:
    """The body of an answer; HTTPError for a status that asking again cannot change, or after ``patience`` seconds."""
    give_up, wait = time.monotonic() + patience, FIRST_WAIT
    while True:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > give_up:
                raise
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
            if time.monotonic() > give_up:
                raise
        time.sleep(random.uniform(0.5, 1.0) * wait)
        wait = min(2 * wait, LONGEST_WAIT)


def line_of(error: Exception) -> str:
    """What the service said about a request that it refused, or what went wrong on the way."""
    if isinstance(error, urllib.error.HTTPError):
        body = error.read()
        try:
            return f"status {error.code}: {json.loads(body)['detail']}"
        except (ValueError, KeyError, TypeError):
            return f"status {error.code}"
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a request that was refused, 3 no service or a busy one, 4 self-test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is the same everywhere")
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--class-label", type=int, help="what a model with classes is to draw")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to go on asking a busy service")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="a .png or .npz file to write")
    parser.add_argument("--self-test", action="store_true", help="let the service run its golden noise")
    options = parser.parse_args(arguments)
    wanted = {"seed": options.seed, "count": options.count, "format": options.out.suffix.lstrip(".") or "png"}
    wanted |= {} if options.class_label is None else {"class_label": options.class_label}
    path = "/self-test" if options.self_test else f"/images?{urllib.parse.urlencode(wanted)}"
    try:
        body = fetch(options.url + path, patience=options.patience)
    except (OSError, http.client.HTTPException) as error:
        status = getattr(error, "code", 0)
        print(f"error: {options.url}: {line_of(error)}", file=sys.stderr)
        return 4 if options.self_test and status == 500 else 2 if 400 <= status < 500 else 3
    if options.self_test:
        print(json.loads(body)["detail"])
        return 0
    options.out.write_bytes(body)
    print(f"{options.out}: {options.count} images of seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
