"""From features or pictures to scores."""
