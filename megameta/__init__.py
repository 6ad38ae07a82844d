"""megameta: pre-training with learned meta-tokens and meta-attention."""

__version__ = "0.1.0"
