"""Finetune a denoiser with the Maximum Mean Discrepancy for one fixed budget of steps (arXiv 2301.07969)."""
