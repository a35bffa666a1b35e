"""Find a model file, and read what it consists of."""
