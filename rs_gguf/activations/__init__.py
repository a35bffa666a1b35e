"""Activations that are read from a model, and their projections on directions."""
