"""Degenerate output is detected; sound answers that compress like loops are not."""

from __future__ import annotations

import json
import zlib

import pytest

from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.records.conversation import Generation

CITIES = "मुंबई दिल्ली जयपुर आगरा वाराणसी कोलकाता चेन्नई बेंगलुरु हैदराबाद अमृतसर उदयपुर गोवा शिमला मैसूर"
SIGHTS = (
    "पुराने किले|बड़े बाज़ार|शांत झीलें|सुंदर बगीचे|ऊँचे पहाड़|मीठे पकवान|प्राचीन मंदिर|चौड़ी सड़कें|"
    "रंगीन मेले|ठंडी हवा|नाव की सवारी|समुद्र तट|छोटी रेलगाड़ी|मछली के जाल"
)
NAMES = ["Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry"]
USERS = [
    {"id": i, "name": name, "email": f"{name.lower()}@example.com", "role": "user", "active": i % 3 != 0}
    for i, name in enumerate(NAMES, 1)
]
SOUND = {
    "Hindi": "\n".join(
        f"{i}. {city}: यह शहर अपने {sight} के लिए प्रसिद्ध है।"
        for i, (city, sight) in enumerate(zip(CITIES.split(), SIGHTS.split("|"), strict=True), 1)
    ),
    "JSON": json.dumps(USERS, indent=2),
    "deep JSON": json.dumps({"data": {"users": USERS}}, indent=4),
    "fenced JSON": f"Here they are:\n\n```json\n{json.dumps(USERS, indent=4)}\n```",
}
LOOPS = {
    "words": "the cat " * 40,
    "a sentence": "The bridge is old and its stones are worn. " + "I cannot discuss politics. " * 24,
    "Hindi": "मुझे खेद है। " * 12,
    "Arabic": "شركب الأخصرين" + " الأخصرين" * 10,
    "Chinese": "我不能讨论这个。" * 20,
    "counted": "".join(f"{i}. I cannot discuss politics.\n" for i in range(1, 25)),
    "digits": "0" * 200,
    "JSON": "[" + ", ".join(f'{{"id": {i}, "name": "Alice", "age": 28}}' for i in range(1, 12)),
    "late": "The bridge was built by three towns, which each paid a third of what its stones had cost, and "
    "for a hundred years nobody else crossed the river anywhere near it. " + "Its stones are worn. " * 12,
    "late, in Chinese": "这座桥是三个城镇一起修建的，每个城镇都付了三分之一的石料钱。"
    + "石头已经磨损，" * 12,
    "code": "```python\n" + "    print('Hello, world!')\n" * 12,
}


def degenerate(text: str, tokens: list[int]) -> bool:
    return is_degenerate(Generation(tokens, text, True))


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_a_list_that_compresses_is_no_loop(text: str) -> None:
    data = text.encode()
    assert len(zlib.compress(data, 9)) < 0.25 * len(data), "the case shows nothing: it does not compress"
    assert not degenerate(text, [])


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_a_loop(text: str) -> None:
    assert degenerate(text, [])


@pytest.mark.parametrize(
    ("text", "tokens", "looped"),
    [
        ("Yes", [7], False),
        ("la la la la", [4] * 11, False),  # A short repetition may be intended.
        ("la la la la", [4] * 12, True),
        ("la li la li", [4, 5] * 6, True),
        ("la li lo la", [4, 5, 6] * 4, False),
        ("Well, la li la li", [1, 2, *[4, 5] * 6], True),
    ],
)
def test_two_tokens_that_fill_the_end(text: str, tokens: list[int], looped: bool) -> None:
    assert degenerate(text, tokens) is looped
