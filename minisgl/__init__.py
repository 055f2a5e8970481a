"""Serves large language models: a compact, transparent inference engine on an actor runtime.

The public names are imported on first use, so that `import minisgl` (and `python -m minisgl --help`) costs milliseconds and
never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minisgl.version import __version__

__all__ = ["LLM", "BatchClient", "PromptError", "RequestError", "SamplingParams", "UserError", "__version__"]
_MODULES = {
    **{"LLM": "minisgl.llm", "PromptError": "minisgl.llm", "BatchClient": "minisgl.client.batch_client"},
    **{"SamplingParams": "minisgl.sampling_params", "RequestError": "minisgl.errors", "UserError": "minisgl.errors"},
}

if TYPE_CHECKING:
    from minisgl.client.batch_client import BatchClient
    from minisgl.errors import RequestError, UserError
    from minisgl.llm import LLM, PromptError
    from minisgl.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not: for completion in notebooks and shells."""
    return sorted({*globals(), *__all__})
