"""Samples: images with their ids, labels and captions."""
