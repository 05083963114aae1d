"""The tables of docs/embedding-web.md and docs/serving.md, from results/web.json and ray_kit.json."""

from __future__ import annotations

from typing import Any

from benchmarks.precision_tables import Table

HEADS = ("", "measured", "at most")


def web_rows(result: dict[str, Any]) -> Table:
    """First image, weight of the page, time of a batch."""
    web, limits = result["web"], result["limits"]
    first, size = web["first_image_ms"], web["bytes"]
    return HEADS, [
        (
            f"first image after the page is asked for, median of {web['loads']} loads (the slowest)",
            f"{first['median']:.0f} ms ({first['most']:.0f} ms)",
            f"{limits['first_image_ms']} ms",
        ),
        ("the page itself, uncompressed", f"{size['page'] / 1000:.0f} kB", f"{limits['page_bytes'] / 1000:.0f} kB"),
        ("the bundle", f"{size['bundle'] / 1e6:.2f} MB", ""),
        ("ONNX Runtime, uncompressed", f"{size['runtime'] / 1e6:.1f} MB", ""),
        (f"an image, WebAssembly in Chromium, {_threads(web)}", f"{web['batch_ms']['median']:.1f} ms", ""),
        (f"an image, Node, {_threads(result['node'])}", f"{result['node']['batch_ms']:.1f} ms", ""),
        (f"an image, Python, {_threads(result['python'])}", f"{result['python']['batch_ms']:.1f} ms", ""),
        ("largest error of a golden image, Chromium", f"{web['largest_error']:.0e}", f"{web['tolerance']:g}"),
        ("largest error of a golden image, Node", f"{result['node']['largest_error']:.0e}", f"{web['tolerance']:g}"),
    ]


def ray_rows(result: dict[str, Any]) -> Table:
    """What was sent, how it ended, and how the answers compare with direct ones."""
    statuses, killed, requests = result["statuses"], result["killed"], result["requests"]
    busy, largest = statuses.get("503", 0), f"{result['largest_difference']:.0e}"
    others = sum(count for status, count in statuses.items() if status not in ("200", "503"))
    return ("", "measured"), [
        ("capacity, 32 clients that wait for each answer", f"{result['capacity_per_second']:.0f} requests a second"),
        ("requests, and how many were sent a second", f"{requests:,}, {result['sent_per_second']:.0f}"),
        ("painters; one was killed after", f"{killed['painters']}; {killed['after_answers']:,} answers"),
        ("ended with the image of their seed", f"{result['right']:,}"),
        ("with another image, or none", f"{result['wrong']}, {result['lost']}"),
        (
            "answered with 503 and sent again",
            f"{busy:,} times, one request at most {result['most_tries']}",
        ),
        ("any other status, or no answer", f"{others} times"),
        (
            "largest difference from the direct image (tolerance)",
            f"{largest} ({result['tolerance']:g})",
        ),
        ("the same bits as the direct image", f"{result['same_bits'] / requests:.0%}"),
    ]


def _threads(facts: dict[str, Any]) -> str:
    return "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
