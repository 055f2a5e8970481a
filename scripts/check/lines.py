"""Lines of code by room: what a reader has to read, without blank lines, comments and docstrings.

    .venv/bin/python scripts/check/lines.py [FOLDER]

The rooms are the folders of minisgl/; docs/structures.md says which are core, and a test compares its numbers with these.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

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


def lines_by_room(package: Path) -> Counter[str]:
    """Folder relative to `package` ("" for its root) -> lines of code of the Python files in it."""
    count: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        folder = path.parent.relative_to(package)
        count["/".join(folder.parts)] += code_lines(path)
    return count


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "minisgl"
    count = lines_by_room(package)
    for room, n in sorted(count.items()):
        print(f"{n:6}  {room or '(root)'}")
    print(f"{sum(count.values()):6}  in all")


if __name__ == "__main__":
    main()
