"""Count the lines that a reader has to read, by room and by file, and keep the numbers in the documents true.

    .venv/bin/python scripts/check/lines.py [FOLDER]     # the rooms of FOLDER (minisgl/)
    .venv/bin/python scripts/check/lines.py --write      # put today's numbers into README.md and docs/structures.md

A room is a folder of minisgl/ or, where docs/structures.md has a row for them, some of its modules.  Rooms count lines of code:
without blank lines, comments and docstrings.  The reader's path of README.md counts the lines of whole files.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAP, PATH = ROOT / "docs/structures.md", ROOT / "README.md"
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def code_lines(path: Path) -> int:
    """Lines of one Python file that hold code."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def modules(package: Path) -> dict[str, Path]:
    """Name relative to `package` -> file: "cache.radix", a folder's __init__ as "cache", that of `package` as "__init__"."""
    out = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        out[name.removesuffix(".__init__")] = path
    return out


def room_of(name: str, patterns: dict[str, str]) -> str:
    """The room of a module, by the longest pattern that matches it.  Raises KeyError where none does."""
    matching = [p for p in patterns if fnmatch(name, p) or fnmatch(name + ".x", p)]
    if not matching:
        raise KeyError(f"{name} is in no room of docs/structures.md")
    return patterns[max(matching, key=len)]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Markdown tables: first header cell -> rows of cells."""
    out: dict[str, list[list[str]]] = {}
    head = ""
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = cells[0]
            out.setdefault(head, [])
        elif set(cells[0]) != {"-"}:
            out[head].append(cells)
    return out


def patterns() -> dict[str, str]:
    """Pattern of module names -> room, from the table of who imports whom."""
    return {p: row[0] for row in tables(MAP.read_text())["imports"] for p in row[1].split()}


def lines_by_room(package: Path = ROOT / "minisgl") -> Counter[str]:
    """Room -> lines of code."""
    count: Counter[str] = Counter()
    known = patterns()
    for name, path in modules(package).items():
        count[room_of(name, known)] += code_lines(path)
    return count


def lines_by_kind() -> Counter[str]:
    """Kind of a room as the map has it ("core", "core, GPU", "periphery") -> lines of code."""
    count: Counter[str] = Counter()
    lines = lines_by_room()
    for room, _, _, kind, *_ in tables(MAP.read_text())["room"]:
        count[kind] += lines[room]
    return count


def with_todays_numbers(path: Path) -> str:
    """The text of a document with the numbers in its tables of rooms and files as they are today."""
    rooms, kinds, out, head = lines_by_room(), lines_by_kind(), [], ""
    for line in path.read_text().splitlines():
        first = line.strip("|").split("|")[0].strip().strip("`").partition("](")[0].removeprefix("[")
        n = None
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = first
        elif head == "room":
            n = rooms.get(first)
        elif head == "kind":
            n = kinds.get(first)
        elif head == "file" and (ROOT / "minisgl" / first).is_file():
            n = len((ROOT / "minisgl" / first).read_text().splitlines())
        out.append(line if n is None else re.sub(r"\| *[\d,]+ *\|", f"| {n:,} |", line, count=1))
    return "\n".join(out) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        for path in (MAP, PATH):
            path.write_text(with_todays_numbers(path))
        return
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "minisgl"
    count: Counter[str] = Counter()
    for name, path in modules(package).items():
        count[name.rpartition(".")[0] if path.name != "__init__.py" else name] += code_lines(path)
    for folder, n in sorted(count.items()):
        print(f"{n:6}  {folder.replace('.', '/') or '(root)'}")
    print(f"{sum(count.values()):6}  in all")


if __name__ == "__main__":
    main()
