"""Choose and make what `rs-export push` uploads of a run folder.

A folder goes in; the files of the repository come out, and which files stay here, with the reason.
Only these are uploaded: steering files, card, measured figures, recipe, prompts without answers, preset.ini
and reproduce.json. The report is made anew, without answers to harmful prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from rs_gguf.errors import InputError
from rs_gguf.judges.registry import kind_and_name
from rs_gguf.models import header
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.folder import moved_file
from rs_gguf.pipeline.reproduce import NAME, Reproduction, prompt_file, read_recipe, without_private_values
from rs_gguf.prompts import user_files
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import RunRecord
from rs_gguf.records.rows import Row, json_text
from rs_gguf.records.sealed import NAME as SEALED
from rs_gguf.records.sealed import SealedRecord
from rs_gguf.report.page import write_report
from rs_gguf.report.recommendation import reported_files
from rs_gguf.report.results import printable, without_home
from rs_gguf.report.text import card_notice, file_name, markdown_environment, markdown_text
from rs_gguf.steering.file import kind_of
from rs_gguf.steering.preset import preset_ini
from rs_gguf.steering.vector_file import MODE_KEY
from rs_gguf.version import __version__

# What a result depends on.
_PACKAGES = (
    "rs-gguf", "llama-cpp-python", "torch", "numpy", "scipy", "scikit-learn", "optuna", "transformers",
)  # fmt: skip
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")


@dataclass(frozen=True)
class Publication:
    """What is uploaded: `contents` by name. `left_out`: what stays here, and why. `unmeasured`: files."""

    contents: dict[str, Path | bytes]
    left_out: dict[str, str]
    unmeasured: tuple[str, ...]

    @property
    def card(self) -> str:
        """Return the text of the card."""
        content = self.contents["README.md"]
        assert isinstance(content, bytes)
        return content.decode()

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        content = self.contents[name]
        return content.stat().st_size if isinstance(content, Path) else len(content)


def prepare(folder: Path) -> Publication:
    """Return what can be uploaded of a run folder or of a folder with published files.

    Raises:
        InputError: the folder has no recipe.toml or no steering file, its card is missing or describes other
            files, or a prompt file is missing.
    """
    left_out: dict[str, str] = {}
    files = _steering_files(folder, left_out)
    values = read_recipe(folder / "recipe.toml")
    record = RunRecord.read(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    sealed = SealedRecord.in_folder(folder, record) if record else None
    hashes = {name: sha256(path) for name, path in files.items()}
    measured = {file.sha256 for file in record.files.values()} if record else set()
    unmeasured = tuple(name for name, digest in hashes.items() if digest not in measured)
    model_sha256 = record.model.sha256 if record else ""
    shared, to_set = without_private_values(values, model_sha256)
    prompts = _prompts(folder, shared)
    spec = str(values.get("model", models.DEFAULT))
    source = models.public_source(spec, model_sha256)
    hidden = _hidden(values, shared, record)

    def public(text: str) -> str:
        for private, shown in hidden.items():
            text = text.replace(private, shown)
        return without_home(text)

    contents: dict[str, Path | bytes] = dict(files)
    contents |= prompts
    contents["recipe.toml"] = public(tomli_w.dumps(shared)).encode()
    if record is not None:
        contents["metrics.json"] = public(json_text(record.mapping(), indent=2)).encode()
        if sealed is not None:
            contents[SEALED] = public(json_text(sealed.mapping(), indent=2)).encode()
        report = _report(folder, left_out, public)
        if report is not None:
            contents["report.html"] = report.encode()
    reproduction = Reproduction(
        tool=(record.tool if record else None) or f"rs-gguf {__version__}",
        date=record.date if record else "",
        seed=int(shared.get("seed", 0)),
        recipe=shared,
        to_set=to_set,
        versions=_versions(),
        model_sha256=model_sha256,
        files=hashes,
        prompts={name: hashlib.sha256(content).hexdigest() for name, content in prompts.items()},
    )
    contents[NAME] = public(json_text(reproduction.model_dump(mode="json"), indent=2)).encode()
    name = record.model.name if record else printable(Path(spec).name.removesuffix(".gguf"))
    off = record is not None and any(file.llama_cpp.reasoning_off for file in record.files.values())
    options = {file: kind_of(path).option for file, path in files.items()}
    contents["preset.ini"] = public(preset_ini(name, source, options, reasoning_off=off)).encode()
    contents["README.md"] = public(_card(folder, record, sealed, hashes, unmeasured, name, source)).encode()
    return Publication(dict(sorted(contents.items())), left_out, unmeasured)


def _steering_files(folder: Path, left_out: dict[str, str]) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.glob("*.gguf")):
        values = header.read(path).values
        if values.get("general.architecture") != "controlvector" and values.get("general.type") != "adapter":
            left_out[path.name] = "neither a control vector nor an adapter"
        elif values.get(MODE_KEY, "add") != "add":
            left_out[path.name] = "a GLP file, whose directions llama.cpp would add"
        elif not _FILE_NAME.fullmatch(path.name):
            left_out[path.name] = "its name has other characters than letters, digits, dots and dashes"
        else:
            files[path.name] = path
    if not files:
        raise InputError(f"{folder} has no control vector and no adapter. Give the folder of a run.")
    return files


def _prompts(folder: Path, shared: dict[str, Any]) -> dict[str, bytes]:
    """Return the user's prompts by the name of their published file, and point the recipe to these files."""
    contents = {}
    given = shared.get("prompts", {})
    for kind in KINDS:
        rows = []
        for name in given.get(kind, ()):
            path = moved_file(folder, name)
            rows += [prompt.to_row() for prompt in user_files.load(path, kind)]
        if rows:
            contents[prompt_file(kind)] = "".join(json_text(row) + "\n" for row in rows).encode()
            given[kind] = [prompt_file(kind)]
    return contents


