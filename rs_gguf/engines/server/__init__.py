"""Servers that answer over HTTP."""
