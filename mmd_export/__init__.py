"""Few-step diffusion samplers as single static graphs: tune, export, check and measure."""

__version__ = "0.1.0"
