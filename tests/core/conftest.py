"""The model fixtures."""

from tests.models import tiny, tiny_attention, tiny_checkpoint, tiny_labels
from tests.precisions import attention_calls, attention_golden

__all__ = ["attention_calls", "attention_golden", "tiny", "tiny_attention", "tiny_checkpoint", "tiny_labels"]
