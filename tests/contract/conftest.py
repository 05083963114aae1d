"""The model fixtures."""

from tests.models import tiny_labels

__all__ = ["tiny_labels"]
