"""dist-obdsd: distributed deep metric learning with self-distillation and online diffusion on batch manifolds."""

__version__ = "0.1.0"
