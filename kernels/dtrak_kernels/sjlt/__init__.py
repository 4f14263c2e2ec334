"""The tile-chained sparse sketch."""
