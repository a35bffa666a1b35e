"""Prompts, as text and as tokens."""

from rs_gguf.prompts.user_files import load

__all__ = ["load"]
