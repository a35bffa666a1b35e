"""Methods that make steering files. To add one, write a module in this package and add it to `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rs_gguf.methods.adapter import GatedAdapter
from rs_gguf.methods.method import SteeringMethod
from rs_gguf.methods.vector import ControlVector

METHODS: Mapping[str, SteeringMethod[Any]] = {"vector": ControlVector(), "adapter": GatedAdapter()}
"""All methods by name, in the order in which they are fitted, searched and reported."""
