"""Fine-tune video diffusion transformers with CREPA, cross-frame representation alignment."""

__version__ = "0.1.0"
