"""The taps of `minisgl selfcheck` around the GPU worker's layers, run by Triton's interpreter: they see what the CPU's see."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on a GPU `minisgl selfcheck` itself does this", allow_module_level=True)
import numpy as np
from test_cuda_steps import PAGES, Interpreted
from tiny_models import config_for, save_qwen3

from minisgl.plan import StepPlan, StepResult
from minisgl.selfcheck.probe import _Probe, observe


class InterpretedRunner(Interpreted):
    """The interface of CudaRunner, as far as the probe needs it."""

    def _spy(self, model: Any) -> Any:
        self._model = model
        return model

    def max_pages(self) -> int:
        return PAGES

    def allocate(self, num_pages: int) -> None:
        assert num_pages == PAGES

    def launch(self, plan: StepPlan) -> Any:
        tokens = np.array(self.run(plan), np.int32)

        class Pending:
            def result(self) -> StepResult:
                return StepResult(plan.step, tokens)

        return Pending()


def test_layers_on_a_gpu_are_watched_like_those_on_a_cpu(tmp_path: Path) -> None:
    save_qwen3(tmp_path)
    config = config_for(tmp_path, kv_tokens=4 * PAGES)
    prompt = [int(t) for t in np.random.default_rng(2).integers(0, 203, 13)]
    theirs = observe(config, [prompt], 3)
    ours = _Probe(InterpretedRunner(tmp_path, graphs=False), config).sequence(prompt, 3)
    assert ours["tokens"].tolist() == theirs["0.tokens"].tolist()
    for way, rows in (("decode", 15), ("prefill", 15), ("cached", 11)):
        hidden, logits = ours[f"{way}.hidden"], ours[f"{way}.logits"]
        assert hidden.shape == (3, rows, 48)
        assert torch.allclose(hidden, theirs[f"0.{way}.hidden"], atol=1e-4, rtol=1e-4)
        assert torch.allclose(logits, theirs[f"0.{way}.logits"], atol=1e-4, rtol=1e-4)
