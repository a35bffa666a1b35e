"""What is read from a model, and its projections."""
