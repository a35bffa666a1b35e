"""The engine for Hugging Face folders: PyTorch in this process."""
