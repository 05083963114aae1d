"""Runtimes that open a bundle: one file each, one ``RUNTIME`` in it."""