def _report(folder: Path, left_out: dict[str, str], public: Callable[[str], str]) -> str | None:
    """Return the report, made anew: the page in the folder may show answers to harmful prompts."""
    if not (folder / "test_answers.jsonl").is_file():
        left_out["report.html"] = "it cannot be made anew, without test_answers.jsonl"
        return None
    with tempfile.TemporaryDirectory() as scratch:
        # Made of public values: the page breaks commands into words, which could not be replaced later.
        for path in folder.iterdir():
            copy = Path(scratch) / path.name
            if path.suffix in (".json", ".toml"):
                copy.write_text(public(path.read_text(encoding="utf-8")), encoding="utf-8")
            elif path.name == "test_answers.jsonl":
                copy.write_bytes(path.read_bytes())
            else:
                with contextlib.suppress(OSError):  # without links, the page leaves out some pictures
                    copy.symlink_to(path.resolve())
        return write_report(Path(scratch)).read_text(encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _card(
    folder: Path,
    record: RunRecord | None,
    sealed: SealedRecord | None,
    hashes: Mapping[str, str],
    unmeasured: tuple[str, ...],
    model: str,
    source: tuple[str, str] | None,
) -> str:
    """Return the card of the folder with a notice of every file that has not passed; or a card of its own."""
    notices = [f"{name}: not measured, so nothing is known of its effect." for name in unmeasured]
    for file in reported_files(record, sealed) if record else ():
        if not file.passed:
            notices.append(f"{file.record.file}: acceptance criteria {file.verdict}.")
    path = folder / "card.md"
    if record is not None:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if any(digest not in text for name, digest in hashes.items() if name not in unmeasured):
            raise InputError(
                f"{path} is missing or describes other files. Run `rs-export report --out {folder}`."
            )
        return card_notice(text, notices)
    template = markdown_environment().get_template("card_unmeasured.md.jinja")
    text = template.render(model=model, source=source, hashes=hashes, version=__version__)
    return card_notice(text, notices)


def _hidden(values: Row, shared: Row, record: RunRecord | None) -> dict[str, str]:
    """Return what replaces each server and local path, longest first, in every form that a text may have.

    Card and report have the whole recipe as it was, and the commands of metrics.json have paths.
    """
    private: dict[str, str] = {}
    for key in ("model", "judge", "judge_second"):
        if values.get(key) is not None and values[key] != shared.get(key):
            private |= _replacements(kind_and_name(str(values[key]))[1])
    private |= _replacements(str(values.get("answers", {}).get("servers") or ""))
    for kind in KINDS:
        private |= {str(name): prompt_file(kind) for name in values.get("prompts", {}).get(kind, ())}
    for file in record.files.values() if record else ():
        with contextlib.suppress(ValueError):  # a foreign record's quotes may be open
            for word in map(without_home, shlex.split(file.llama_cpp.command)):
                private |= _replacements(word) if Path(word).is_absolute() else {}
    forms = {
        form: shown
        for text, shown in private.items()
        for plain in (text, without_home(text))
        for form in (plain, json_text(plain)[1:-1], markdown_text(plain))
        if plain != shown
    }
    return dict(sorted(forms.items(), key=lambda item: -len(item[0])))


def _replacements(text: str) -> dict[str, str]:
    """Return what replaces a path, or each address of servers."""
    if not text.startswith(("http://", "https://")):
        return {text: file_name(text)} if text else {}
    urls = [url.strip().rstrip("/") for url in text.partition("#")[0].split(",")]
    return {root: "http://server" for url in urls for root in (url, url.removesuffix("/v1"))}
