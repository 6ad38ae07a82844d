"""The HuggingFace model from the training model's own source, and conversion both ways."""
