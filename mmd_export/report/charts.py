"""Charts as inline SVG and pictures as PNG data URIs.

matplotlib draws in stand-in colours, which become CSS variables of the page: one chart serves light and dark.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from mmd_export.pictures import grid
from mmd_export.report.model import Curve, Pictures

INK, MUTED, LINES = "#010101", "#020202", ("#030303", "#040404", "#050505")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)"} | {line: f"var(--c{i})" for i, line in enumerate(LINES, 1)}
_WIDTH, _HEIGHT = 4.6, 2.8  # inches: on a phone 390 pixels wide the text keeps about its size


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 (height, width, 1 or 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_uris(pictures: Pictures) -> dict[str, str]:
    """Sheets of artefact, reference and difference, four images across."""
    scale = pictures.largest or 1.0
    colours = (colormaps["magma"](pictures.difference / scale)[..., :3] * 255).astype(np.uint8)
    sheets = {"artefact": pictures.artefact, "reference": pictures.reference, "difference": colours}
    return {name: png_uri(grid(images, columns=4)) for name, images in sheets.items()}


def parity_svg(curve: Curve, name: str) -> str:
    """Largest error after every step, on a log axis, with the tolerance; empty if there is nothing to draw."""
    if not any(curve.steps.values()):
        return ""
    figure, axes = _figure()
    for colour, marker, (kind, points) in zip(LINES, "os^", curve.steps.items(), strict=False):
        steps, errors = zip(*points, strict=True)
        axes.plot(steps, np.maximum(errors, 1e-12), color=colour, marker=marker, markersize=4, label=kind)
    if curve.atol:
        axes.axhline(curve.atol, color=LINES[2], linestyle="--", linewidth=1.2, label=f"tolerance {curve.atol:g}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("largest error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return _svg(figure, f"parity {name}", f"Largest error of {name} after every step")


def violins_svg(seconds: Mapping[str, Sequence[float]]) -> str:
    """One violin a candidate, milliseconds on a log axis; what lies beyond p99.5 is cut, as the caption says."""
    names = list(seconds)
    figure, axes = _figure(height=0.9 + 0.5 * len(names))
    logs = [np.log10(1e3 * _trimmed(np.array(seconds[name]))) for name in names]
    places = list(range(len(names), 0, -1))
    parts = axes.violinplot(logs, positions=places, orientation="horizontal", showextrema=False, widths=0.8)
    bodies: Any = parts["bodies"]
    for body in bodies:
        body.set(facecolor=LINES[0], edgecolor=LINES[0], alpha=0.45)
    for place, values in zip(places, logs, strict=True):
        axes.plot([float(np.median(values))], [place], "|", color=INK, markersize=12)
    axes.set_yticks(places, names)
    low, high = axes.get_xlim()
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    marks = [value for k in decades for m in (1, 2, 5) if low <= (value := k + float(np.log10(m))) <= high]
    axes.set_xticks(marks, [f"{10**mark:.3g}" for mark in marks])
    axes.set_xlabel("ms, log axis")
    return _svg(figure, "violins", "Distribution of the seconds of a run, by candidate")


def _trimmed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without what lies above p99.5; a violin of one value is none, so that is spread by a millionth."""
    kept = values[values <= np.percentile(values, 99.5)]
    return kept if np.ptp(kept) else kept * (1 + 1e-6 * np.arange(len(kept) + 1)[: len(kept)])


def _figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots()
    axes.patch.set_alpha(0.0)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)
    axes.grid(True, color=MUTED, alpha=0.25, linewidth=0.6)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False, fontsize=8, labelcolor=INK)


def _svg(figure: Figure, salt: str, label: str) -> str:
    """Inline SVG: no prolog, no metadata with addresses, ids of its own by ``salt``, the page's colours and font."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for size in ("width", "height"):  # the page's CSS sizes it
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    ids = sorted(set(re.findall(r'id="([^"]+)"', text)), key=len, reverse=True)
    prefix = re.sub(r"\W+", "-", salt)
    for each in ids:  # figure_1, axes_1, ... are in every chart
        text = re.sub(rf'(id="|#){re.escape(each)}(?=[")])', rf"\g<1>{prefix}-{each}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
