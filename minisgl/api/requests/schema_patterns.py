"""Translates regular expressions of JSON schemas (ECMA-262) to the syntax of the grammar library (Rust's crate regex).

Pure; runs in the api process.
"""

from __future__ import annotations

import re

# The tokens that the two read differently; everything else is one character that means the same.
_TOKEN = re.compile(
    r"""
    (?P<class>\[\^?\]|\[(?:\\.|[^\]\\])*\])       # [^] and [] are classes of their own
  | (?P<group>\(\?(?:[a-zA-Z]*-?[a-zA-Z]*[:)]|P?<[A-Za-z_]\w*>))
  | (?P<none>\(\?|\\[1-9]|\\[kK]<|\\[bBGX]|\\u[dD][89a-fA-F])
  | (?P<escape>\\c[A-Za-z]|\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[pP]\{[^}]*\}|\\.)
  | (?P<count>\{[0-9]+(?:,[0-9]*)?\})
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SAME = set("dDwWsSnrtfvAz")  # letters that mean the same behind a backslash


def translate(pattern: str) -> str | None:
    """The expression in the library's syntax; None if it has no form there (look-around, references to groups)."""
    out = []
    for match in _TOKEN.finditer(pattern):
        text = match[0]
        if match["none"]:
            return None
        if match["escape"]:
            text = _escape(text)
        elif match["class"]:
            if text == "[]":
                return None
            text = _class(text)
        elif text == "{":
            text = r"\{"
        out.append(text)
    return "".join(out)


def _escape(text: str) -> str:
    c = text[1:2]
    if c == "c" and len(text) == 3:
        return f"\\x{ord(text[2]) % 32:02x}"
    if c == "Z":  # Python's name for the end
        return r"\z"
    if c == "0":
        return r"\x00"
    if len(text) > 2 or c in _SAME or not c.isalnum():
        return text
    return c  # a letter that ECMA knows no escape of


def _class(text: str) -> str:
    """A class without what only the library knows: classes in classes, and operations on sets."""
    if text == "[^]":
        return r"[\s\S]"
    head = 2 if text.startswith("[^") else 1
    out = re.sub(r"\\c[A-Za-z]|\\u\{[^}]*\}|\\.|[\[&~-]", _in_class, text[head:-1] + "]", flags=re.DOTALL)
    return text[:head] + out


def _in_class(match: re.Match[str]) -> str:
    text = match[0]
    if text == "\\b":
        return r"\x08"
    if text.startswith("\\"):
        return text if text.startswith("\\u") else _escape(text)
    doubled = match.start() > 0 and match.string[match.start() - 1] == text  # && and its like are operations there
    return "\\" + text if text == "[" or doubled else text


def prefix(pattern: str) -> str | None:
    """The plain text with which everything that the pattern matches begins; None if there is none that is easy to see."""
    literal = re.match(r"\^((?:[\w :@/-]|\\[./_-])*)", pattern)
    if literal is None or "|" in pattern:
        return None
    text = literal[1]
    if pattern[literal.end() : literal.end() + 1] in ("*", "+", "?", "{"):  # counts the last character
        text = re.sub(r"\\?.\Z", "", text)
    return text.replace("\\", "") or None
