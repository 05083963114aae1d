"""The model fixtures."""

from tests.models import tiny, tiny_attention, tiny_checkpoint, tiny_labels

__all__ = ["tiny", "tiny_attention", "tiny_checkpoint", "tiny_labels"]
