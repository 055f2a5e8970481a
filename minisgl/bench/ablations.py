"""The ablations: each switches off one optimisation of the engine, by one function that edits the setup of a run.

Where the engine has a setting for it (`--lag 1`, `--cache none`, ...) the function changes that; a decision of the scheduler
without one is taken out by a subclass in machines.py, so that the core needs no switches for experiments.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from minisgl.actors import spawn
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.bench import machines
from minisgl.bench.machines import AblatedScheduler, Edit
from minisgl.config import EngineConfig, flag, settings_of
from minisgl.errors import UserError


@dataclass(frozen=True, slots=True)
class Setup:
    """How the engine of a run is built: its configuration, and what the scheduler does otherwise than it says.

    `longest`: tokens of the longest request.  `fake`: there is no model.
    """

    engine: EngineConfig
    longest: int
    fake: bool = False
    edit: Edit = field(default_factory=Edit)

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords of LLM."""
        return {name: getattr(self.engine, name) for name, _, _ in settings_of(self.engine)}

    @property
    def make_scheduler(self) -> spawn.MakeScheduler:
        """What builds the scheduler, in its process."""
        if self.edit == Edit():
            return spawn.make_scheduler
        return functools.partial(AblatedScheduler, Edit(self.edit.machine, dict(self.edit.limits)))  # a plain dict crosses over

    def set(self, **values: Any) -> Setup:
        """The same with other settings of the engine.  Raises UserError."""
        return replace(self, engine=replace(self.engine, **values))

    def schedule(self, machine: type[StepMachine] | None = None, **limits: Any) -> Setup:
        """The same with another machine, or other limits of it."""
        return replace(self, edit=Edit(machine or self.edit.machine, {**self.edit.limits, **limits}))

    @property
    def changed(self) -> str:
        """What differs from the engine's defaults, as flags."""
        shown = [
            (flag(n), getattr(self.engine, n))
            for n, default, _ in settings_of(self.engine)
            if getattr(self.engine, n) != default
        ]
        return " ".join(f"{name} {value}" for name, value in shown)


Change = Callable[[Setup], Setup]


def _chunked(s: Setup) -> Setup:
    # The workers need room for the largest step; the scheduler keeps its budget.
    budget = s.engine.step_tokens
    return s.set(step_tokens=budget + s.longest).schedule(machines.WholePrompts, step_tokens=budget)


def _none(_: Setup) -> str:
    return ""


def _needs_cache(s: Setup) -> str:
    return "it reads the prefix cache, which --cache none has switched off" if s.engine.cache == "none" else ""


def _needs_cost_model(s: Setup) -> str:
    return "without --itl-target-ms the scheduler has no cost model" if s.engine.itl_target_ms == 0 else ""


def _needs_gpu(s: Setup) -> str:
    if s.fake:
        return "the fake engine has no model"
    return "CUDA graphs need a GPU, and this engine runs on the CPU" if s.engine.device != "cuda" else ""


def _needs_bits(s: Setup) -> str:
    if s.fake:
        return "the fake engine has no model"
    return "" if s.engine.eight_bits else "the weights are not quantised (--quantization)"


class Ablation(NamedTuple):
    """`term`: the field's word for the optimisation.  `off`: what the variant does instead.  `where`: module and symbol of the
    code that is ablated.  `inapplicable`: why it can not be ablated in a setup, "" if it can."""

    term: str
    off: str
    where: str
    change: Change
    inapplicable: Callable[[Setup], str] = _none


