"""Serves offline batches: the same actors as the server, driven by a blocking loop instead of HTTP.

llm = LLM()                                   # or LLM("Qwen/Qwen3-0.6B", tp=2)
for out in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16)):
    print(out.text)
llm.close()                                   # or use it as a context manager
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from minisgl import grammar
from minisgl import llm_arguments as arguments
from minisgl.actors import spawn
from minisgl.api.engine import Chunk, Prompt, TokenLogprob
from minisgl.api.in_process import InProcessSystem
from minisgl.api.system import System
from minisgl.config import Config, ModelSpec, ServerConfig, engine_config
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.sampling_params import SamplingParams

# Tokens of an answer whose SamplingParams have no max_tokens.  Nearly every answer is shorter.  What is left of the context
# would be thousands more for every text that the model does not end, and a base model ends none.
DEFAULT_MAX_TOKENS = 2048
_UNBOUNDED = 1 << 30
_RATE_SECONDS = 0.5  # between two counts of the tokens that the progress bar shows

Params = SamplingParams | Mapping[str, Any]
Messages = Iterable[Mapping[str, Any]]
Tqdm = bool | Callable[..., Any] | None


@dataclass(slots=True)
class Completion:
    """The answer to one prompt.  Where there is none `finish_reason` is None, and `error` says why."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)  # under SamplingParams.logprobs; with `echo`, of the prompt too
    error: RequestError | None = None

    def on_chunk(self, chunk: Chunk | RequestError) -> None:
        """Add a piece of the answer, or the reason why there is none."""
        if isinstance(chunk, RequestError):
            self.error = chunk
            return
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        self.finish_reason = chunk.finish.reason

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class PromptError(RequestError):
    """A prompt has no answer: why, and which.

    `index`: its place, of the first where several have none.  `outputs`: a Completion for each prompt, in order, with the
    answers to all others; empty where the prompt was refused before anything was computed.
    """

    def __init__(self, index: int, cause: RequestError, outputs: list[Completion], of_what: str, asked: int) -> None:
        text, failed = cause.message, sum(out.error is not None for out in outputs)
        if asked > 1:
            text = f"{of_what}[{index}]: {text}" + ("" if outputs else " (Nothing has been computed.)")
        if failed > 1:
            text += f" ({failed} of {len(outputs)} have no answer; .outputs has those of the others.)"
        super().__init__(text, status=cause.status, param=cause.param, code=cause.code, retry_after=cause.retry_after)
        self.index, self.outputs = index, outputs


class EngineDied(UserError):
    """A process of the engine died.  `outputs`: a Completion for each prompt, in order, with what there was until then."""

    def __init__(self, text: str, outputs: list[Completion]) -> None:
        super().__init__(text)
        self.outputs = outputs


