"""One runnable example of each sampler that docs/siblings.md describes."""
