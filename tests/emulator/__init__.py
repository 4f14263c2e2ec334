"""Runs compiled PTX of Triton kernels on a CPU, and rejects what a GPU would silently get wrong."""
