"""From a program to a Core ML package: capture, range probe, conversion, clean files."""
