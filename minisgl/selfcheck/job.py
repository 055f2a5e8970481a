"""Runs one job of `minisgl selfcheck`: `python -m minisgl.selfcheck.job PARENT probe FOLDER RANK`, or `reference FOLDER`.

A job is a file in FOLDER, its result another; the job ends with the process PARENT.  torch is imported after the job is read,
because the number of its threads must be set before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisgl.config import Config, EngineConfig, ModelSpec, RopeScaling, SamplingDefaults, WeightFormat
from minisgl.errors import UserError
from minisgl.lifeline import die_with_parent
from minisgl.model.common.host import prepare_environment, threads_per_rank

FAILED = 3  # exit code when a sentence on stderr says why
_FILE = "job.json"


def write_job(folder: Path, config: Config, prompts: Sequence[Sequence[int]], generate: int) -> None:
    """Write a job: `generate` greedy tokens after each prompt; 0: the prompts are full sequences, computed in one step."""
    spec, engine = asdict(config.model), asdict(config.engine)
    folder.mkdir(exist_ok=True)
    (folder / _FILE).write_text(json.dumps({"spec": spec, "engine": engine, "prompts": prompts, "generate": generate}))


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON with its lists as tuples, which dataclasses of the configuration hold."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def read_spec(values: dict[str, Any]) -> ModelSpec:
    """The inverse of `dataclasses.asdict`."""
    parts = {"rope_scaling": RopeScaling, "weight_format": WeightFormat, "generation": SamplingDefaults}
    return ModelSpec(**values | {name: part(**values[name]) for name, part in parts.items() if values[name] is not None})


def work(kind: str, folder: str, rank: str = "0") -> None:
    """Do the job in `folder`: rank 0 writes `probe.safetensors`, or the reference `reference.safetensors`.

    Raises UserError for an unusable checkpoint.
    """
    job = json.loads((Path(folder) / _FILE).read_text(), object_hook=with_tuples)
    config = Config(read_spec(job["spec"]), EngineConfig(**job["engine"]))
    prepare_environment(threads_per_rank(config.engine))
    if kind == "probe":
        from minisgl.selfcheck.probe import probe

        probe(folder, config, job["prompts"], job["generate"], int(rank))
    else:
        from minisgl.selfcheck.reference import reference

        reference(folder, config, job["prompts"])


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    try:
        work(*sys.argv[2:])
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(FAILED)
