"""The files of a checkpoint directory in Hugging Face's layout: JSON objects, and the safetensors files.  No torch."""

from __future__ import annotations

import glob
import json
import os
from typing import Any

from minisgl.errors import UserError


def read_json(path: str) -> dict[str, Any]:
    """A JSON file that must hold an object.  Raises UserError naming it."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"{path}: cannot read it: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}).") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, holds a {type(value).__name__}.")
    return value


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(path: str) -> list[str]:
    """The *.safetensors files of a directory: those of its index, else model.safetensors, else all.  Raises UserError."""
    index = os.path.join(path, INDEX)
    if not os.path.isfile(index):
        single = os.path.join(path, SINGLE)
        return [single] if os.path.isfile(single) else sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and os.path.basename(n) == n for n in names.values()):
        raise UserError(f"{index}: weight_map should map tensor names to file names in the same directory.")
    return [os.path.join(path, n) for n in sorted(set(names.values()))]