class LLM:
    """An engine in this program's own process tree.  Keywords are the fields of EngineConfig (`tp=2`, `kv_tokens=65536`, ...).

    Must be created on the main thread.  With `processes=False` all actors run in it, for debuggers and tracers; then `tp` is 1.
    `model` is what --model takes, or a ModelSpec.  `default_max_tokens`: the longest answer where SamplingParams have no
    `max_tokens` (less if the context ends before); None: what is left of the context.
    Raises UserError when the model cannot be loaded or a setting cannot be used.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelSpec | None = None,
        *,
        revision: str | None = None,
        processes: bool = True,
        make_worker: spawn.MakeWorker = spawn.make_worker,
        make_scheduler: spawn.MakeScheduler = spawn.make_scheduler,
        default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
        **engine: Any,
    ) -> None:
        engine = arguments.settings(engine, ("model", "revision", "processes", "default_max_tokens"))
        if not isinstance(model, str | os.PathLike | ModelSpec | None):
            raise UserError(f"model must be a path, a hub id or a ModelSpec, not {arguments.type_of(model)}")
        if not isinstance(revision, str | None):
            raise UserError(f"revision must be a string, not {arguments.type_of(revision)}")
        if default_max_tokens is not None and not (arguments.is_integer(default_max_tokens) and default_max_tokens > 0):
            raise UserError("default_max_tokens must be a whole number above 0, or None for what is left of the context")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        spec = spawn.find_model(model, revision, engine.get("tp") or 1)
        no_limits = ServerConfig(
            max_open_requests=_UNBOUNDED, max_queue=0, max_queued_tokens=0, default_max_tokens=int(default_max_tokens or 0)
        )
        config = Config(spec, engine_config(engine, spec.format), no_limits)
        self._defaults = config.sampling_defaults
        self._closed = False
        kind = System if processes else InProcessSystem
        self.system = cast(System, kind(config, make_worker, make_scheduler))  # the two have this class's calls in common
        try:
            self.system.wait_ready()
        except BaseException:
            self.system.close()
            raise

    def generate(
        self,
        prompts: Iterable[str | Iterable[int] | Mapping[str, Any]] | Iterable[int] | Mapping[str, Any] | str,
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: Tqdm = None,
        *,
        params: Params | Sequence[Params] | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Completion]:
        """Continue texts or lists of token ids; one Completion each, in order.

        `prompts`: a text, a list of token ids, or a list of these; or {"prompt": text} or {"prompt_token_ids": ids} for them.
        `sampling_params`: for all prompts, or a list with one for each: a SamplingParams, or a mapping of some of its fields
        over the checkpoint's recommendation, which is also the default.  `params` is another name for it.
        `use_tqdm`: a progress bar: True, False, or what to call instead of tqdm; None: on a terminal, for several prompts.

        Raises PromptError if a prompt is refused: before anything is computed where that can be known, otherwise when all
        others have been answered, and with their answers.  With errors="return" a Completion has the `error` instead.
        Raises EngineDied, with the answers so far, if the engine dies, and InvalidParam for an argument that is no such.
        """
        given = arguments.prompts_of(prompts)
        return self._run(given, "prompts", _one_of(sampling_params, params), use_tqdm, errors)

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: Params | Sequence[Params] | None = None,
        use_tqdm: Tqdm = None,
        *,
        params: Params | Sequence[Params] | None = None,
        errors: Literal["raise", "return"] = "raise",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> list[Completion]:
        """Answer a conversation, or several, through the model's chat template; one Completion each, in order.

        A conversation is a list of messages as POST /v1/chat/completions takes them, and becomes the same prompt as there.
        `chat_template_kwargs` and `template_kwargs`: variables of the template (tools, enable_thinking, add_generation_prompt,
        ...), and `chat_template`, one to use instead of the model's.  All else is as in `generate`.
        """
        variables = arguments.variables_of(chat_template_kwargs, template_kwargs)
        given = [_conversation(c, variables) for c in arguments.conversations_of(messages)]
        return self._run(given, "conversations", _one_of(sampling_params, params), use_tqdm, errors)

    def _run(
        self, prompts: Sequence[Prompt | RequestError], of_what: str, params: Any, use_tqdm: Tqdm, errors: str
    ) -> list[Completion]:
        if errors not in ("raise", "return"):
            raise InvalidParam("errors", 'errors must be "raise" or "return".')
        each = arguments.sampling_of(params, len(prompts), of_what, self._defaults)
        gateway = self.system.gateway
        if self._closed or gateway.state == "dead":
            raise UserError(gateway.failure or "this LLM is closed: make another")
        bar = _bar(use_tqdm, len(prompts), of_what)
        answers = [Completion() for _ in prompts]
        uids: list[int] = []
        try:
            for i, (prompt, p, answer) in enumerate(zip(prompts, each, answers, strict=True)):
                try:
                    if isinstance(prompt, RequestError):
                        raise prompt
                    if p.grammar:
                        grammar.check(p.grammar, "grammar")
                    uids.append(gateway.open(prompt, p, answer.on_chunk))
                except RequestError as e:
                    answer.error = e
                    if errors == "raise":
                        raise PromptError(i, e, [], of_what, len(prompts)) from e
            self._pump(answers, bar)
        finally:
            for uid in uids:  # ^C: leave nothing running
                gateway.close(uid)
            if bar is not None:
                bar.close()
        if gateway.state == "dead":
            raise EngineDied(gateway.failure or "the engine has died", answers)
        failed = next(((i, answer.error) for i, answer in enumerate(answers) if answer.error is not None), None)
        if errors == "raise" and failed is not None:
            raise PromptError(*failed, answers, of_what, len(prompts)) from failed[1]
        return answers

    def _pump(self, answers: Sequence[Completion], bar: Any) -> None:
        """Work until every prompt has its answer or its error."""
        gateway, shown = self.system.gateway, 0
        began = counted = time.monotonic()
        while gateway.open_requests:
            self.system.pump(1.0)
            if bar is None:
                continue
            if (now := time.monotonic()) > counted + _RATE_SECONDS:
                counted, tokens = now, sum(len(answer.token_ids) for answer in answers)
                bar.set_postfix_str(f"{tokens / (now - began):.0f} tok/s", refresh=False)
            if (done := len(answers) - gateway.open_requests) > shown:
                bar.update(done - shown)
                shown = done

    def close(self) -> None:
        """End every process of this engine.  Idempotent."""
        self._closed = True
        self.system.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_conversation = arguments.conversation


def _one_of(sampling_params: Any, params: Any) -> Any:
    if sampling_params is not None and params is not None:
        raise InvalidParam("params", "params is another name for sampling_params: give one of the two.")
    return params if sampling_params is None else sampling_params


def _bar(use_tqdm: Any, total: int, of_what: str) -> Any:
    """A progress bar, or None."""
    if not isinstance(use_tqdm, bool | None) and not callable(use_tqdm):
        raise arguments.wrong_type("use_tqdm", "True, False, None or what to call instead of tqdm", use_tqdm)
    if use_tqdm is False or (use_tqdm is None and total < 2):
        return None
    if callable(use_tqdm):
        return use_tqdm(total=total, desc=of_what, dynamic_ncols=True)
    from tqdm import tqdm

    bar = tqdm(total=total, desc=of_what, dynamic_ncols=True, disable=None if use_tqdm is None else False)
    return None if bar.disable else bar
