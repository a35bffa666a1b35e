"""The configuration finder."""
