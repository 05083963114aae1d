"""Compilers that take a program of torch.export: what their targets share with nobody else."""
