"""The linear datamodelling score."""
