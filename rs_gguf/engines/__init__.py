"""What runs a model; one package an engine."""
