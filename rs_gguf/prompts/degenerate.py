"""Answers that are broken, whatever they say: empty, a loop, or in another language than the prompt.

A generation, or a prompt and the text of its answer, goes in; whether it is broken comes out. An answer may
be in another language because that was asked for (a translation), so switches are compared between two sides,
never counted as damage by themselves.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache

from rs_gguf.records.conversation import Generation, Prompt

_LOOP_BYTES, _LOOP_RATIO = 160, 0.25  # language compresses to 0.4 or more at such lengths
_LOOP_NEWS = 1 / 16  # bytes that a byte of a loop's second half adds: at most 0.055 was seen, of lists 0.07
_LOOP_WINDOW = 12  # tokens

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_LEAST_LETTERS = 20  # weighted; less may be a name or a number
_FOREIGN = 1 / 3  # of the letters
_LEAST_WORDS = 4

# A character of these carries about as much as three letters of an alphabet.
_HEAVY = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")

# Frequent words by which languages in Latin letters are told apart.
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
    """Empty, or a loop: the text repeats itself, or two tokens fill its end."""
    text = generation.text.strip()
    # Half of an answer may be said before it begins to loop.
    if not text or _repeats(text) or _repeats(text[len(text) // 2 :]):
        return True
    # A loop goes on to the end. Within an answer, rules of tables and long numbers are as uniform.
    end = generation.tokens[-_LOOP_WINDOW:]
    return len(end) == _LOOP_WINDOW and len(set(end)) <= 2


def _repeats(text: str) -> bool:
    """Whether a text compresses far better than language does, and its second half says nothing new.

    Lists compress as well, of like objects in JSON, or in a script whose characters take three bytes; each of
    their entries says something new. A number does not: loops may count their rounds.
    """
    data = text.encode("utf-8")
    if len(data) < _LOOP_BYTES or _compressed(data) >= _LOOP_RATIO * len(data):
        return False
    data = " ".join(re.sub(r"\d", "0", text).split()).encode("utf-8")
    half = len(data) // 2
    return _compressed(data) - _compressed(data[:half]) < _LOOP_NEWS * (len(data) - half)


def _compressed(data: bytes) -> int:
    return len(zlib.compress(data, 9))


def switches_language(prompt: Prompt, answer: str) -> bool:
    """Whether much of an answer is in a script or a language that its prompt does not use.

    Code blocks do not count. Between languages in Latin letters it goes by frequent words, and only for those
    that it knows; a short answer counts as none.
    """
    text = _CODE.sub(" ", answer)
    letters = _scripts(text)
    total = sum(letters.values())
    if total < _LEAST_LETTERS:
        return False
    own = _main_scripts(prompt.prompt)
    foreign = sum(count for script, count in letters.items() if script not in own)
    if own and foreign > _FOREIGN * total:
        return True
    asked = prompt.language if prompt.language in _WORDS else _language(_hits(prompt.prompt))
    hits = _hits(text)
    answered = _language(hits)
    return bool(asked and answered and asked != answered and 3 * hits[asked] <= hits[answered])


def _scripts(text: str) -> Counter[str]:
    """Letters by script, those of East Asia with the weight of three."""
    found: Counter[str] = Counter()
    for char, count in Counter(text).items():
        script = _script(char)
        found[script] += count * (3 if script in _HEAVY else 1)
    del found[""]
    return found


def _main_scripts(text: str) -> set[str]:
    """Scripts of a third of the letters or more. A name in another one does not make it the prompt's own."""
    found = Counter(script for char in text if (script := _script(char)))
    main = {script for script, count in found.items() if count >= _FOREIGN * found.total()}
    japanese = {"CJK", "HIRAGANA", "KATAKANA"}
    return main | japanese if main & {"HIRAGANA", "KATAKANA"} else main


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    if not char.isalpha():
        return ""
    return unicodedata.name(char, "?").split()[0].split("-")[0]


def _hits(text: str) -> Counter[str]:
    """How many of the frequent words of each language a text holds."""
    found: Counter[str] = Counter()
    for word in re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower()):
        found.update(_LANGUAGES_OF.get(word, ()))
    return found


def _language(hits: Counter[str]) -> str:
    """The language that the words point to, or nothing when they are few or point to two."""
    (first, most), (_, second), *_ = [*hits.most_common(2), ("", 0), ("", 0)]
    return first if most >= _LEAST_WORDS and most >= 1.5 * second else ""
