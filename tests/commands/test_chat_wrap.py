"""The terminal chat breaks lines between words, however the text is cut into pieces, and loses no character."""

from __future__ import annotations

import random
import textwrap

import pytest

from minisgl.commands.chat_terminal import Terminal
from minisgl.commands.chat_wrap import Wrap, columns

TEXT = "In the heart of the medieval fantasy world, a dragon named Zorro roamed the land; his scales glistened with gold. " * 3


def shown(text: str, width: int, seed: int = 0) -> str:
    """A text as it stands on the terminal when it comes in pieces of random lengths."""
    rng, wrap, at, out = random.Random(seed), Wrap(lambda: width), 0, ""
    while at < len(text):
        n = rng.randrange(1, 7)
        out += wrap.add(text[at : at + n])
        at += n
    return out + wrap.end()


@pytest.mark.parametrize("width", [20, 33, 40, 79, 80, 200])
@pytest.mark.parametrize("seed", range(5))
def test_no_word_is_broken_and_lines_are_as_long_as_they_can_be(width: int, seed: int) -> None:
    found = shown(TEXT, width, seed)
    assert [line.rstrip() for line in found.splitlines()] == textwrap.wrap(
        TEXT, width, break_long_words=False, break_on_hyphens=False
    )
    assert max(map(columns, found.splitlines())) <= width


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_or_added_but_line_ends(seed: int) -> None:
    rng = random.Random(seed)
    words = ["a", "Berlin", "漢字", "x" * 50, "naïve", "e\u0301", "\n", "\n\n", "| a | b |", "```", "tab\t", "  "]
    text = " ".join(rng.choice(words) for _ in range(60))
    width = rng.choice([10, 24, 80])
    found = shown(text, width, seed)
    assert "".join(found.split()) == "".join(text.split())
    assert found.count("\n") >= text.count("\n")


def test_code_and_tables_keep_their_lines() -> None:
    code = "before\n```python\n" + "x = 1; " * 20 + "\n```\n| " + "cell | " * 20 + "\nafter"
    assert shown(code, 30) == code
    assert "\n" in shown("after " * 20, 30)


def test_a_word_far_from_the_edge_is_shown_as_it_comes() -> None:
    wrap = Wrap(lambda: 80)
    assert [wrap.add(piece) for piece in ("He", "llo", " wor", "ld")] == ["He", "llo", " wor", "ld"]
    wrap.add("x" * 40 + " " + "y" * 20 + " ")
    assert wrap.add("Dampf") == ""
    assert wrap.add("schiff ") == "\nDampfschiff "


def test_wide_characters_take_two_columns() -> None:
    assert shown("漢" * 12, 10) == "漢漢漢漢漢\n漢漢漢漢漢\n漢漢"


def test_a_text_as_long_as_a_line_needs_no_break() -> None:
    assert shown("abcde fghij\nklmno", 11) == "abcde fghij\nklmno"
    assert shown("abcde fghij klmno", 11) == "abcde fghij\nklmno"


def test_what_is_no_terminal_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(interactive=False)
    terminal.write(TEXT)
    terminal.end_answer()
    assert capsys.readouterr().out == TEXT + "\n"


def test_a_thought_ends_before_the_answer_begins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal(interactive=True)
    for piece in ("I have to think about", " this for a wh", "ile"):
        terminal.think(piece)
    terminal.write("The answer is a long one, of more than a li")
    terminal.write("ne.")
    terminal.end_answer()
    assert capsys.readouterr().out == (
        "[thought] I have to think \nabout this for a while [/thought]\nThe answer is a long one, of \nmore than a line.\n"
    )
