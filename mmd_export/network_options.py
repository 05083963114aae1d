"""What the user may choose about the network itself: guidance and the length of the text. No torch.

They change what the network computes or takes, so a bundle's checkpoint hash covers them and its manifest holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from mmd_export.errors import UsageError

Choice: TypeAlias = "int | float | str"
GuidanceForm = Literal["auto", "doubled", "two-calls"]


@dataclass(frozen=True)
class NetworkOptions:
    """``guidance_scale`` S of uncond + S (cond - uncond), 1 for none; ``null_label`` the class that means no class.

    ``guidance_form``: one doubled batch, two calls, or what was measured to be faster; ``text_length`` in tokens.
    """

    guidance_scale: float | None = None
    guidance_form: str = "auto"
    null_label: int | None = None
    text_length: int | None = None

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageError(f"--guidance-scale is {self.guidance_scale}; it must be finite, 1 means no guidance")
        if self.guidance_form not in get_args(GuidanceForm):
            known = ", ".join(get_args(GuidanceForm))
            raise UsageError(f"--guidance-form {self.guidance_form!r} is unknown; known: {known}")
        if self.text_length is not None and self.text_length < 1:
            raise UsageError(f"--text-length is {self.text_length}; it must be at least 1 token")

    @classmethod
    def from_dict(cls, chosen: Mapping[str, Choice]) -> NetworkOptions:
        """What a bundle's manifest holds; raises UsageError for an option of another version."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(chosen) - known):
            raise UsageError(f"network option {unknown[0]!r} is unknown; known: {', '.join(sorted(known))}")
        return cls(**chosen)  # type: ignore[arg-type]


AS_IT_IS = NetworkOptions()
