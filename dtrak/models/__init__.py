"""What is explained: kinds of diffusion models."""
