"""Ground truths: models trained on part of the data."""
