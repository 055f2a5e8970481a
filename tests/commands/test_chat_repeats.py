"""Answers that go in circles are noticed, and texts that people want are not."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest

from minisgl.commands.chat_repeats import Repeats, repeated

ROOT = Path(__file__).parents[2]


def noticed_at(text: str, rng: random.Random) -> int | None:
    """How many characters of a text are read, in pieces of random length, until it is noticed."""
    repeats, at = Repeats(), 0
    while at < len(text):
        n = rng.randint(1, 12)
        if repeats.add(text[at : at + n]):
            return at + n
        at += n
    return None


def sentence(rng: random.Random, characters: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + " .,\n*|é漢", k=characters - 1)) + "x"


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_repeated_is_noticed_soon(seed: int) -> None:
    rng = random.Random(seed)
    circle, before = sentence(rng, rng.choice([1, 2, 7, 40, 150, 400])), sentence(rng, rng.choice([1, 5000]))
    text = before + circle * 5000
    at = noticed_at(text, rng)
    assert at is not None
    words = len(set(circle)) > 1
    assert at - len(before) <= max(1200 if words else 4800, 12 * len(circle)) + 64 + 24
    surplus = repeated(text)
    assert text[:-surplus].endswith(circle)  # one copy stays
    assert text[-surplus:] == (circle * 5000)[-surplus:]


@pytest.mark.parametrize("seed", range(10))
def test_a_circle_with_one_change_in_it_is_none(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice([60, 100, 300])
    line = sentence(rng, n)
    changed = line[: n // 2] + "\0" + line[n // 2 + 1 :]
    assert noticed_at((line * 8 + changed) * 6, rng) is None
    assert noticed_at("".join(f"{i}. {line}\n" for i in range(100, 160)), rng) is None


def files() -> list[Path]:
    return [path for kind in ("*.py", "*.md", "*.c", "*.h", "*.cfg", "*.txt") for path in ROOT.glob(f"[!.]*/**/{kind}")]


def test_code_and_documents_do_not_repeat_themselves() -> None:
    found = files()
    assert len(found) > 100
    for path in found:
        text = path.read_text(encoding="utf-8", errors="replace")
        for end in range(64, len(text), 2000):  # a window of what the chat looks at
            assert not repeated(text[max(0, end - 4800) : end]), (path, end)


REAL = {
    "a table": "| name | value | unit |\n|---|---|---|\n" + "".join(f"| row {i} | {i * 7 % 10} | kg |\n" for i in range(300)),
    "a table with equal rows": "| yes | no |\n" * 80,
    "a list": "".join(f"- item {i}: to be done\n" for i in range(400)),
    "a matrix of zeros": "\n".join(["0, " * 16] * 64),
    "a rule": "-" * 2000,
    "dots": "Chapter 1 " + "." * 3000 + " 5\n",
    "an identity matrix": "\n".join(" ".join("1" if i == j else "0" for j in range(40)) for i in range(40)),
    "code": "".join(f"    if x == {i}:\n        return names[{i}]\n" for i in range(300)),
    "closing brackets": '{"a": ' * 200 + "1" + "}" * 200,
    "a song": ("Row, row, row your boat\nGently down the stream\n" * 4 + "Merrily, merrily\n") * 5,
    "a multiplication table": "".join(f"{a} x {b} = {a * b}\n" for a in range(1, 30) for b in range(1, 30)),
    "indentation": "\n".join(" " * 400 + "x = 1" for _ in range(8)),
    "a chessboard": "\n".join(["# . " * 8, ". # " * 8] * 8),
    "base64 of zeros": "AAAAAAAAAAAA" * 300 + "==",
}


@pytest.mark.parametrize("name", REAL)
def test_tables_code_lists_and_songs_are_not_cut(name: str) -> None:
    assert noticed_at(REAL[name], random.Random(0)) is None
