"""A server of our own for as long as a script needs one.  Imported by other scripts; not a command.  No package is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def live_server(*flags: str) -> Iterator[str]:
    """Its address, http://host:port, when it is ready.  What it says goes to stderr.  Raises RuntimeError if it ends before."""
    with subprocess.Popen(
        [sys.executable, "-m", "minisgl", "--port", "0", *flags], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        reader = None
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                if line.startswith("ready"):
                    break
            else:
                raise RuntimeError("the server ended before it was ready; see its message above")
            reader = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True)
            reader.start()
            yield line.split()[4].removesuffix("/v1")
        finally:
            process.terminate()
            process.wait(30)
            if reader is not None:  # its pipe is closed next
                reader.join(5)
