"""The values that stages hand over, and how they are stored on disk."""
