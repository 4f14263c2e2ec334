"""Per-sample gradients inside a backward: made, projected and dropped."""
