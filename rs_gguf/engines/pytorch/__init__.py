"""Hugging Face folders through PyTorch."""
