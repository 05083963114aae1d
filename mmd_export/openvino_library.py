"""The openvino package, imported without its telemetry. No torch."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import Any

from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability, uninstalled

INSTALL = "pip install 'mmd-export[openvino]'"
_PACKAGE, _TELEMETRY = "openvino", "openvino_telemetry"


def openvino() -> Any:
    """The package; it ships no usable types. Raises NotAvailableError where it is not installed.

    Its ``__init__`` imports ``openvino.tools.ovc``, which reports the import to its maker and writes an identifier
    into the home folder (openvino 2026.4, openvino/tools/ovc/__init__.py). Where the telemetry package cannot be
    imported it takes its own stub instead, so that package is hidden meanwhile. To delete once an import reports
    nothing. A process that imported openvino before us has made its own choice.
    """
    if (loaded := sys.modules.get(_PACKAGE)) is not None:
        return loaded
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # None is how an import is blocked
    try:
        return importlib.import_module(_PACKAGE)
    except ImportError as error:
        raise NotAvailableError(f"openvino is not available here ({error}); {INSTALL}") from error
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before


def availability() -> Availability:
    """Whether the package is installed; it is not imported."""
    if uninstalled([_PACKAGE]):
        return Availability(False, "openvino is not installed", INSTALL)
    return Availability(True, f"openvino {version(_PACKAGE)}, CPU")
