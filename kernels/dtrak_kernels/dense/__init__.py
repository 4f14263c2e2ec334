"""Dense random matrices, Rademacher and normal."""
