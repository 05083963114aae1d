"""How an encoder is named: ``kind``, ``kind:PLACE`` or ``kind:PLACE?option=value&...``. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from mmd_export.errors import UsageError

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One encoder as the user named it."""

    kind: str
    place: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, spec: str) -> Source:
        """Split at the first colon and, unless a file of that whole name exists, at the last question mark."""
        kind, _, place = spec.partition(":")
        options: dict[str, str] = {}
        if "?" in place and not Path(place).exists():
            place, _, query = place.rpartition("?")
            options = dict(parse_qsl(query, keep_blank_values=True))
        return cls(kind, place, options)

    @property
    def is_hub_id(self) -> bool:
        """``owner/name``, where nothing of that name lies in the working folder."""
        return bool(_HUB_ID.fullmatch(self.place)) and not Path(self.place).exists()

    @property
    def name(self) -> str:
        """The spec without the folders of this machine."""
        if not self.place:
            return self.kind
        place = self.place if self.is_hub_id else Path(self.place).name
        query = "&".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.kind}:{place}" + (f"?{query}" if query else "")

    def file(self) -> Path:
        """``place`` as a file that exists; raises UsageError."""
        path = Path(self.place)
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise UsageError(f"encoder {self.kind}:{self.place}: the file {found}; give the path of the weights")
        return path

    def require_options(self, *known: str) -> None:
        """Raise UsageError for an option that this kind of encoder does not take."""
        for key, value in self.options.items():
            if key not in known:
                takes = ", ".join(known) or "none"
                raise UsageError(f"encoder {self.name}: option {key}={value} is unknown; known: {takes}")
