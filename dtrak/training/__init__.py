"""Training models, and drawing with them."""
