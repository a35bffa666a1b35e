"""Ways to make a steering file."""