_MACHINE = "minisgl.actors.scheduler.step_machine"
ABLATIONS: dict[str, Ablation] = {
    "overlap": Ablation(
        "overlap scheduling",
        "each plan waits for the result of the one before (--lag 1)",
        f"{_MACHINE}:StepMachine.step",
        lambda s: s.set(lag=1),
    ),
    "radix": Ablation(
        "prefix cache",
        "every prompt is computed (--cache none)",
        "minisgl.cache.radix:RadixCache.match",
        lambda s: s.set(cache="none"),
    ),
    "chunked": Ablation(
        "chunked prefill",
        "a prompt is computed in one step, if need be beyond --step-tokens",
        f"{_MACHINE}:StepMachine._cut_chunk",
        _chunked,
    ),
    "mixed": Ablation(
        "mixed batches",
        "a step has prompts or decodes, prompts first",
        f"{_MACHINE}:StepMachine._plan",
        lambda s: s.schedule(machines.SeparateSteps),
    ),
    "order": Ablation(
        "cache-aware scheduling",
        "first come, first served, whatever is cached (--order arrival)",
        "minisgl.actors.scheduler.admission:Admission._next_candidate",
        lambda s: s.set(order="arrival"),
        _needs_cache,
    ),
    "share": Ablation(
        "sharing of prefixes in flight",
        "a prompt does not wait for pages that another request is computing",
        "minisgl.actors.scheduler.admission:Admission._is_being_computed",
        lambda s: s.schedule(wait_for_shared_prefix=False),
        _needs_cache,
    ),
    "pacing": Ablation(
        "prefill pacing",
        "prompts beside decodes take all of --step-tokens (--itl-target-ms 0)",
        "minisgl.actors.scheduler.step_cost:StepCosts.prefill_beside",
        lambda s: s.set(itl_target_ms=0.0),
        _needs_cost_model,
    ),
    "just-in-time": Ablation(
        "plans just in time",
        "a plan is published as early as --lag allows",
        "minisgl.actors.scheduler.step_cost:StepCosts.slack",
        lambda s: s.schedule(machines.EarlyPlans),
        _needs_cost_model,
    ),
    "graphs": Ablation(
        "CUDA graphs",
        "kernels are launched one by one (--graphs off)",
        "minisgl.model.cuda.graphs:Graphs",
        lambda s: s.set(graphs="off"),
        _needs_gpu,
    ),
    "quantized": Ablation(
        "quantised weights",
        "the model's own dtype (--quantization none)",
        "minisgl.model.cpu.quantized_layers:QuantizedLayers",
        lambda s: s.set(quantization="none"),
        _needs_bits,
    ),
}


class Variant(NamedTuple):
    """A setup that is compared with the base."""

    name: str
    setup: Setup


def variants(names: str, base: Setup) -> tuple[list[Variant], list[str]]:
    """The variants that --ablate names, and notes about what `all` leaves out.

    A name of ABLATIONS switches that off, `field=value` changes a setting, and `+` joins several.  Raises UserError for a name
    that there is not, or that cannot be ablated here.
    """
    if names.strip() == "all":
        reasons = {name: _why_not(name, base) for name in ABLATIONS}
        kept = [Variant(f"{name} off", ABLATIONS[name].change(base)) for name, why in reasons.items() if not why]
        return kept, [f"{name}: left out, {why}" for name, why in reasons.items() if why]
    found = [_variant(name, base) for name in filter(None, (part.strip() for part in names.split(",")))]
    if not found:
        raise UserError(f"--ablate: no name is given; there are {', '.join(ABLATIONS)}, setting=value, and all")
    if len({v.name for v in found}) < len(found):
        raise UserError("--ablate: a name is given twice")
    return found, []


def _variant(name: str, base: Setup) -> Variant:
    setup, words = base, []
    for part in (part.strip() for part in name.split("+")):
        key, equals, value = part.partition("=")
        if equals:
            after = changed(setup, key, value, "--ablate")
        elif part not in ABLATIONS:
            near = difflib.get_close_matches(part, ABLATIONS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(ABLATIONS)}, setting=value, and all"
            raise UserError(f"--ablate {part}: unknown; {meant}")
        elif why := _why_not(part, base):
            raise UserError(f"--ablate {part}: {why}")
        else:
            after = ABLATIONS[part].change(setup)
        if StepMachine not in (setup.edit.machine, after.edit.machine) and setup.edit.machine is not after.edit.machine:
            raise UserError(f"--ablate {name}: two of these are different schedulers; ablate them one by one")
        if after == setup:
            raise UserError(f"--ablate {name}: {part} changes nothing here")
        setup = after
        words.append(part if equals else f"{part} off")
    return Variant(" + ".join(words), setup)


def _why_not(name: str, base: Setup) -> str:
    ablation = ABLATIONS[name]
    return ablation.inapplicable(base) or ("it is off already" if ablation.change(base) == base else "")


def changed(base: Setup, key: str, text: str, where: str) -> Setup:
    """`base` with one setting of the engine, as its flag takes it.  `where`: the flag to name in errors.  Raises UserError."""
    kinds = {name: type(default) for name, default, _ in settings_of(EngineConfig)}
    name = key.strip().removeprefix("--").replace("-", "_")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        meant = f"did you mean {near[0]}?" if near else "the flags of the engine are those of `minisgl serve --help`"
        raise UserError(f"{where} {key}: there is no such setting; {meant}")
    try:
        value = kinds[name](text.strip())
    except ValueError:
        raise UserError(f"{where} {key}: {text.strip()!r} is no {'whole ' * (kinds[name] is int)}number") from None
    try:
        return base.set(**{name: value})
    except UserError as e:
        raise UserError(f"{where} {key}={text.strip()}: {e}") from e
