"""Batched projection of activations on directions; `rs_gguf.activations.projection` has the rest."""

from rs_gguf.activations.projection import project, project_statistics

__all__ = ["project", "project_statistics"]
