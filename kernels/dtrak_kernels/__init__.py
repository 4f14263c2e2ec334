"""Random projection of per-sample gradients and the regularised kernel inverse, for any model."""
