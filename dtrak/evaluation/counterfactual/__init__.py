"""Retraining without the images that rank highest."""
