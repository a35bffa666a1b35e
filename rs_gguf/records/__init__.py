"""The values that stages hand over, and how they are kept on disk."""
