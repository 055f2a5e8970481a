"""Serves offline batches: the same actors as the server, driven by a blocking loop instead of HTTP.

llm = LLM()                                   # or LLM("Qwen/Qwen3-0.6B", tp=2)
for out in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16)):
    print(out.text)
llm.close()                                   # or use it as a context manager
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from minisgl import grammar
from minisgl.actors import spawn
from minisgl.api.engine import Chunk, Prompt, TextPrompt, TokenLogprob, TokenPrompt
from minisgl.api.in_process import InProcessSystem
from minisgl.api.requests.chat_prompt import check_messages, packed
from minisgl.api.system import System
from minisgl.config import Config, EngineConfig, ModelSpec, ServerConfig, engine_config
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import SamplingParams

_UNBOUNDED = 1 << 30


@dataclass(slots=True)
class Completion:
    """The answer to one prompt.  If the request could not be served, `error` is set and `finish_reason` is None."""

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


class LLM:
    """An engine in this program's own process tree.  Keywords are the fields of EngineConfig (`tp=2`, `kv_tokens=65536`, ...).

    Must be created on the main thread.  With `processes=False` all actors run in it, for debuggers and tracers; then `tp` is 1.
    `model` is what --model takes, or a ModelSpec.  Raises UserError when the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | ModelSpec | None = None,
        *,
        revision: str | None = None,
        processes: bool = True,
        make_worker: spawn.MakeWorker = spawn.make_worker,
        **engine: Any,
    ) -> None:
        _check_names(engine)
        spec = spawn.find_model(model, revision, engine.get("tp", 1))
        server = ServerConfig(max_open_requests=_UNBOUNDED, max_queue=0, max_queued_tokens=0)
        config = Config(spec, engine_config(engine), server)
        self._defaults = config.sampling_defaults
        kind = System if processes else InProcessSystem
        self.system = cast(System, kind(config, make_worker))  # the two have this class's calls in common
        try:
            self.system.wait_ready()
        except BaseException:
            self.system.close()
            raise

    def generate(
        self, prompts: Sequence[str | Sequence[int]] | str, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue texts or lists of token ids; one Completion each, in order.

        A single SamplingParams serves all prompts; the default is the checkpoint's recommendation.  Raises UserError if the
        engine dies meanwhile.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._run([TextPrompt(p) if isinstance(p, str) else TokenPrompt(tuple(p)) for p in texts], params)

    def chat(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_kwargs: Any,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; one Completion each.

        A conversation is a list of messages as POST /v1/chat/completions takes them; the template gets it in the same form.
        `template_kwargs`: further variables of the template (tools, enable_thinking, add_generation_prompt, ...).
        """
        return self._run([_conversation(c, template_kwargs) for c in conversations], params)

    def _run(
        self, prompts: Sequence[Prompt | RequestError], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Completion]:
        each = [params or SamplingParams(**self._defaults)] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} SamplingParams: give one, or one for each")
        answers = [Completion() for _ in prompts]
        uids: list[int] = []
        gateway = self.system.gateway
        try:
            for prompt, p, answer in zip(prompts, each, answers, strict=True):
                try:
                    if isinstance(prompt, RequestError):
                        raise prompt
                    if p.grammar:
                        grammar.check(p.grammar, "grammar")
                    uids.append(gateway.open(prompt, p, answer.on_chunk))
                except RequestError as e:
                    answer.error = e
            while gateway.open_requests:
                self.system.pump(1.0)
        finally:
            for uid in uids:  # ^C: leave nothing running
                gateway.close(uid)
        if gateway.failure is not None:
            raise UserError(gateway.failure)
        return answers

    def close(self) -> None:
        """End every process of this engine.  Idempotent."""
        self.system.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _conversation(messages: Sequence[Any], template_kwargs: dict[str, Any]) -> Prompt | RequestError:
    """The prompt of a conversation, or what is wrong with it."""
    try:
        return packed(check_messages("messages", messages), template_kwargs)
    except RequestError as e:
        return e


def _check_names(engine: dict[str, Any]) -> None:
    names = {f.name for f in fields(EngineConfig)}
    for name in engine:
        if name not in names:
            raise UserError(f"LLM() has no setting {name!r}; the settings are {', '.join(sorted(names))}")
