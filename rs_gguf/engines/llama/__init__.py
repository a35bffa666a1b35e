"""The engine for GGUF files: llama.cpp in this process."""
