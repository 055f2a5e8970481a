"""The field's terms stay where they are: no symbol that had a private name gets it back in the place where it was."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minisgl"

# (place below minisgl/, the private name, what it is called instead)
SYMBOLS = [
    ("actors/scheduler", "Limits", "SchedulerLimits"),
    ("actors/scheduler/step_machine.py", "lag", "max_steps_in_flight"),
    ("actors/scheduler", "known_first", "grammar_waits_for_token"),
    ("actors/scheduler", "share", "wait_for_shared_prefix"),
    ("actors/scheduler", "News", "Tokens"),
    ("actors/scheduler", "ScoreNews", "TokenLogprobs"),
    ("actors/scheduler", "Scored", "ExpectedLogprobs"),
    ("actors/scheduler", "bound", "has_grammar, grammar_rows"),
    ("actors/scheduler", "passed", "overtaken_by"),
    ("actors/scheduler", "need", "missing_pages"),
    ("actors/scheduler/slot_table.py", "extra", "sampling_extra"),
    ("plan.py", "joins", "new_slots"),
    ("plan.py", "grants", "page_grants"),
    ("plan.py", "PREPARE", "CAPTURE"),
    ("plan.py", "Scores", "StepLogprobs"),
    ("actors/messages.py", "Scores", "TokenLogprobs"),
    ("actors/messages.py", "MayPrepare", "MayCapture"),
    ("actors/worker.py", "prepare", "capture_ahead"),
    ("model", "Scored", "DeviceLogprobs"),
    ("model/cuda/attention", "Heads", "AttentionSpec"),
    ("model/common", "Rows", "Activations"),
    ("model/common", "Batch", "StepBatch"),
    ("model/common", "Blocks", "LayerFactory"),
    ("model/common/interfaces.py", "whole", "no_partial_sums"),
    ("model/common/interfaces.py", "last", "is_lm_head, plain_output"),
    ("model/cuda/layers.py", "whole", "no_partial_sums"),
    ("model", "OracleRunner", "FakeRunner"),
    ("api", "told", "render, encode"),
    ("api", "deliver", "on_chunk"),
    ("api", "Deliver", "OnChunk"),
    ("api", "TakeIds", "OnIds"),
]
FILES = """
model/cpu/choice model/cpu/stored model/cpu/packed model/cuda/bound model/cuda/steps model/cuda/blocks
model/kernels/heads model/kernels/layer model/kernels/linear model/kernels/rows model/kernels/widen
model/kernels/restrict model/kernels/score model/kernels/adjust api/door api/pipe api/serving api/replies
api/constraints api/conversation api/native api/translate actors/thoughts
"""


def names_in(path: Path) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize(("place", "old", "new"), SYMBOLS)
def test_a_private_name_does_not_come_back(place: str, old: str, new: str) -> None:
    path = PACKAGE / place
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        assert old not in names_in(file), f"{file.relative_to(PACKAGE)} says {old}; the field's term is {new}"


@pytest.mark.parametrize("name", FILES.split())
def test_a_private_file_name_does_not_come_back(name: str) -> None:
    assert not (PACKAGE / f"{name}.py").exists()
