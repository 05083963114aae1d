"""One file a kind of source: what ``mmd_export.checkpoint`` dispatches to."""
