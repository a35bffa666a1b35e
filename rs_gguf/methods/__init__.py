"""Ways to make a steering file. To add one: a module in this package, and its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rs_gguf.methods.adapter import GatedAdapter
from rs_gguf.methods.method import SteeringMethod
from rs_gguf.methods.vector import ControlVector

METHODS: Mapping[str, SteeringMethod[Any]] = {"vector": ControlVector(), "adapter": GatedAdapter()}
"""By name, in the order in which they are fitted, searched and reported."""
