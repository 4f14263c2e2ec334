"""Counter-based random words and normals."""
