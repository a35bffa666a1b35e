"""Check the prose of the project for words that CONTRIBUTING.md bans, and for long sentences.

`python tests/prose.py` checks everything against docs/.prose-baseline, the number of findings that each file
still has. A file may have fewer findings, never more. A file without a number may have none.
`python tests/prose.py FILE...` lists all findings of these files. `--update` lowers the numbers.
Prose is the Markdown of the documents and of the templates, docstrings, help texts of the command line, and
every other text of 5 words or more in the code: messages are among them.
Headings, tables, code, formulas and link targets are not prose. Neither is the rubric: a judge reads it, and
its calibration holds for one wording only.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "docs" / ".prose-baseline"
PROSE = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "vectors/README.md", "docs/**/*.md", "docs/**/*.py",
    "rs_gguf/**/*.py", "benchmarks/**/*.py", "rs_gguf/**/*.jinja",
)  # fmt: skip
MOST_WORDS = 30
FEWEST_WORDS = 5  # of a text in the code that is checked

BANNED = {  # a pattern, in which a blank is any white space: what to write instead
    r"(is|are|was|were|be|been|being) told( of)?": "say who reports what",
    r"reckon(s|ed|ing)?": "use “computes”, “estimates” or “treats as”",
    r"(?<!\bthere\s)(is|are|was|were) no (?!longer|more|less|fewer|better|worse)[\w-]+": "use “is not a …”",
    r"(that|those) of": "repeat the noun",
    r"but for": "use “except”",
    r"so many": "give the number, or name the thing",
    r"all the same": "use “nevertheless”, or “identical”",
    r"by (itself|themselves)": "use “unsteered” for the model, else leave it out",
    r"harm's refusals": "use “refusals of harmful prompts”",
    r"(falls?|fell|falling|fallen) apart": "use “failure” for the verdict, “degenerate output” for the rule",
    r"requests? (of|for) harm": "use “harmful prompt”",
    r"harmless (one|prompt|request|question)s?": "use “benign prompt”",
    r"ways? of asking": "use “request form”",
    r"soft refusals?": "use “evasion”",
    r"(kind|way)s? of refus(al|ing)": "use “category” of the rubric",
    r"graders?": "use “judge”",
    r"newly (answered|refused)": "use “opened” or “closed”",
    r"harm(ful)? kept": "use “retention” (of the same prompts) or “refusal ratio” (of totals)",
    r"safety gates?": "use “acceptance criteria”",
    r"proofs?|prov(e|es|ed|en|ing)": "use “effect check”, or say what was measured",
    r"scale 1\.0 is right": "use “scale 1.0 is the strength that the search selected”",
    r"dose and response": "use “scale sweep”",
    r"static vectors?": "use “control vector”",
    r"block outputs?": "use “activation”",
    r"rungs?": "use “fidelity level”",
    r"wide(r|ned) cop(y|ies)": "use “Q8_0 copy”",
}
_BANNED = [
    (re.compile(rf"\b(?:{pattern})(?!\w)".replace(" ", r"\s+"), re.IGNORECASE), advice)
    for pattern, advice in BANNED.items()
]

_ABBREVIATIONS = ("e.g.", "i.e.", "cf.", "vs.", "approx.", "al.", "Eq.", "Eqs.", "Fig.", "Figs.", "Sec.")
_ALTERNATIVE = "\ue000"  # stands for a template's `else`: what is before and after it is never one sentence
_END = re.compile(
    "".join(rf"(?<!\b{re.escape(word)})" for word in _ABBREVIATIONS)
    + rf"(?<=[.!?])(?:(?<!\betc\.)|(?=\s+[A-Z]))[\"'”’)\]]*\s+|{_ALTERNATIVE}"
)
_CODE = "`x`"  # stands for code, a formula or a template's value
_FORMULA = re.compile(r"(```.*?```|`[^`]*`)|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
_TEMPLATE = re.compile(r"\{#.*?#\}|(\{\{.*?\}\})|\{%-?\s*(else|elif)?.*?%\}", re.DOTALL)
_FIELD = re.compile(r"^ *(?=[\w*]+: )", re.MULTILINE)
_HELP = ("help", "short_help", "epilog", "description")


@dataclass(frozen=True)
class Passage:
    """A paragraph or a list item: its text, and the line of the file where it begins."""

    line: int
    text: str


@dataclass(frozen=True)
class Finding:
    """A breach of the rules, and the line where it begins."""

    line: int
    problem: str


def markdown(text: str, first_line: int = 1) -> Iterator[Passage]:
    """Yield the passages of a Markdown text."""
    text = _FORMULA.sub(lambda found: found[1] or _CODE + "\n" * found[0].count("\n"), text)
    tokens = MarkdownIt().enable("table").parse(text)
    for before, token in pairwise(tokens):
        if token.type != "inline" or before.type in ("heading_open", "th_open", "td_open"):
            continue
        parts = []
        for child in token.children or []:
            if child.type == "code_inline":
                parts.append(_CODE)
            elif child.type in ("softbreak", "hardbreak"):
                parts.append("\n")
            elif child.type != "html_inline":
                parts.append(child.content)
        content = "".join(parts)
        if not content.startswith((":::", "\b")):  # mkdocstrings' directives; what click prints as it is
            yield Passage(first_line + (token.map[0] if token.map else 0), content)


def python(text: str) -> Iterator[Passage]:
    """Yield the passages of a module: docstrings, help texts and longer texts, such as messages."""
    tree = ast.parse(text)
    seen: set[int] = set()  # what is a part of something else
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            seen.update(id(part) for part in node.values)
        elif isinstance(node, ast.Expr):  # a docstring, which has an indentation of its own
            seen.add(id(node.value))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                # "name: what it is" on a line of its own describes one more parameter.
                yield from markdown(_FIELD.sub("- ", docstring), node.body[0].lineno)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg in _HELP and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    seen.add(id(value))
                    yield from markdown(value.value, value.lineno)
    for node in ast.walk(tree):
        if id(node) not in seen and isinstance(node, ast.Constant | ast.JoinedStr):
            message = _message(node)
            if len(message.split()) >= FEWEST_WORDS and not message.startswith("| "):  # a row of a table
                yield from markdown(message.replace(":\n", ":\n\n"), node.lineno)  # a list begins


def _message(node: ast.Constant | ast.JoinedStr) -> str:
    """Return a text of the code with a word for each value; empty for another constant."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(_message(part) if isinstance(part, ast.Constant) else _CODE for part in node.values)


