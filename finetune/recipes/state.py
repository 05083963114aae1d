"""What a training of the recipes goes on from: one file, whole or not at all, every two minutes."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mmd_export.errors import UsageError
from mmd_finetune.files import write_atomically

SAVE_SECONDS = 120.0


class Kept(Protocol):
    """A network, an optimiser or a schedule."""

    def state_dict(self) -> Any:
        """All that changes."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take it back."""
        ...


class State:
    """The file ``path`` of a training of ``parts``, whose draws come from ``generator``; no ``path``: none is kept.

    ``settings``: what must be the same when it goes on.
    """

    def __init__(
        self, path: Path | None, parts: Mapping[str, Kept], generator: torch.Generator, settings: Mapping[str, Any]
    ) -> None:
        self._path, self._parts, self._generator, self._settings = path, parts, generator, dict(settings)
        self._saved = time.perf_counter()

    def load(self) -> dict[str, Any]:
        """Take all parts back; returns what was kept beside them, empty where there is no file.

        Raises UsageError if the file is damaged, of another network, or of a training with other settings.
        """
        if self._path is None or not self._path.exists():
            return {}
        try:
            kept = torch.load(self._path, weights_only=True, map_location=self._generator.device)
            if (was := kept["settings"]) != self._settings:
                raise UsageError(
                    f"{self._path} is of a training with {was}, now {self._settings}; give the old, or remove it"
                )
            for name, part in self._parts.items():
                part.load_state_dict(kept["parts"][name])
            self._generator.set_state(kept["generator"].cpu())
            beside: dict[str, Any] = kept["beside"]
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self._path} is no state of this training; remove it to start again") from error
        return beside

    def save_sometimes(self, **beside: Any) -> None:
        """Write the parts and ``beside`` if the last time is two minutes ago."""
        if self._path is None or time.perf_counter() - self._saved < SAVE_SECONDS:
            return
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        kept = {"parts": parts, "beside": beside, "generator": self._generator.get_state(), "settings": self._settings}
        file = io.BytesIO()
        torch.save(kept, file)
        write_atomically(self._path, file.getvalue())
        self._saved = time.perf_counter()
