"""Keep and repeat a published run: `reproduce.json` has its recipe, its seed, versions and hashes.

A recipe goes in, and the part that others can use comes out. Or a repository of the hub goes in, and a run
folder with its recipe comes out. A stranger's recipe is not trusted. It is validated like any other, and may
name public models and its own prompt files only, and no server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from rs_gguf.engines.settings import OF_RESULTS
from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.judges.registry import judges_with_model, kind_and_name
from rs_gguf.models import resolve as models
from rs_gguf.models import sources
from rs_gguf.models.upload import check_repository
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.settings import PREFIX
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import sha256, write_atomic, write_text

NAME = "reproduce.json"
_MAX_BYTES = 1 << 20
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_PrivateKey = Literal["model", "judge", "judge_second"]


def prompt_file(kind: str) -> str:
    """Return the name of the published prompt file of a kind."""
    return f"prompts/{kind}.jsonl"


class Reproduction(BaseModel):
    """The content of reproduce.json.

    `recipe` has the keys of recipe.toml; its prompt files are named as in the repository. `to_set`: keys
    whose value only the machine of the run could use. `versions`: of packages where the run was uploaded.
    `model_sha256` is empty if the run was not measured. `files`, `prompts`: SHA-256 by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    tool: str
    date: str
    seed: int
    recipe: dict[str, JsonValue]
    to_set: tuple[_PrivateKey, ...] = ()
    versions: dict[str, str]
    model_sha256: _Sha256 | Literal[""]
    files: dict[str, _Sha256]
    prompts: dict[str, _Sha256]

    @classmethod
    def read(cls, path: Path) -> Reproduction:
        """Read a reproduce.json, which may be a stranger's.

        Raises:
            InputError: the file is too large or damaged, or has another schema.
        """
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{NAME} has more than 1 MiB. Use another repository.")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (ValueError, RecursionError) as error:
            reason = str(error)
        raise InputError(
            f"{NAME} is not what `rs-export push` writes ({reason[:300]}). Use another repository, or a "
            "newer version of rs-gguf."
        )

    def differences(self, folder: Path) -> list[str]:
        """Return a sentence for each published file: whether `folder` has the same."""
        return [
            f"{name}: {'as published' if _is(folder / name, digest) else 'differs from the published file'}."
            for name, digest in self.files.items()
            if re.fullmatch(r"[\w.-]+\.gguf", name)
        ]


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the keys and values of a recipe file. Raise `InputError` if it is not a valid recipe."""
    return {key.lower(): value for key, value in _keys(path).items()}


def _keys(path: Path) -> dict[str, Any]:
    """Return a recipe file as it is: `recipes.load`, which checks it, accepts `Judge` as `judge`."""
    recipes.load(path)
    return tomllib.loads(path.read_text(encoding="utf-8"))


def without_private_values(
    values: Mapping[str, Any], sha256: str
) -> tuple[dict[str, Any], tuple[_PrivateKey, ...]]:
    """Return a recipe that others can use, and the keys whose value they must set.

    sha256: of the model; a local copy of a catalogue model gets its name.
    """
    shared = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    if known := models.with_hash(sha256):
        shared["model"] = known.name
    private = tuple(_private_keys(shared))
    for key in private:
        del shared[key]
    shared.get("answers", {}).pop("servers", None)  # their answers are the model's own
    if "engine" in shared:  # another machine has other cores and GPUs
        shared["engine"] = {key: value for key, value in shared["engine"].items() if key in OF_RESULTS}
    return shared, private


def _private_keys(values: Mapping[str, Any]) -> Iterator[_PrivateKey]:
    """Yield the keys whose value names a file or a server, and nothing that is public."""
    if "model" in values and models.public_source(str(values["model"])) is None:
        yield "model"
    judges: tuple[_PrivateKey, ...] = ("judge", "judge_second")
    for key in judges:
        if values.get(key) is not None:
            kind, name = kind_and_name(str(values[key]))
            if kind == "endpoint" or (judges_with_model(kind) and models.public_source(name) is None):
                yield key


def fetch(
    repository: str, out: Path, overrides: Sequence[str] = (), progress: models.OnBytes | None = None
) -> Reproduction:
    """Write the recipe and the prompts of a published run into the folder `out`, and download its model.

    A folder that holds this very run stays as it is, so that a killed run goes on.

    overrides: `KEY=VALUE` of the user, who must set the keys in `to_set`. recipe.toml keeps them.

    Raises:
        InputError: the repository has no valid reproduce.json, its recipe names a file or a server, a hash
            differs, or `out` holds another run or other prompts.
    """
    check_repository(repository)
    path = sources.hub_download(repository, NAME, None)
    published = Reproduction.read(path)
    given = _given(overrides)
    stored, recipe_file = out / NAME, out / "recipe.toml"
    if recipe_file.exists():
        if not (stored.is_file() and stored.read_bytes() == path.read_bytes()):
            raise InputError(f"{out} holds another run. Choose another folder (--out).")
        # The folder may be a copy of the repository: then its recipe is the stranger's, too.
        _refuse_private(_keys(recipe_file), given, (out,))
        return published
    values = _checked(published, given)
    files = {name: sources.hub_download(repository, name, None) for name in published.prompts}
    for name, file in files.items():
        if sha256(file) != published.prompts[name]:
            raise InputError(f"{repository}/{name} is not the file that {NAME} names: its SHA-256 differs.")
        if (out / name).exists() and not _is(out / name, published.prompts[name]):
            raise InputError(f"{out / name} is another file, which stays. Choose another folder (--out).")
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "recipe.toml"
        write_text(draft, _toml(values, out))
        recipe = recipes.load(draft, overrides)
    model = models.fingerprint(models.resolve(recipe.model, progress=progress))
    if published.model_sha256 not in ("", model):
        raise InputError(
            f"{recipe.model} has SHA-256 {model}; {repository} was made on {published.model_sha256}. Give "
            "the same model with --set model=…, or use the recipe without --from."
        )
    for name, file in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
    write_atomic(stored, lambda target: target.write(path.read_bytes()))
    # With the user's values in place of the stranger's, which a later run in this folder would use.
    recipes.dump(recipe, recipe_file)
    return published


def refuse_private(folder: Path, overrides: Sequence[str]) -> None:
    """Check the recipe of a folder that was published by `rs-export push`, perhaps a stranger's.

    Raises:
        InputError: the recipe names a server or a file elsewhere, which the user does not set.
    """
    if (folder / NAME).is_file():
        # Prompt files are named relative to the repository, or where `fetch` put them.
        _refuse_private(_keys(folder / "recipe.toml"), _given(overrides), (Path(), folder))


def _given(overrides: Sequence[str]) -> set[str]:
    """Return the keys that the user sets, as options or in the environment."""
    ours = (name.upper() for name in os.environ if name.upper().startswith(PREFIX))
    of_environment = {name.removeprefix(PREFIX).lower().replace("__", ".") for name in ours}
    return of_environment | {override.partition("=")[0].strip() for override in overrides}


def _checked(published: Reproduction, given: set[str]) -> dict[str, Any]:
    """Return the recipe of a stranger if it is safe to run here; prompt files are the published ones."""
    values: dict[str, Any] = dict(published.recipe)
    if missing := [key for key in published.to_set if key not in given]:
        raise InputError(
            f"{NAME} does not have {', '.join(missing)}, which only the machine of the run could use. Give "
            f"--set {missing[0]}=…"
        )
    known = {prompt_file(kind) for kind in KINDS}
    if strange := [f"prompts: {name!r}" for name in published.prompts if name not in known]:
        raise _refused(strange)
    _refuse_private(values, given, (Path(),), published.prompts)
    return values


def _refuse_private(
    values: Mapping[str, Any],
    given: Container[str],
    folders: Sequence[Path],
    published: Container[str] | None = None,
) -> None:
    """Raise `InputError` if a stranger's recipe names more than public models and the prompts of `folders`.

    given: keys that the user sets. published: names of the prompt files; None for any.
    """
    # Not left to the validation, which accepts `Judge` as `judge`.
    faults = [f"{key} = {value!r}" for key, value in values.items() if key not in recipes.Recipe.model_fields]
    faults += [f"{key} = {values[key]!r}" for key in _private_keys(values) if key not in given]
    answers, prompts = values.get("answers"), values.get("prompts")
    if isinstance(answers, dict) and answers.get("servers") is not None and "answers.servers" not in given:
        faults.append(f"answers.servers = {answers['servers']!r}")
    for kind in KINDS:
        listed = prompts.get(kind) or [] if isinstance(prompts, dict) else []
        name = prompt_file(kind)
        own = listed in [[str(folder / name)] for folder in folders]
        own = own and (published is None or name in published)
        if listed != [] and not own and f"prompts.{kind}" not in given:
            faults.append(f"prompts.{kind} = {listed!r}")
    if faults:
        raise _refused(faults)


def _refused(faults: Sequence[str]) -> InputError:
    shown = "; ".join(escape_control_chars(fault[:200]) for fault in faults[:10])
    return InputError(
        f"the recipe in {NAME} is refused: {shown}. Only public models, judges that run here and the "
        "prompt files of the repository are accepted. Give other values with --set or RS_GGUF_KEY."
    )


def _toml(values: Mapping[str, Any], out: Path) -> str:
    """Return the recipe as TOML, its prompt files in the folder `out`."""
    prompts = values.get("prompts")
    if isinstance(prompts, dict):
        moved = {kind: [str(out / name) for name in prompts[kind]] for kind in KINDS if prompts.get(kind)}
        values = {**values, "prompts": {**prompts, **moved}}
    try:
        text = tomli_w.dumps(values)
        text.encode()  # JSON can spell half of a surrogate pair, which UTF-8 does not have
        return text
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the recipe in {NAME} is not a recipe ({error}). Use another repository."
        ) from error
