"""Runs and their folder."""
