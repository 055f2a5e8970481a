"""Scans a call in Python's syntax, f(city="Ulm", days=[1, None]), character by character, and gives its arguments as JSON.

Values are literals: strings, numbers, lists, tuples, dictionaries, True, False and None, also in JSON's spelling.  A word that
is none of them becomes a string.  Pure; runs in the api process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

_SPACE = " \n\t\r"
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")  # of JSON
_PREFIX = re.compile(r"[rRbBuUfF]{1,2}")  # of a string
_SIMPLE = dict(zip("ntrbfav", "\n\t\r\b\f\a\v", strict=True)) | {c: c for c in "\\'\""} | {"\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}  # hexadecimal digits
_MOST = 4096  # characters of a word


class PythonScan:
    """Scans the arguments of a call of `name`, from their opening bracket on.  `parameters`: names of positional arguments.

    `named`, `done`, `failed`, `unread`, `in_string`: as in ObjectScan; text in `unread` is to be fed again.  `exact`: all words
    so far are literals.
    """

    def __init__(self, name: str, parameters: Sequence[str] = ()) -> None:
        self.name, self.named = name, True
        self.done = self.failed = False
        self.unread = ""
        self.exact = True
        self._parameters = parameters
        self._open: list[str] = []  # the brackets that close those open
        self._counts: list[int] = []  # entries so far, of each of them
        self._phase = "call"  # before: the call's bracket | an entry | a colon | a value | a comma; in: word | quotes | string
        self._key = False  # the string or word is a key
        self._waits = False  # a key has gone out, its value not yet
        self._word = ""
        self._quote, self._quotes, self._raw = "", 0, False  # the quote of a string, how many there are, whether \ is itself
        self._escape = ""  # an escape sequence so far
        self._seen = 0  # quotes in a row, in a string

    @property
    def in_string(self) -> bool:
        return self._phase in ("quotes", "string")

    def feed(self, c: str) -> str:
        """Take the next character; returns the part of the arguments that may go out now."""
        if self._phase == "string":
            return self._string(c)
        if self._phase == "quotes":
            return self._opened(c)
        if self._phase == "word":
            return self._in_word(c)
        if c in _SPACE:
            return ""
        if self._phase == "call":
            return self._push(c) if c == "(" else self._fail(c)
        if c in ")]}" and self._phase in ("entry", "comma"):
            return self._close(c)
        if self._phase in ("comma", "colon"):
            if c != (":" if self._phase == "colon" else ","):
                return self._fail(c)
            out, self._phase = (": ", "value") if c == ":" else ("", "entry")
            return out
        if c in ")]},:=":
            return self._fail(c)
        self._key = self._phase == "entry" and self._open[-1] == "}"
        if c in _CLOSERS:
            return self._fail(c) if self._key else self._begin() + self._push(c)
        if c in "'\"":
            return self._begin() + self._begin_string(c, raw=False)
        self._word, self._phase = c, "word"
        return ""

    def mend(self) -> str:
        """End the call here: close what is open; returns the rest of the arguments."""
        out = ""
        if self.in_string:
            out += self._escaped() + self._end_string()
        elif self._phase == "word":
            out += self._end_word()
        if self._waits:  # a key has gone out
            out += ": null" if self._phase == "colon" else "null"
            self._waits = False
        while self._open:
            out += self._pop()
        self.done = True
        return out or ("{}" if self._phase == "call" else "")

    # ---------------- containers
    def _begin(self) -> str:
        """What stands before a value: a comma, and the name of a positional argument."""
        if self._waits:
            self._waits = False
            return ""
        out = ", " if self._counts[-1] else ""
        self._counts[-1] += 1
        if len(self._open) == 1:
            at = self._counts[0] - 1
            out += json.dumps(self._parameters[at] if at < len(self._parameters) else f"arg{at}", ensure_ascii=False) + ": "
        return out

    def _push(self, c: str) -> str:
        self._open.append(_CLOSERS[c])
        self._counts.append(0)
        self._phase = "entry"
        return "{" if c == "{" or len(self._open) == 1 else "["

    def _pop(self) -> str:
        closer = self._open.pop()
        self._counts.pop()
        self._phase, self.done = "comma", not self._open
        return "}" if closer == "}" or not self._open else "]"

    def _close(self, c: str) -> str:
        """A closing bracket: those that are open inside of it are closed before it, all if it is none of them."""
        if c not in self._open:
            self.unread = c
        out = ""
        while self._open and self._open[-1] != c:
            out += self._pop()
        return out + (self._pop() if self._open else "")

    def _fail(self, c: str) -> str:
        """What cannot be read ends the call; it is closed so that what went out is JSON."""
        self.failed, self.exact = True, False
        out = self.mend()
        self.unread = c
        return out

    # ---------------- words
    def _in_word(self, c: str) -> str:
        if c in "'\"" and _PREFIX.fullmatch(self._word):
            raw, self._word = "r" in self._word.lower(), ""
            return self._begin() + self._begin_string(c, raw=raw)
        if c == "=" and len(self._open) == 1 and not self._waits:
            return self._keyword()
        if c not in ",)]}:=([{'\"" and len(self._word) < _MOST:
            self._word += c
            return ""
        if c in "=([{'\"" or len(self._word) >= _MOST:
            return self._fail(c)
        return self._end_word() + self.feed(c)

    def _keyword(self) -> str:
        out = (", " if self._counts[0] else "") + json.dumps(self._word.strip(), ensure_ascii=False) + ": "
        self._counts[0] += 1
        self._word, self._phase, self._waits = "", "value", True
        return out

    def _end_word(self) -> str:
        text, self._word = self._literal(self._word.strip()), ""
        out = self._begin() + (json.dumps(text) if self._key and text[0] != '"' else text)
        self._ended()
        return out

    def _literal(self, word: str) -> str:
        if word in _WORDS:
            return _WORDS[word]
        if _NUMBER.fullmatch(word):
            return word
        if len(word) < 100 and re.match(r"[+-]?\.?[0-9]", word):
            for kind in (lambda w: int(w, 0), int, float):
                try:
                    return json.dumps(kind(word), allow_nan=False)
                except ValueError:
                    pass
        self.exact = False
        return json.dumps(word, ensure_ascii=False)

    def _ended(self) -> None:
        """A key or a value has ended."""
        self._phase = "colon" if self._key else "comma"
        self._waits, self._key = self._key, False

    # ---------------- strings
    def _begin_string(self, quote: str, *, raw: bool) -> str:
        self._quote, self._quotes, self._raw, self._phase = quote, 1, raw, "quotes"
        return '"'

    def _opened(self, c: str) -> str:
        """Behind the first quote: two more begin a long string, one is the end of an empty one."""
        if c == self._quote:
            self._quotes += 1
            if self._quotes == 3:
                self._phase = "string"
            return ""
        if self._quotes == 2:
            self.unread = c
            return self._end_string()
        self._phase = "string"
        return self._string(c)

    def _string(self, c: str) -> str:
        if self._escape:
            return self._in_escape(c)
        if c == self._quote:
            self._seen += 1
            return self._end_string() if self._seen == self._quotes else ""
        held, self._seen = self._quote * self._seen, 0
        if c == "\\" and not self._raw:
            self._escape = c
            return _escape(held)
        return _escape(held + c)

    def _in_escape(self, c: str) -> str:
        so_far, kind = self._escape, self._escape[1:2]
        if not kind and c in _SIMPLE:
            self._escape = ""
            return _escape(_SIMPLE[c])
        if (not kind and c in "01234567xuU") or (kind and kind in _CODES and c in "0123456789abcdefABCDEF"):
            self._escape += c
            full = kind and kind in _CODES and len(self._escape) == 2 + _CODES[kind]
            return self._escaped() if full else ""
        if kind and kind in "01234567" and c in "01234567" and len(so_far) < 4:
            self._escape += c
            return ""
        if not kind:  # no escape sequence, as in Python
            self._escape = ""
            return _escape(so_far + c)
        return self._escaped() + self._string(c)

    def _escaped(self) -> str:
        """The escape sequence that has ended."""
        text, self._escape = self._escape, ""
        kind, digits = text[1:2], text[2:]
        if kind == "u" and len(digits) == 4:
            return text  # also half of a surrogate pair: JSON means the same
        if kind and kind in _CODES and len(digits) == _CODES[kind] and int(digits, 16) < 0x110000:
            return json.dumps(chr(int(digits, 16)))[1:-1]
        if kind and kind in "01234567":
            return _escape(chr(int(text[1:], 8)))
        return _escape(text)

    def _end_string(self) -> str:
        self._seen = 0
        self._ended()
        return '"'


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def literal(text: str) -> str | None:
    """The JSON text of one Python literal, None if the text is none."""
    scan = PythonScan("")
    out = []
    pending = list(reversed(f"(({text}),)"))  # the only entry of a tuple
    while pending and not (scan.done or scan.failed):
        out.append(scan.feed(pending.pop()))
        pending += reversed(scan.unread)
        scan.unread = ""
    if pending or scan.failed or not scan.exact or not scan.done:
        return None
    value = json.loads("".join(out))
    alone = value.keys() == {"arg0"} and len(value["arg0"]) == 1
    return json.dumps(value["arg0"][0], ensure_ascii=False) if alone else None