def template(text: str) -> str:
    """Return a Jinja template with a word for each value, a mark for each alternative and no other tags."""

    def plain(tag: re.Match[str]) -> str:
        return (_CODE if tag[1] else _ALTERNATIVE if tag[2] else "") + "\n" * tag[0].count("\n")

    return _TEMPLATE.sub(plain, text)


class _Page(HTMLParser):
    INLINE = (
        "a",
        "abbr",
        "b",
        "bdi",
        "br",
        "code",
        "em",
        "i",
        "kbd",
        "small",
        "span",
        "strong",
        "sub",
        "sup",
    )
    SKIPPED = ("h1", "h2", "h3", "h4", "h5", "h6", "pre", "script", "style", "svg", "td", "th", "title")

    def __init__(self) -> None:
        super().__init__()
        self.passages: list[Passage] = []
        self._line, self._text, self._skipped = 1, "", 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in self.SKIPPED
        self._cut(tag)

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in self.SKIPPED
        self._cut(tag)

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if not self._text:
            self._text = data.lstrip()
            self._line = self.getpos()[0] + data[: len(data) - len(self._text)].count("\n")
        else:
            self._text += data

    def _cut(self, tag: str) -> None:
        if tag not in self.INLINE:
            if self._text.strip():
                self.passages.append(Passage(self._line, self._text))
            self._text = ""


