"""Clients of OpenAI-compatible servers, which answer over HTTP."""
