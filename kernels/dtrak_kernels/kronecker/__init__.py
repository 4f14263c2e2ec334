"""The two-sided sketch."""
