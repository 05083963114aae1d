"""The pages that put a bundle into an app, typed as they stand: build, embed, install, build the app, draw."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.docs.conftest import Reader
from tests.kits.cpp_builds import libraries
from tests.kits.npm import require_node


def test_python_and_cpp(read: Reader) -> None:
    libraries()  # or the skip that says what is missing
    state = read("docs/embedding.md")
    for kit in ("python", "cpp"):
        assert np.asarray(Image.open(state.folder / f"digits-{kit}" / "sample.png")).std() > 20, kit


def test_web_and_node(read: Reader) -> None:
    require_node("web")
    state = read("docs/embedding-web.md")
    assert np.asarray(Image.open(state.folder / "digits-node" / "sample.png")).std() > 20
    assert (state.folder / "digits-node" / "zero.png").exists()
