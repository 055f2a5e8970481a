"""Tokenizes prompts and renders chat templates.  One tokenizer process per run, or several.

Owns      the tokenizer and the chat template; the encoded prompts that wait for room in the prompt ring.
Receives  Tokenize, Detokenize, Wake (api).
Sends     Tokenized, Detokenized, TokenizerInfo, Rejected (api); token ids through the prompt ring, in the order of the
          Tokenized messages.
"""

from __future__ import annotations

import json
import logging
from collections import deque

import numpy as np

from minisgl.actors.messages import Detokenize, Detokenized, Rejected, Tokenize, Tokenized, TokenizerInfo, Wake
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingWriter
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import RequestError, context_overflow
from minisgl.model.text.tokenizer import Tokenizer, load_tokenizer
from minisgl.reasoning import begins_inside

_FAR_TOO_LONG = 4  # times the context; shorter prompts fit the prompt ring, and api refuses them if necessary
_END = 1024  # tokens at the end of a prompt, more than what is begun of an answer usually has
_SAID = 256  # characters of a message, enough to find it again
_log = logging.getLogger(__name__)


class TokenizerActor(Actor):
    """Turns prompts into token ids, one after the other.  A prompt that cannot be encoded fails alone."""

    _tokenizer: Tokenizer

    def __init__(self, ctx: Context, config: Config, ring: RingWriter) -> None:
        super().__init__(ctx)
        self.config = config
        self._ring = ring
        self._backlog: deque[tuple[I32, Tokenized]] = deque()  # encoded, waiting for room

    def started(self) -> None:
        self._tokenizer = load_tokenizer(self.config.model, self.config.engine.chat_template)
        self.ctx.send("api", TokenizerInfo(json.dumps(self._tokenizer.describe())))

    @on(Tokenize)
    def tokenize(self, m: Tokenize) -> None:
        try:
            ids, shape = self._encode(m)
            self._check_length(ids, "prompt" if m.chat is None else "messages")
            thinking = self._thinking(ids, m.chat, m.reasoning) if m.chat and m.reasoning else None
        except RequestError as e:
            self.ctx.send("api", Rejected(m.uid, e.status, e.message, e.param, e.code, None))
            return
        except Exception as e:  # a bug in a library: it must not end the service of other requests
            _log.exception("request %d could not be tokenized", m.uid)
            text = f"The tokenizer failed on this request ({type(e).__name__})."
            self.ctx.send("api", Rejected(m.uid, 500, text, None, "tokenizer_error", None))
            return
        self._backlog.append((ids, Tokenized(m.uid, len(ids), thinking, shape)))
        self._flush()

    def _encode(self, m: Tokenize) -> tuple[I32, bytes]:
        if m.chat is None:
            return self._tokenizer.encode(m.text or "", m.add_special, "prompt", m.keep), b""
        ids, shape = self._tokenizer.read_chat(m.chat)
        return ids[: m.keep or None], np.array(shape, "<u4").tobytes()

    def _thinking(self, ids: I32, chat: bytes, style: str) -> bool:
        """Whether the answer to a conversation, which has been encoded, begins inside a thought."""
        request = json.loads(chat)
        others = [m.get("content") for m in request["messages"] if m["role"] != "assistant"]
        said = others[-1].strip()[-_SAID:] if others and isinstance(others[-1], str) else ""
        continued = bool((request.get("kwargs") or {}).get("continue_final_message"))
        end = self._tokenizer.decode(ids[-_END:].tolist(), skip_special=False)
        return begins_inside(style, end, said, continued=continued)

    @on(Detokenize)
    def detokenize(self, m: Detokenize) -> None:
        self.ctx.send("api", Detokenized(m.uid, self._tokenizer.decode(m.ids.tolist(), m.skip_special)))

    def _check_length(self, ids: I32, field: str) -> None:
        n, context = len(ids), self.config.max_context
        if n > _FAR_TOO_LONG * context:
            raise context_overflow(field, context, n, f"{n} in the {field}, 0 in the completion")

    @on(Wake)
    def wake(self, m: Wake) -> None:
        """api has made room in the ring."""
        self._flush()

    def _flush(self) -> bool:
        """Publish the prompts that fit, in order.  While one waits, the ring's flag makes api send Wake after it has read."""
        worked = False
        while self._backlog:
            ids, m = self._backlog[0]
            raw = m.uid.to_bytes(8, "little") + ids.astype("<i4", copy=False).tobytes()
            if not self._ring.has_room(len(raw)):
                break
            self._ring.publish(raw)
            self._backlog.popleft()
            self.ctx.send("api", m)
            worked = True
        self._ring.starve(bool(self._backlog))
        return worked

    def idle(self) -> bool:
        """Look once more with the flag up: room made before api could see the flag would otherwise never be announced."""
        return bool(self._backlog) and self._flush()
