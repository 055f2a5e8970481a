"""Serves large language models: a compact, transparent inference engine on an actor runtime.

The public names are imported on first use, so that `import minisgl` (and `python -m minisgl --help`) costs milliseconds and
never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minisgl.version import __version__

__all__ = ["LLM", "BatchClient", "SamplingParams", "__version__"]
_MODULES = {"LLM": "minisgl.llm", "SamplingParams": "minisgl.sampling_params", "BatchClient": "minisgl.client.batch_client"}

if TYPE_CHECKING:
    from minisgl.client.batch_client import BatchClient
    from minisgl.llm import LLM
    from minisgl.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
