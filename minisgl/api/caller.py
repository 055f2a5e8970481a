"""Says to the engine whose requests they are: the engine as one call of the API sees it.

A client is known to the engine by a number that nobody can turn into its key or address, a call by one that counts up.  The
scheduler shares the engine among clients, and the share of a client among its calls (actors/scheduler/fair_queue.py).  Runs in
the api process.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from minisgl.api.engine import ChatPrompt, Engine, OnChunk, OnIds, OnText, Prompt, TextPrompt, WrappedEngine
from minisgl.api.explaining import Explaining
from minisgl.api.request_log import Account
from minisgl.errors import InvalidParam
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

BATCH_PRIORITY = -1  # of batches, at most: they stay behind all clients that wait for an answer


class Callers:
    """Numbers the calls of all clients of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = Explaining(engine)
        self._secret = secrets.token_bytes(16)
        self._calls = itertools.count(1)

    def call(self, who: str, batch: bool = False, account: Account | None = None, tenant: str = "") -> Engine:
        """The engine for the next call of `who`, a tenant or an address.

        `batch`: nobody waits for the answer.  `account`: where its tokens are counted.  `tenant`: whose prompts it has,
        and whose cached prefixes it may use, "" without keys (with --salt-by-key off all tenants use the same).
        """
        owner = self.client(f"tenant {tenant}") if tenant else 0
        tenant = tenant if self._engine.config.server.salt_by_key == "on" else ""
        return _Caller(self._engine, self.client(who), next(self._calls), batch, account, tenant, owner)

    def client(self, who: str) -> int:
        """The number of a client."""
        digest = hashlib.blake2b(who.encode("utf-8", "surrogateescape"), key=self._secret, digest_size=7).digest()
        return int.from_bytes(digest, "little")


class _Caller(WrappedEngine):
    """Marks the requests and questions of one call, whose time runs from here."""

    def __init__(  # noqa: PLR0917
        self, engine: Engine, client: int, call: int, batch: bool, account: Account | None, tenant: str, owner: int
    ) -> None:
        super().__init__(engine)
        self._client, self._call, self._batch, self._account, self._tenant = client, call, batch, account, tenant
        self._owner, self._began = owner, time.monotonic()

    def _marked(self, options: RequestOptions) -> RequestOptions:
        return replace(options, client=self._client, call=self._call, began=self._began, owner=self._owner)

    def check_open(self, client: int = 0, generates: bool = True) -> None:
        super().check_open(self._client, generates)

    def tokenize(self, prompt: TextPrompt | ChatPrompt, on_ids: OnIds, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        return super().tokenize(prompt, on_ids, self._marked(options))

    def detokenize(
        self, ids: Sequence[int], skip_special: bool, on_text: OnText, options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        return super().detokenize(ids, skip_special, on_text, self._marked(options))

    def check_grammar(self, grammar: str, field: str, on_grammar: OnText, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        return super().check_grammar(grammar, field, on_grammar, self._marked(options))

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Raises InvalidParam for a priority above the server's --max-priority; that of a batch is lowered instead."""
        priority, most = options.priority, self.config.server.max_priority
        if self._batch:
            priority = min(priority, BATCH_PRIORITY)
        elif priority > most:
            text = f"priority must be at most {most} here, got {priority}; the operator may allow more (--max-priority)."
            raise InvalidParam("priority", text)
        salt = _salt(self._tenant, options.cache_salt) if self._tenant else options.cache_salt
        marked = replace(self._marked(options), priority=priority, cache_salt=salt)
        if self._account is not None:
            on_chunk = self._account.watch(prompt, on_chunk, params)
        return super().open(prompt, params, on_chunk, marked)


def _salt(tenant: str, given: str) -> str:
    """The cache_salt of a tenant's request, which may bring one: no tenant can choose that of another."""
    return hashlib.blake2b(given.encode("utf-8", "surrogatepass"), key=tenant.encode(), digest_size=16).hexdigest()
