"""A model without weights for the crash tests: a tokenizer with words, thoughts and halves of characters, and a runner.

The runner is the fake one, and its next token is a hash of all that must survive a replay: the context, the seed, the
parameters of sampling, penalties with the tokens that they count, biases, and a grammar.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import fake_spec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minisgl.actors.messages import CheckGrammar, GrammarChecked, Rejected
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.config import ModelSpec
from minisgl.model.common.finished import Finished
from minisgl.model.common.grammar import Grammars, unpack
from minisgl.model.fake_runner import FakeRunner, next_token
from minisgl.model.text.token_bytes import BYTE_ALPHABET
from minisgl.model.text.vocabulary import vocabulary_of
from minisgl.plan import FAILED, StepPlan

_ADDED = {"<eos>": True, "<think>": False, "</think>": False, "<tool_call>": True, "</tool_call>": True}
EOS, VOCAB = 256, 256 + len(_ADDED)
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if thinks %}<think>{% endif %}"
# What it says: letters, halves of characters, marks, and sometimes the end.
_SAYS = np.array([97, 98, 99, 97, 98, 32, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 256, 257, 258, 259, 260], np.int32)


@functools.cache
def spec() -> ModelSpec:
    """The spec, with its directory, which lives as long as this process."""
    spec.directory = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    path = Path(spec.directory.name)  # type: ignore[attr-defined]
    backend = Tokenizer(models.BPE(dict(BYTE_ALPHABET), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in _ADDED.items()])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}))
    return replace(fake_spec(96, VOCAB), format="safetensors", path=str(path), eos_ids=(EOS,))


@functools.cache
def _compiled() -> Grammars:
    return Grammars(lambda: vocabulary_of(spec()), lambda: 0)


class PromptGrammars(Grammars):
    """Compiles at once, so that a run can be repeated, and each grammar once in this process."""

    def __init__(self) -> None:
        shared = _compiled()
        shared.load_vocabulary()
        super().__init__(lambda: vocabulary_of(spec()), lambda: 0)
        self._tokenizer, self._eos, self._ends = shared._tokenizer, shared._eos, shared._ends

    def compile_ahead(self, ticket: int, text: str) -> None:
        self._asked.setdefault(text, []).append(ticket)
        self._made.put(self._compile(text))

    def _compile(self, text: str) -> Any:
        return _compile(text)


@functools.cache
def _compile(text: str) -> Any:
    return _compiled()._compile(text)


class Later:
    """A step that has finished when it has been looked at a few times."""

    def __init__(self, step: Finished, looks: int) -> None:
        self._looks, self.result = looks, step.result

    def done(self) -> bool:
        self._looks -= 1
        return self._looks < 0


class Runner(FakeRunner):
    """See above."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, PromptGrammars())
        self._under: dict[int, int] = {}  # page -> of which prefix it was written full
        self._own: dict[int, list[int]] = {}  # slot -> what its request brings
        self._extra: dict[int, tuple[list[int], list[tuple[int, int, int]], list[int], bool]] = {}

    def launch(self, plan: StepPlan) -> Any:
        for row in plan.new_slots:
            numbers = [float(row[name]) for name in ("temperature", "top_k", "top_p", "min_p")]
            self._own[int(row["slot"])] = [int(row["seed"]) & 0xFFFFFFFF, *(int(64 * x) for x in numbers)]
        at = said = 0
        for row in plan.extras.tolist():
            slot, presence, frequency, repetition, _, n_bias, n_prompt, n_output = row
            bias = [(int(t), int(64 * v), int(u)) for t, v, u in plan.bias[at : at + n_bias].tolist()]
            numbers = [int(64 * x) for x in (presence, frequency, repetition)]
            counted = plan.history[said : said + n_prompt + n_output].tolist()
            self._extra[slot] = [*numbers, *sorted(counted[:n_prompt])], bias, counted[n_prompt:], numbers != [0, 0, 64]
            at, said = at + n_bias, said + n_prompt + n_output
        launched = super().launch(plan)
        for slot, cached in plan.new_slots[["slot", "kv_len"]].tolist():
            tokens = self._context(slot).tolist()
            for i, page in enumerate(self.table[slot, : cached // self._size].tolist(), 1):
                assert self._under.get(page) == hash(tuple(tokens[: i * self._size])), "a page has another prefix"
        return Later(launched, plan.step % 3)

    def _append(self, slot: int, token: int) -> None:
        super()._append(slot, token)
        if not self.kv_len[slot] % self._size:
            context = self._context(slot)
            self._under[int(self.table[slot, len(context) // self._size - 1])] = hash(tuple(context.tolist()))

    def _sample(self, slot: int, step: Any) -> None:
        context, here = self._context(slot), np.array([slot])
        numbers, bias, said, penalised = self._extra.get(slot, ([0, 0, 64], [], [], False))
        salt = [*self._own[slot], *numbers, *sorted(said), *(64 + v for _, v, _ in bias if v)]
        allowed, failed = _SAYS, False
        if with_grammar := len(self.grammars.rows(here)) > 0:
            masks, (failed,) = self.grammars.masks(here)
            usual = np.intersect1d(follow := np.flatnonzero(unpack(masks, VOCAB)[0]).astype(np.int32), _SAYS)
            allowed = usual if len(usual) else follow
        else:
            never = [t for t, _, until in bias if until > len(context)]
            allowed = allowed[~np.isin(allowed, never)]
        token = next_token(np.append(np.array(salt, np.int64), context), VOCAB, allowed)
        if with_grammar:
            self.grammars.advance(here, np.array([token], np.int32))
        if penalised:
            said.append(token)
        if self.logprobs[slot] >= 0:
            step.drawn.append((slot, context, token))
        self.last[slot] = token
        step.sampled.append(FAILED if failed else token)


class Checker(Actor):
    """Answers as the real one does, one after the other, without children."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self._due: list[CheckGrammar] = []

    @on(CheckGrammar)
    def check_grammar(self, m: CheckGrammar) -> None:
        self._due.append(m)

    def idle(self) -> bool:
        if not self._due:
            return False
        m = self._due.pop(0)
        refused = Rejected(m.uid, 400, f"{m.field} is too large", m.field, "too_large", None)
        self.ctx.send("api", refused if "(" in m.grammar else GrammarChecked(m.uid, m.grammar.upper()))
        return True
