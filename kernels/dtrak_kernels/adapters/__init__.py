"""What other libraries' users import."""
