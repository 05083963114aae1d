"""diffusers without the warnings of packages that it looks at but that nothing here uses."""

from __future__ import annotations

import importlib
import logging
from typing import Any

# executorch brings torchao, which diffusers imports if it finds it. On a machine without a GPU torchao 0.18 warns of
# every kernel it cannot load, torch of torchao's enums, diffusers 0.42 of torchao's names. Delete once they do not.
_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def import_diffusers() -> Any:
    """The package; it imports its own modules later, when a name of theirs is asked for."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module("diffusers")
