"""Detect degenerate output by rule: an empty text, a loop, or a switch to another language.

Takes a generation, or a prompt and the text of its answer, and returns a bool. A prompt may ask for another
language (a translation), so a switch alone is not damage: compare the steered and the unsteered answers.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache

from rs_gguf.records.conversation import Generation, Prompt

# Only texts of 160 bytes or more that compress to less than 0.25 can be loops. Ordinary language of this
# length compresses to 0.4 or more.
_LOOP_MIN_BYTES, _LOOP_RATIO = 160, 0.25
# Compressed bytes that each byte of the second half adds. Measured: at most 0.055 in loops, 0.07 in lists.
_LOOP_MAX_ADDED = 1 / 16
_LOOP_WINDOW = 12  # tokens

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_MIN_LETTERS = 20  # weighted; a shorter text may be a name or a number
_FOREIGN_SHARE = 1 / 3  # of the letters
_MIN_WORDS = 4

# Scripts in which one character carries about as much as three letters of an alphabet.
_DENSE_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")

# Frequent words that distinguish languages in Latin letters.
_WORDS = {
    "en": "the and of to is that with for are this you it in as be or by can from",
    "de": "der die das und ist nicht mit ein eine für zu auf von den im sie wird auch",
    "fr": "le la les et des est une pour dans que qui vous du sur pas ce en par plus",
    "es": "el la los las y que en una por con para es del se su como más un",
    "pt": "o os que não uma para com em é do da dos no na se por mais um",
    "it": "il la che di è una per non con sono della le gli si del un nel anche",
    "nl": "de het een van en is dat niet met voor zijn op te in aan ook",
    "pl": "i w na z się nie to jest że do jak o po dla są być oraz",
    "tr": "ve bir bu için ile da de olarak olan çok gibi daha ne en kadar",
    "id": "yang dan di untuk dengan ini adalah dari pada dalam itu tidak ke anda atau",
    "vi": "và của là các một được cho có không trong với những bạn này để về",
}
_LANGUAGES_OF = {
    word: [language for language, words in _WORDS.items() if word in words.split()]
    for word in " ".join(_WORDS.values()).split()
}


def is_degenerate(generation: Generation) -> bool:
    """Return whether a text is empty or a loop: it repeats itself, or at most two tokens fill its end."""
    text = generation.text.strip()
    # The loop may begin only after half of the answer.
    if not text or _repeats(text) or _repeats(text[len(text) // 2 :]):
        return True
    # A loop lasts to the end. Before the end, table rules and long numbers are as uniform as a loop.
    end = generation.tokens[-_LOOP_WINDOW:]
    return len(end) == _LOOP_WINDOW and len(set(end)) <= 2


def _repeats(text: str) -> bool:
    """Return whether a text compresses far better than language, and its second half adds nothing new.

    Lists of similar JSON objects, or in a script with three bytes per character, compress as well. But each
    of their entries adds something. Digits are ignored, because a loop may count its rounds.
    """
    data = text.encode("utf-8")
    if len(data) < _LOOP_MIN_BYTES or _compressed(data) >= _LOOP_RATIO * len(data):
        return False
    data = " ".join(re.sub(r"\d", "0", text).split()).encode("utf-8")
    half = len(data) // 2
    return _compressed(data) - _compressed(data[:half]) < _LOOP_MAX_ADDED * (len(data) - half)


def _compressed(data: bytes) -> int:
    return len(zlib.compress(data, 9))


def switches_language(prompt: Prompt, answer: str) -> bool:
    """Return whether much of an answer is in a script or a language that its prompt does not use.

    Code blocks do not count. Languages in Latin letters are compared by the frequent words of the languages
    in `_WORDS`. A short answer never counts as a switch.
    """
    text = _CODE.sub(" ", answer)
    letters = _scripts(text)
    total = sum(letters.values())
    if total < _MIN_LETTERS:
        return False
    own = _main_scripts(prompt.prompt)
    foreign = sum(count for script, count in letters.items() if script not in own)
    if own and foreign > _FOREIGN_SHARE * total:
        return True
    prompt_language = prompt.language if prompt.language in _WORDS else _language(_hits(prompt.prompt))
    hits = _hits(text)
    language = _language(hits)
    if not prompt_language or not language or prompt_language == language:
        return False
    return 3 * hits[prompt_language] <= hits[language]


def _scripts(text: str) -> Counter[str]:
    """Return the number of letters by script. A letter of a dense script counts as three."""
    letters: Counter[str] = Counter()
    for char, count in Counter(text).items():
        script = _script(char)
        letters[script] += count * (3 if script in _DENSE_SCRIPTS else 1)
    del letters[""]
    return letters


def _main_scripts(text: str) -> set[str]:
    """Return the scripts of at least a third of the letters each. A single name adds no script."""
    letters = Counter(script for char in text if (script := _script(char)))
    main = {script for script, count in letters.items() if count >= _FOREIGN_SHARE * letters.total()}
    japanese = {"CJK", "HIRAGANA", "KATAKANA"}
    return main | japanese if main & {"HIRAGANA", "KATAKANA"} else main


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """Return the script of a letter, or an empty text for other characters."""
    if not char.isalpha():
        return ""
    return unicodedata.name(char, "?").split()[0].split("-")[0]


def _hits(text: str) -> Counter[str]:
    """Return how many frequent words of each language a text contains."""
    hits: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower()):
        hits.update(_LANGUAGES_OF.get(word, ()))
    return hits


def _language(hits: Counter[str]) -> str:
    """Return the language with the most frequent words; empty if they are few or indicate two languages."""
    (first, most), (_, second), *_ = [*hits.most_common(2), ("", 0), ("", 0)]
    return first if most >= _MIN_WORDS and most >= 1.5 * second else ""
