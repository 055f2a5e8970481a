"""The detokenizer actor: one Text per step, stop strings, and no state that outlives its request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import fake_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import small
from test_tokenizer_actor import Recorder

from minisgl.actors import detokenizer as module
from minisgl.actors.detokenizer import DetokenizerActor
from minisgl.actors.messages import (
    Cancel,
    Forget,
    Logprobs,
    Started,
    Stop,
    Text,
    ThoughtEnded,
    TokenLogprobs,
    Tokens,
    Trace,
    Track,
)
from minisgl.actors.wire import decode, encode
from minisgl.model.text.tokenizer import Tokenizer
from minisgl.sampling_params import Finish, SamplingParams

Row = tuple[int, list[int], Finish]


def step(*rows: Row) -> Tokens:
    return Tokens(
        np.array([uid for uid, _, _ in rows], np.int64),
        np.array([len(tokens) for _, tokens, _ in rows], np.uint8),
        np.array([t for _, tokens, _ in rows for t in tokens], np.int32),
        np.array([finish for *_, finish in rows], np.uint8),
    )


class Setup:
    """An actor, what it has sent, and shorthands."""

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok
        self.ctx = Recorder()
        self.actor = DetokenizerActor(self.ctx, fake_config())
        self.actor.started()

    def track(
        self, uid: int, *stop: str, skip: bool = True, cached: int = 0, prompt: tuple[int, ...] = (), **params: Any
    ) -> None:
        p = SamplingParams(stop=stop, skip_special_tokens=skip, **params)
        self.actor.receive(Track(uid, cached, np.array(prompt, np.int32), p, uid / 4, np.zeros(0, np.int32)))

    def score(self, *rows: tuple[int, bool, int, float, list[tuple[int, float]]]) -> list[Any]:
        """Scores of (uid, drawn, token, logprob, alternatives); returns what api is told of them at once."""
        self.ctx.sent.clear()
        tops = [t for *_, top in rows for t in top]
        self.actor.receive(
            TokenLogprobs(
                np.array([r[0] for r in rows], np.int64),
                np.array([r[1] for r in rows], np.uint8),
                np.array([r[2] for r in rows], np.int32),
                np.array([r[3] for r in rows], np.float32),
                np.array([len(r[4]) for r in rows], np.uint8),
                np.array([t for t, _ in tops], np.int32),
                np.array([x for _, x in tops], np.float32),
            )
        )
        return self.told()

    def told(self) -> list[Any]:
        """(uid, token, offset, logprob, pieces) of the Logprobs that were sent."""
        out = []
        for m in [decode(encode(m)) for to, m in self.ctx.sent if to == "api" and isinstance(m, Logprobs)]:
            pieces, at = [], 0
            for size in m.sizes.tolist():
                pieces.append(m.pieces[at : at + size])
                at += size
            for uid, token, offset, logprob, width in zip(m.uids, m.tokens, m.offsets, m.logprobs, m.widths, strict=True):
                mine, pieces = pieces[: 1 + width], pieces[1 + width :]
                out.append((int(uid), int(token), int(offset), float(logprob), mine))
            assert not pieces
        return out

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tok.encode(text, add_special=False).tolist()
        return ids

    def step(self, *rows: Row) -> list[tuple[int, list[int], int, str]]:
        """Feed one step; returns the rows of the Text that comes out: (uid, tokens, finish, text)."""
        self.ctx.sent.clear()
        self.actor.receive(step(*rows))
        texts = [m for to, m in self.ctx.sent if to == "api" and not isinstance(m, Logprobs | ThoughtEnded)]
        assert len(texts) <= 1
        if not texts:
            return []
        text = decode(encode(texts[0]))  # as the wire would bring it
        assert isinstance(text, Text)
        assert len(text.uids) == len(text.counts) == len(text.finish) == len(text.cached) == len(text.texts)
        tokens = np.split(text.tokens, np.cumsum(text.counts)[:-1])
        return [
            (u, t.tolist(), f, s)
            for u, t, f, s in zip(text.uids.tolist(), tokens, text.finish.tolist(), text.texts, strict=True)
        ]

    def say(self, uid: int, ids: list[int], finish: Finish) -> list[tuple[int, int, int]]:
        """Feed an answer token by token; returns the thoughts that end: (uid, tokens, after how many tokens of the answer)."""
        out = []
        for i, token in enumerate(ids, 1):
            self.step((uid, [token], finish if i == len(ids) else Finish.NONE))
            told = [m for _, m in self.ctx.sent]
            for m in told:
                if isinstance(m, ThoughtEnded):
                    assert isinstance(told[-1], Text), "the Text comes behind it"
                    out.append((m.uid, m.tokens, i))
        return out

    def cancelled(self) -> list[int]:
        return [m.uid for to, m in self.ctx.sent if to == "scheduler" and isinstance(m, Cancel)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Setup:
    tok = small()
    monkeypatch.setattr(module, "load_tokenizer", lambda spec: tok)
    return Setup(tok)


GO, STOP, LENGTH, ABORT = Finish.NONE, Finish.STOP, Finish.LENGTH, Finish.ABORT


def test_a_step_becomes_one_text_with_a_row_per_request(world: Setup) -> None:
    world.track(1, cached=5)
    world.track(2)
    (h, e), (x,) = world.ids("h€")[:2], world.ids("x")
    assert world.step((1, [h], GO), (2, [x], GO)) == [(1, [h], 0, "h"), (2, [x], 0, "x")]
    assert world.step((1, [e], GO), (2, [], GO)) == [(1, [e], 0, ""), (2, [], 0, "")]
    [(_, text)] = world.ctx.sent
    assert text.cached.tolist() == [5, 0]


def test_api_is_told_once_how_long_a_request_was_queued(world: Setup) -> None:
    world.track(3)
    [(to, m)] = world.ctx.sent
    assert (to, type(m), m.uid, m.queued) == ("api", Started, 3, 0.75)
    world.step((3, world.ids("x"), GO))
    assert [type(m) for _, m in world.ctx.sent] == [Text]


def test_tokens_of_strangers_are_ignored(world: Setup) -> None:
    world.track(1)
    (x,) = world.ids("x")
    assert world.step((9, [x], GO), (1, [x], GO)) == [(1, [x], 0, "x")]
    assert world.step((9, [x], GO)) == []
    assert world.ctx.sent == []


def test_the_end_of_a_request_that_was_never_started_reaches_api(world: Setup) -> None:
    assert world.step((9, [], Finish.ABORT)) == [(9, [], Finish.ABORT, "")]


def test_a_character_across_steps_appears_when_it_is_whole(world: Setup) -> None:
    world.track(1)
    assert [world.step((1, [t], GO))[0][3] for t in world.ids("€")] == ["", "", "€"]


@pytest.mark.parametrize("finish", [LENGTH, ABORT])
def test_half_a_character_is_flushed_at_the_end(world: Setup, finish: Finish) -> None:
    world.track(1)
    a, b, _ = world.ids("€")
    world.step((1, [a], GO))
    assert world.step((1, [b], finish)) == [(1, [b], int(finish), "\ufffd")]
    assert world.actor._streams == {}


def test_half_a_stop_string_is_flushed_at_the_end(world: Setup) -> None:
    world.track(1, "END")
    n, x = world.ids("EN"), world.ids("</s>")
    assert world.step((1, n[:1], GO))[0][3] == ""
    assert world.step((1, n[1:], GO))[0][3] == ""
    assert world.step((1, x, STOP)) == [(1, x, int(STOP), "EN")]


@pytest.mark.parametrize("skip", [True, False])
def test_the_token_that_ends_a_request_has_no_text(world: Setup, skip: bool) -> None:
    world.track(1, skip=skip)
    world.track(2, skip=skip)
    (eos,), (x,) = world.ids("</s>"), world.ids("x")
    assert world.step((1, [eos], STOP), (2, [x], STOP)) == [(1, [eos], int(STOP), ""), (2, [x], int(STOP), "")]


def test_special_tokens_are_shown_on_request(world: Setup) -> None:
    world.track(1, skip=False)
    world.track(2, skip=True)
    (bos,) = world.ids("<s>")
    assert [r[3] for r in world.step((1, [bos], GO), (2, [bos], GO))] == ["<s>", ""]


def test_a_stop_string_across_tokens_never_leaks_and_cancels_the_request(world: Setup) -> None:
    world.track(1, "\n\n", "stop!")
    shown = ""
    for t in world.ids("go stop"):
        shown += world.step((1, [t], GO))[0][3]
    assert shown == "go "
    (end,) = world.ids("!")
    assert world.step((1, [end], GO)) == [(1, [end], int(STOP), "")]
    assert world.cancelled() == [1]


def test_after_a_stop_string_nothing_is_said_until_the_end_arrives(world: Setup) -> None:
    world.track(1, "x")
    world.track(2)
    (x,) = world.ids("x")
    world.step((1, [x], GO), (2, [x], GO))
    assert world.cancelled() == [1]
    assert world.step((1, [x], GO), (2, [x], GO)) == [(2, [x], 0, "x")]  # was on its way already
    assert world.cancelled() == []
    assert 1 in world.actor._streams
    assert world.step((1, [], ABORT)) == []  # the answer to the Cancel
    assert world.step((2, [x], LENGTH)) == [(2, [x], int(LENGTH), "x")]
    assert world.actor._streams == {}


def test_a_stop_string_in_the_last_token_needs_no_cancel(world: Setup) -> None:
    world.track(1, "x")
    (x,) = world.ids("x")
    assert world.step((1, [x], LENGTH)) == [(1, [x], int(STOP), "")]
    assert world.cancelled() == []
    assert world.actor._streams == {}


def test_a_request_can_have_two_rows_in_one_step(world: Setup) -> None:
    world.track(1)
    (x,) = world.ids("x")
    assert world.step((1, [x], GO), (1, [], ABORT)) == [(1, [x], 0, "x"), (1, [], int(ABORT), "")]


# ---------------- echo, least numbers of tokens, log probabilities
def test_no_stop_string_is_looked_for_in_the_first_tokens_of_min_tokens(world: Setup) -> None:
    world.track(1, "ab", min_tokens=3)
    a, b, c = world.ids("abc")
    texts = [world.step((1, [t], GO))[0] for t in (a, b, a)]
    assert [row[3] for row in texts] == ["a", "b", "a"]
    assert world.step((1, [b], GO))[0][3] == "b", "its beginning was out already"
    assert [world.step((1, [t], GO))[0][2:] for t in (c, a, b)] == [(0, "c"), (0, ""), (int(STOP), "")]


def test_an_echoed_prompt_stands_before_the_first_text_and_holds_no_stop_string(world: Setup) -> None:
    prompt = tuple(world.ids("say x:"))
    world.track(1, "x", prompt=prompt, echo=True)
    a, x = world.ids("ax")
    assert world.step((1, [a], GO)) == [(1, [a], 0, "say x:a")]
    assert world.step((1, [x], GO)) == [(1, [x], int(STOP), "")]


def test_a_prompt_alone_is_told_without_what_it_was_continued_with(world: Setup) -> None:
    prompt = tuple(world.ids("€!"))
    for uid, finish in ((1, LENGTH), (2, STOP)):
        world.track(uid, prompt=prompt, echo=True, max_tokens=0, logprobs=0)
        world.score((uid, True, 5, -1.0, []))
        assert world.step((uid, world.ids("a"), finish)) == [(uid, [], int(LENGTH), "€!")]
        assert world.told() == []
    assert world.actor._streams == {}


def test_log_probabilities_come_with_their_tokens_bytes_and_places(world: Setup) -> None:
    e1, e2, e3, x = world.ids("€x")
    (eos,) = world.ids("</s>")
    world.track(1, prompt=(x, e1), echo=True, logprobs=2)
    [(uid, token, offset, first, pieces)] = world.told()
    assert (uid, token, offset, pieces) == (1, x, 0, [b"x"])
    assert np.isnan(first)
    assert world.score((1, False, e1, -0.5, [(x, -0.25), (eos, -3.0)])) == [(1, e1, 1, -0.5, [b"\xe2", b"x", b"</s>"])]
    world.track(2, logprobs=0)
    for token, text, offset in ((e2, "x", 1), (e3, "€", 1), (x, "x", 2)):
        assert world.score((1, True, token, -1.5, []), (2, True, x, -2.0, [])) == []
        rows = world.step((1, [token], GO), (2, [x], GO))
        assert rows[0][3] == text
        (first_row, second) = world.told()
        assert first_row == (1, token, offset, -1.5, [world.tok.piece(token)])
        assert second[:2] == (2, x)
    assert isinstance(world.ctx.sent[0][1], Logprobs), "before the Text that they belong to"
    world.score((1, True, eos, -9.0, []))
    world.step((1, [eos], STOP))
    assert world.told() == [(1, eos, 3, -9.0, [b"</s>"])]


def test_log_probabilities_of_strangers_and_after_a_stop_string_are_dropped(world: Setup) -> None:
    world.track(1, "x", logprobs=0)
    (x,) = world.ids("x")
    assert world.score((9, True, x, -1.0, [])) == []
    world.score((1, True, x, -1.0, []))
    world.step((1, [x], GO))
    assert world.told() == [(1, x, 0, -1.0, [b"x"])]
    assert world.score((1, True, x, -1.0, []), (1, False, x, -1.0, [])) == []
    world.step((1, [x], GO))
    assert world.told() == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_gives_every_request_its_text_and_leaves_nothing_behind(world: Setup, data: st.DataObject) -> None:
    world = Setup(world.tok)  # a fresh actor for every example
    size = world.tok._backend.get_vocab_size()
    wanted: dict[int, tuple[list[int], tuple[str, ...]]] = {}
    for uid in range(data.draw(st.integers(1, 4))):
        ids = data.draw(st.lists(st.sampled_from([*world.ids("ab€"), 3, size - 2]), min_size=1, max_size=12))
        stop = tuple(data.draw(st.lists(st.sampled_from(["a", "ab", "b€", "€a", "\ufffd"]), max_size=2)))
        wanted[uid] = ids, stop
        world.track(uid, *stop)
    shown = dict.fromkeys(wanted, "")
    ends: dict[int, int] = {}
    left = {uid: list(ids) for uid, (ids, _) in wanted.items()}
    while left:
        uids = sorted(data.draw(st.sets(st.sampled_from(sorted(left)), min_size=1)))
        rows = [(uid, [left[uid].pop(0)], LENGTH if not left[uid] else GO) for uid in uids]
        for uid, _, finish, text in world.step(*rows):
            assert uid not in ends
            shown[uid] += text
            if finish:
                ends[uid] = finish
        left = {uid: ids for uid, ids in left.items() if ids}
    assert world.actor._streams == {}
    for uid, (ids, stop) in wanted.items():
        text = world.tok.decode(ids, skip_special=True)
        cuts = [i for s in stop if (i := text.find(s)) >= 0]
        assert shown[uid] == text[: min(cuts, default=None)]
        assert ends[uid] == (STOP if cuts else LENGTH)


def test_state_is_dropped_for_any_end(world: Setup) -> None:
    (x,) = world.ids("x")
    for uid in range(300):
        world.track(uid, "y")
        world.step((uid, [x], GO))
    rows: list[Row] = [(uid, [x] if uid % 3 else [], (STOP, LENGTH, ABORT)[uid % 3]) for uid in range(300)]
    assert len(world.step(*rows)) == 300
    assert world.actor._streams == {}


def test_the_actor_handles_what_the_protocol_sends_it() -> None:
    assert set(DetokenizerActor._table) == {Track, TokenLogprobs, Tokens, Forget, Stop, Trace}


# ---------------- thoughts
def test_a_thought_that_ends_is_counted_in_tokens_and_told_once_before_the_text_that_ends_it(world: Setup) -> None:
    for uid in (1, 2):
        world.track(uid, reasoning="qwen3")
    before, thought, after = (world.ids(text) for text in ("<think>", "\nh\u20ac <b>\n", "</think>"))
    assert min(map(len, (before, thought, after))) > 1, "the tags are several tokens here"
    said = before + thought + after
    assert world.say(1, said + world.ids("\n\nYes </think>") + [0], STOP) == [(1, len(thought), len(said))]
    assert world.say(2, world.ids("No <think>x</think>"), LENGTH) == []


def test_a_thought_that_is_not_closed_ends_with_its_request(world: Setup) -> None:
    for uid in (1, 2, 3):
        world.track(uid, *(["stop"] if uid == 3 else []), reasoning="qwen3", thinking=True)
    ids = world.ids("so h\u20ac </thi")
    assert world.say(1, ids, LENGTH) == [(1, len(ids), len(ids))]
    assert world.say(2, [*ids, 0], STOP) == [(2, len(ids), len(ids) + 1)]  # the end token is no thought
    cut = world.ids("ab stop")
    assert world.say(3, cut, LENGTH) == [(3, len(cut), len(cut))], "a stop string in a thought stops nothing"
    assert world.cancelled() == []


# ---------------- where stop strings count
def heard(world: Setup, text: str, *stop: str, cuts: Any = (), **params: Any) -> tuple[str, Finish]:
    """What api is told of an answer with stop strings, and its end; the text comes in tokens of the small tokenizer."""
    world.track(1, *stop, **params)
    out, end, ids = "", GO, world.ids(text)
    for i, token in enumerate(ids):
        for _, _, finish, more in world.step((1, [token], LENGTH if i == len(ids) - 1 else GO)):
            out, end = out + more, Finish(finish)
        if end is STOP:
            world.step((1, [], ABORT))
            break
    assert world.actor._streams == {}
    return out, end


CALL = '<tool_call>{"name": "f", "arguments": {"a": "x.y"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "stop", "params", "told", "end"),
    [
        ("a. b", ["."], {}, "a", STOP),
        ("<think>a. b</think>c. d", ["."], {"reasoning": "qwen3"}, "<think>a. b</think>c", STOP),
        ("a. b</think>c. d", ["."], {"reasoning": "qwen3", "thinking": True}, "a. b</think>c", STOP),
        ("a. b</think>c. d", ["."], {"reasoning": "qwen3"}, "a", STOP),
        ("<think>a</think>b", ["think"], {"reasoning": "qwen3"}, "<think>a</think>b", LENGTH),
        ("<thin>", ["<th"], {"reasoning": "qwen3"}, "", STOP),
        ("<think>a.", ["."], {"reasoning": "qwen3"}, "<think>a.", LENGTH),
        (f"So: {CALL} b. c", ["."], {"tools": "hermes"}, f"So: {CALL} b", STOP),
        (f"So: {CALL}", ["}", "</tool_call>", "\n", "x"], {"tools": "hermes"}, f"So: {CALL}", LENGTH),
        (f"a.{CALL}", ["."], {"tools": "hermes"}, "a", STOP),
        (f"a{CALL}", ["a<"], {"tools": "hermes"}, f"a{CALL}", LENGTH),
        (CALL, ["."], {}, CALL[: CALL.index(".")], STOP),
        ('{"name": "f", "parameters": {"a": "."}}', ["."], {"tools": "llama3"}, None, LENGTH),
        ("a {.}", ["."], {"tools": "llama3"}, "a {", STOP),
        ("[TOOL_CALLS]f[ARGS]{'.'}", ["."], {"tools": "mistral"}, None, LENGTH),
        (f"<think>.</think>{CALL}.", ["."], {"tools": "hermes", "reasoning": "qwen3"}, f"<think>.</think>{CALL}", STOP),
        ("<tool_c.", ["."], {"tools": "hermes"}, "<tool_c", STOP),
        ("ab.", [".", "b"], {"tools": "hermes", "min_tokens": 2}, "ab", STOP),
    ],
)
def test_stop_strings_count_in_what_the_user_is_told(
    world: Setup, *, text: str, stop: list[str], params: Any, told: str | None, end: Finish
) -> None:
    assert heard(world, text, *stop, **params) == (text if told is None else told, end)


def test_a_model_without_thoughts_has_none_counted(world: Setup) -> None:
    world.track(1)
    assert world.say(1, world.ids("<think>x</think>y"), LENGTH) == []
