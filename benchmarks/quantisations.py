"""Measure one published file on several quantisations of its model, and files fitted on each of them.

llama.cpp requantises the published model downwards, for example from Q4_K_M to Q3_K_M and Q2_K. The files of
the published folder are copied and measured on each quantisation (as `rs-export remeasure` does). With
`--fit RECIPE`, a run makes files for each quantisation too. The judge is the same for all.

llama.cpp keeps more bits where a width is not a multiple of 256. The default model is 896 wide, so its Q2_K
has 5.3 bits a weight, against 6.2 of its Q4_K_M. The first table shows this.

All is kept in `--work`, where a killed call goes on. Prints tables in Markdown; `--json` writes the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from gguf import GGMLQuantizationType, LlamaFileType

from rs_gguf.cli.terminal import TerminalProgress
from rs_gguf.engines.llama import log
from rs_gguf.errors import InputError
from rs_gguf.machine import usable_cores
from rs_gguf.models import header as gguf_header
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder, key_of
from rs_gguf.pipeline.remeasure import remeasure
from rs_gguf.pipeline.run import run
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import FileRecord, RunRecord
from rs_gguf.records.rows import write_json
from rs_gguf.version import __version__

PUBLISHED = Path(__file__).parent.parent / "vectors" / "qwen2.5-coder-0.5b-remove"
PUBLISHED_FILE, FITTED_FILE = "published", "fitted"


@dataclass(frozen=True)
class Quantisation:
    """One GGUF file of the model: its name such as `Q2_K`, and the share of the weights of each type."""

    name: str
    path: Path
    bits_per_weight: float
    types: Mapping[str, float]

    @classmethod
    def of(cls, path: Path) -> Quantisation:
        header = gguf_header.read(path)
        weights: Counter[str] = Counter()
        for tensor in header.tensors:
            weights[GGMLQuantizationType(tensor.type).name] += math.prod(tensor.shape)
        total = weights.total()
        file_type = LlamaFileType(header.values.get("general.file_type", LlamaFileType.GUESSED))
        return cls(
            file_type.name.removeprefix("MOSTLY_"),
            path,
            8 * path.stat().st_size / total,
            {name: n / total for name, n in weights.most_common()},
        )

    def row(self) -> str:
        types = ", ".join(f"{name} {share:.0%}" for name, share in self.types.items() if share >= 0.005)
        size = self.path.stat().st_size / 1e6
        return f"| {self.name} | {size:.0f} MB | {self.bits_per_weight:.2f} | {types} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=PUBLISHED, help="published folder")
    parser.add_argument("--types", nargs="*", default=["Q3_K_M", "Q2_K"], help="quantisations to make")
    parser.add_argument("--prompts", type=int, default=30, help="validation prompts of each kind")
    parser.add_argument("--fit", type=Path, metavar="RECIPE", help="also fit files on each, by this recipe")
    parser.add_argument("--work", type=Path, default=Path("out/quantisations"), help="folder for all files")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    source = models.resolve(recipes.load(options.folder / "recipe.toml").model)
    made = [source, *(requantised(source, name, options.work) for name in options.types)]
    quantisations = [Quantisation.of(path) for path in made]
    print("| quantisation | size | bits a weight | types of the weights |\n| --- | ---: | ---: | --- |")
    print("\n".join(one.row() for one in quantisations))
    print(
        "\n| quantisation | file | explicit, sensitive | opened | explicit, harmful | kept | benign closed "
        "| fails, all kinds | drift | top-1 | verdict |\n"
        "| --- | --- | --- | ---: | --- | ---: | ---: | --- | ---: | ---: | --- |"
    )
    figures = []
    for one in quantisations:
        records = {PUBLISHED_FILE: published(options.folder, one, options.prompts, options.work)}
        if options.fit:
            try:
                records[FITTED_FILE] = fitted(options.fit, one, options.prompts, options.work)
            except InputError as error:  # a model that cannot answer is a result too
                print(f"| {one.name} | nothing fitted: {error} |", flush=True)
        for origin, record in records.items():
            for file in record.files.values():
                print(row(one, f"{file.word}, {origin}", file), flush=True)
        figures.append(
            {
                "quantisation": one.name,
                "bytes": one.path.stat().st_size,
                "bits_per_weight": one.bits_per_weight,
                "types": one.types,
                **{origin: record.mapping() for origin, record in records.items()},
            }
        )
    if options.json:
        write_json(options.json, figures)


def requantised(source: Path, name: str, work: Path) -> Path:
    """Return the model in another quantisation, made by llama.cpp unless it is there.

    Raises:
        InputError: llama.cpp knows no such quantisation, or cannot make it.
    """
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if file_type is None:
        raise InputError(f"llama.cpp has no quantisation {name}; give one such as Q3_K_M.")
    path = work / f"{models.fingerprint(source)[:12]}-{name}.gguf"
    if path.is_file():
        return path
    work.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = file_type, True, usable_cores()
    log.listen()
    log.forget_errors()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(draft), ctypes.byref(params)):
        raise InputError(log.failure(f"cannot requantise {source} to {name}"))
    draft.replace(path)
    return path


def published(folder: Path, model: Quantisation, prompts: int, work: Path) -> RunRecord:
    """Return the record of the files in `folder`, measured with `model` on `prompts` prompts of each kind."""
    record = RunRecord.read(folder / "metrics.json")
    sha256 = models.fingerprint(model.path)
    names = [file.file for file in record.files.values()]
    key = key_of(__version__, sha256, prompts, [models.fingerprint(folder / name) for name in names])
    copy = RunFolder(work / f"{model.path.stem}-{PUBLISHED_FILE}")
    if not copy.is_done(PUBLISHED_FILE, key):
        # The last measurement may have been of other files, or of fewer prompts. `remeasure` has a log, which
        # goes on only where the prompts and the tensors of the files are the same.
        shutil.copy(folder / "recipe.toml", copy.path)
        for name in names:
            shutil.copy(folder / name, copy.path)
        here = record.model.model_copy(update={"sha256": sha256, "name": model.path.name})
        record.model_copy(update={"model": here}).write(copy / "metrics.json")
        with contextlib.closing(TerminalProgress()) as progress:
            remeasure(copy.path, overrides=overrides(model, prompts), progress=progress)
        copy.mark_done(PUBLISHED_FILE, key, 0.0)
    return RunRecord.read(copy / "metrics.json")


def fitted(recipe: Path, model: Quantisation, prompts: int, work: Path) -> RunRecord:
    """Return the record of a run on `model`, which measures its files on `prompts` prompts of each kind."""
    out = work / f"{model.path.stem}-{FITTED_FILE}"
    with contextlib.closing(TerminalProgress()) as progress:
        run(recipes.load(recipe, overrides(model, prompts)), out, progress=progress)
    return RunRecord.read(out / "metrics.json")


def overrides(model: Quantisation, prompts: int) -> list[str]:
    return [
        f"model={model.path.resolve()}",
        f"prompts.validation={prompts}",
        "measure.baselines=[]",
        "judge_second=none",
    ]


def row(model: Quantisation, name: str, file: FileRecord) -> str:
    """Return a row of the table: transitions, explicit refusals and failures unsteered and steered, drift."""
    sensitive, harmful, benign = (file.sets[kind] for kind in KINDS)
    fails = [
        sum(getattr(one, f"outcomes_{side}").fails for one in file.sets.values())
        for side in ("unsteered", "steered")
    ]
    shares = (sensitive.opened, harmful.kept, benign.closed)
    opened, kept, closed = ("–" if share is None else f"{share.n} of {share.of}" for share in shares)
    explicit = [
        f"{one.outcomes_unsteered.explicit} → {one.outcomes_steered.explicit}" for one in (sensitive, harmful)
    ]
    drift, top1 = ("–" if x is None else f"{x:.3f}" for x in (file.benign_drift, file.top1_agreement))
    cells = [
        model.name, name, explicit[0], opened, explicit[1], kept, closed, f"{fails[0]} → {fails[1]}", drift,
        top1, file.acceptance.verdict,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
