"""Per-sample gradients of a model, projected and kept."""
