"""Define how llama.cpp loads a model and decodes: GPU layers, threads, batch, context, attention and caches.

Values of a recipe or of command options go in; a validated `EngineSettings` comes out, which the engines
read. Names and defaults are the ones of llama.cpp's options, with four exceptions:

- `gpu_layers`: `auto` puts all layers on the GPU, where llama.cpp's puts those that fit.
- `threads`: llama.cpp counts the processor's cores, also those that a container may not use.
- `ctx_size`: llama.cpp takes the model's training length, whose cache fits few machines.
- `batch_size`: llama.cpp also computes 512 tokens at a time, but collects 2,048 before. Tensors that are read
  from its graph must be in the order of the tokens, so a batch is computed at once here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
FlashAttention = Literal["auto", "on", "off"]
SplitMode = Literal["none", "layer", "row", "tensor"]

_UNQUANTISED = ("f32", "f16", "bf16")
_OF_GPUS = ("gpu_layers", "split_mode", "tensor_split", "main_gpu")
# The others change a result only as another batch does: in the last bits of a sum.
OF_RESULTS = ("flash_attn", "cache_type_k", "cache_type_v")


class EngineSettings(BaseModel):
    """How llama.cpp loads a model and decodes. PyTorch uses none of it.

    Raises:
        ValidationError: a value is not accepted, or the cache of values is quantised without flash attention.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    gpu_layers: str = Field(
        default="auto",
        pattern=r"^(auto|all|\d{1,6})$",
        description="layers on the GPU: a number, `all` or `auto` (all; llama.cpp's takes what fits)",
    )
    threads: int = Field(
        default=-1,
        ge=-1,
        le=512,  # GGML_MAX_N_THREADS
        description="CPU threads; -1 for one on each usable core",
    )
    ctx_size: int = Field(
        default=8192,
        ge=1,
        le=2**30,
        description="KV cells that all sequences share; most tokens of one",
    )
    batch_size: int = Field(default=512, ge=1, description="most tokens of one decoding step")
    flash_attn: FlashAttention = Field(
        default="auto", description="flash attention: `on`, `off` or `auto`, where the device supports it"
    )
    cache_type_k: CacheType = Field(
        default="f16", description="type of the cached keys, as for `--cache-type-k`"
    )
    cache_type_v: CacheType = Field(
        default="f16", description="type of the cached values; a quantised one needs flash attention"
    )
    split_mode: SplitMode = Field(
        default="layer", description="how several GPUs share the model: `none`, `layer`, `row` or `tensor`"
    )
    tensor_split: str = Field(
        default="",
        pattern=r"^(\d+(\.\d+)?(,\d+(\.\d+)?)*)?$",
        description="share of each GPU, such as `3,1`; empty: by free memory",
    )
    main_gpu: int = Field(
        default=0,
        ge=0,
        description="GPU for `split_mode` `none`, or for intermediate results with `row`",
    )

    @model_validator(mode="after")
    def _check_flash_attention(self) -> Self:
        if self.flash_attn == "off" and self.cache_type_v not in _UNQUANTISED:
            raise PydanticCustomError(
                "needs_flash_attention",
                "a cache_type_v of {type} needs flash attention, but flash_attn is off; set flash_attn to "
                "auto, or cache_type_v to {accepted}",
                {"type": self.cache_type_v, "accepted": ", ".join(_UNQUANTISED)},
            )
        if self.flash_attn == "off" and self.split_mode == "tensor":
            raise PydanticCustomError(
                "needs_flash_attention",
                "a split_mode of tensor needs flash attention, but flash_attn is off; set flash_attn to "
                "on, or split_mode to layer",
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, object]) -> EngineSettings:
        """Return the settings with these values, each as it is or as text.

        Raises:
            InputError: a value is not accepted; the message names all of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"engine settings are not valid: {reasons.lstrip(': ')}.") from error

    @property
    def changed(self) -> tuple[str, ...]:
        """Return the names of the settings that have another value than the default."""
        return tuple(self.model_dump(exclude_defaults=True))

    @property
    def for_gpus(self) -> tuple[str, ...]:
        """Return the names in `changed` that have an effect only on a GPU."""
        return tuple(name for name in self.changed if name in _OF_GPUS)

    @property
    def result_options(self) -> str:
        """Return llama.cpp's options for the settings that change results; "" if all have their defaults."""
        names = (name for name in self.changed if name in OF_RESULTS)
        return " ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in names)

    @property
    def reordered(self) -> EngineSettings:
        """Return the settings under which attention sums in another order: without flash attention, or with.

        Quantised values and tensor parallelism need flash attention: then these settings.
        """
        if self.cache_type_v not in _UNQUANTISED or self.split_mode == "tensor":
            return self
        return self.model_copy(update={"flash_attn": "auto" if self.flash_attn == "off" else "off"})

    @property
    def n_threads(self) -> int:
        """Return the number of threads: `threads`, or one for each core that this process may use."""
        return self.threads if self.threads > 0 else usable_cores()

    @property
    def cache_bytes(self) -> float:
        """Return the bytes of a cached number, averaged over keys and values."""
        sizes = [GGML_QUANT_SIZES[ggml_type(name)] for name in (self.cache_type_k, self.cache_type_v)]
        return float(sum(n_bytes / block for block, n_bytes in sizes)) / 2

    @property
    def shares(self) -> list[float]:
        """Return the numbers in `tensor_split`."""
        return [float(share) for share in self.tensor_split.split(",") if share]


DEFAULTS = EngineSettings()


def ggml_type(name: CacheType) -> Any:
    """Return the number of a type in ggml, which the package `gguf` also uses."""
    return GGMLQuantizationType[name.upper()]
