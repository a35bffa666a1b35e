"""Batched projection of activations on directions, as public names of `rs_gguf.activations.projection`."""

from rs_gguf.activations.projection import project, project_statistics

__all__ = ["project", "project_statistics"]
