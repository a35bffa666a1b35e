"""The results of a finished run: read, drawn, listed and put into words."""