def html(text: str) -> list[Passage]:
    """Return the passages of an HTML page."""
    page = _Page()
    page.feed(f"{text}</html>")
    page.close()
    return page.passages


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a passage, and where in the text each begins."""
    start = 0
    for end in _END.finditer(text):
        yield start, text[start : end.end()]
        start = end.end()
    yield start, text[start:]


def findings(passage: Passage) -> Iterator[Finding]:
    """Yield what breaks the rules in a passage, in its order."""
    found = [
        (match.start(), f"“{' '.join(match[0].split())}”: {advice}")
        for pattern, advice in _BANNED
        for match in pattern.finditer(passage.text)
    ]
    for start, sentence in sentences(passage.text):
        words = re.findall(r"\S*\w\S*", sentence)
        if len(words) > MOST_WORDS:
            beginning = " ".join(words[:6])
            problem = f"{len(words)} words, at most {MOST_WORDS}: split the sentence “{beginning} …”"
            found.append((start, problem))
    for start, problem in sorted(found):
        yield Finding(passage.line + passage.text.count("\n", 0, start), problem)


def check(path: Path) -> list[Finding]:
    """Return the findings of a file, by line."""
    text = path.read_text(encoding="utf-8")
    readers: dict[str, Callable[[str], Iterator[Passage] | list[Passage]]] = {
        ".md": markdown,
        ".py": python,
        ".md.jinja": lambda text: markdown(template(text)),
        ".html.jinja": lambda text: html(template(text)),
    }
    reader = next(reader for suffix, reader in readers.items() if path.name.endswith(suffix))
    found = [finding for passage in reader(text) for finding in findings(passage)]
    return sorted(found, key=lambda finding: finding.line)


def read_baseline(path: Path) -> dict[str, int]:
    """Return the number of findings that each file may have."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return {name: int(number) for number, name in entries}


def write_baseline(path: Path, counts: dict[str, int]) -> None:
    """Write the number of findings that each file may have."""
    lines = ["# Findings of tests/prose.py that each file may still have. The numbers only go down."]
    lines += [f"{number} {name}" for name, number in sorted(counts.items()) if number]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def lowered(allowed: dict[str, int], counts: dict[str, int]) -> dict[str, int]:
    """Return the numbers that are accepted from now on. Their sum never rises.

    The numbers of files that are gone pass to files without one, since a file may be moved or split.
    """
    spare = sum(number for name, number in allowed.items() if name not in counts)
    accepted = {}
    for name, count in counts.items():
        accepted[name] = min(count, allowed.get(name, spare))
        if name not in allowed:
            spare -= accepted[name]
    return accepted


def _print_all(name: str, found: Sequence[Finding]) -> int:
    for finding in found:
        print(f"{name}:{finding.line}: {finding.problem}")
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, baseline: Path = BASELINE) -> int:
    """Check the prose of the project; return the exit code."""
    parser = argparse.ArgumentParser(description="Check the prose of the project.")
    parser.add_argument("files", nargs="*", type=Path, help="list all findings of these files")
    parser.add_argument("--update", action="store_true", help="lower the numbers of the baseline")
    options = parser.parse_args(arguments)
    if options.files:
        return max([_print_all(str(path), check(path)) for path in options.files])

    paths = sorted({path for pattern in PROSE for path in root.glob(pattern)})
    found = {path.relative_to(root).as_posix(): check(path) for path in paths}
    allowed = read_baseline(baseline)
    if options.update:
        counts = {name: len(now) for name, now in found.items()}
        allowed = lowered(allowed, counts) if baseline.exists() else counts
        write_baseline(baseline, allowed)
    failed = 0
    for name, now in found.items():
        most = allowed.get(name, 0)
        if len(now) > most:
            failed = _print_all(name, now)
            print(f"{name}: {len(now)} findings, at most {most} are accepted. Rewrite what you added.")
        elif len(now) < most:
            print(f"{name}: {len(now)} findings, down from {most}. Run tests/prose.py --update.")
    for name in sorted(allowed.keys() - found.keys()):
        print(
            f"{name}: gone. Run tests/prose.py --update, which also gives its number to a file that is new."
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
