"""Incremental text: the pieces join to the whole, whatever the split, and no part of a stop string gets out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import PIECES, byte_level_fields, sentencepiece_fields, wrap
from tokenizers import decoders, models, pre_tokenizers, trainers

from minisgl.model.text import gguf_tokenizer
from minisgl.model.text.detokenize import ByteStream, DecodeState, StopMatcher, WindowStream
from minisgl.model.text.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
BYTES = [bytes([b]) for b in range(256)]


@cache
def byte_level() -> Tokenizer:
    return wrap(gguf_tokenizer.build(byte_level_fields(), "x"))


@cache
def sentencepiece() -> Tokenizer:
    return wrap(gguf_tokenizer.build(sentencepiece_fields(PIECES), "x"))


@cache
def metaspace() -> Tokenizer:
    """One that has no table of bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the tin thin thing in the inn", "étang été"] * 9, trainer)
    return wrap(backend)


def pieces(state: DecodeState, ids: Sequence[int]) -> str:
    return "".join([*map(state.push, ids), state.flush()])


# ---------------- tokens
@given(ids=st.lists(st.integers(-2, 270), max_size=60), skip=st.booleans())
def test_any_tokens_stream_to_the_text_they_have_together(ids: list[int], skip: bool) -> None:
    tok = byte_level()
    assert pieces(tok.stream(skip), ids) == tok.decode(ids, skip)
    known = [i for i in ids if 0 <= i < tok._backend.get_vocab_size()]
    assert tok.decode(ids, skip) == tok._backend.decode(known, skip_special_tokens=skip)


@given(text=TEXT)
def test_any_text_streams_back(text: str) -> None:
    for tok in (byte_level(), sentencepiece()):
        ids = tok.encode(text, add_special=False).tolist()
        streamed = pieces(tok.stream(False), ids)
        assert streamed.removeprefix(" " if tok is sentencepiece() else "") == tok.decode(ids, False)
    assert pieces(byte_level().stream(False), byte_level().encode(text, add_special=False).tolist()) == text


@given(ids=st.lists(st.integers(0, 269), max_size=40))
def test_sentencepiece_tokens_stream_to_the_text_they_have_together(ids: list[int]) -> None:
    tok = sentencepiece()
    assert pieces(tok.stream(True), ids).removeprefix(" ") == tok.decode(ids, True)


def test_a_continuation_keeps_its_leading_space() -> None:
    tok = sentencepiece()
    ids = tok.encode("ab", add_special=False).tolist()
    assert (pieces(tok.stream(True), ids), tok.decode(ids, True)) == (" ab", "ab")


@given(ids=st.lists(st.integers(0, 60), max_size=40))
def test_metaspace_tokens_stream_to_the_text_they_have_together(ids: list[int]) -> None:
    tok = metaspace()
    ids = [i for i in ids if i < tok._backend.get_vocab_size() and i not in tok.special_ids]
    rest = pieces(tok.stream(True), ids[1:])
    assert (tok.opening(ids[0], pieces(tok.stream(True), ids[:1])) + rest if ids else "") == tok.decode(ids, True)
    assert tok.decode(ids, True) == tok._backend.decode(ids)


@given(text=TEXT)
def test_the_window_scheme_agrees_with_the_table(text: str) -> None:
    ids = list(text.encode())
    window = WindowStream(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert pieces(window, ids) == pieces(ByteStream(BYTES, frozenset()), ids) == text


PLANES = st.integers(0, 16).flatmap(
    lambda p: st.characters(codec="utf-8", min_codepoint=p << 16, max_codepoint=(p << 16) + 0xFFFF)
)


@given(
    letters=st.lists(PLANES, min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 48)),
    stop=st.tuples(*[st.integers(0, 11)] * 2),
)
def test_text_of_every_plane_streams_in_every_split_and_no_part_of_a_stop_string_gets_out(
    letters: list[str], cuts: set[int], stop: tuple[int, int]
) -> None:
    text, wanted = "".join(letters), "".join(letters[min(stop) : max(stop) + 1])
    data = text.encode()
    ends = sorted({c for c in cuts if c < len(data)} | {len(data)})
    tokens = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    state, shown = ByteStream(tokens, frozenset()), ""
    for i in range(len(tokens)):
        shown += state.push(i)
        assert shown == b"".join(tokens[: i + 1]).decode("utf-8", "ignore"), "neither half a character nor less than there is"
    assert shown + state.flush() == text
    whole, found = reference(text, [wanted] if wanted else [])
    state, matcher, told = ByteStream(tokens, frozenset()), StopMatcher([wanted]), ""
    for i in range(len(tokens)):
        told += matcher.feed(state.push(i))[0]
        assert whole.startswith(told)
    rest, matched = matcher.flush()
    assert (told + rest, matched) == (whole, found)


@given(data=st.lists(st.binary(max_size=6), max_size=10))
@example(data=[b"\xf0\x9f", b"\x98", b"\x80"])
@example(data=[b"\xe2\x82", b"\xe2\x82\xac", b"\xff\xed\xa0", b"\x80"])
def test_invalid_bytes_become_the_same_replacements_in_every_split(data: list[bytes]) -> None:
    assert pieces(ByteStream(data, frozenset()), range(len(data))) == b"".join(data).decode("utf-8", "replace")


def test_half_a_character_waits_and_is_flushed_at_the_end() -> None:
    state = ByteStream(BYTES, frozenset())
    assert [state.push(b) for b in "é€".encode()[:-1]] == ["", "é", "", ""]
    assert state.flush() == "\ufffd"
    assert state.flush() == ""


def test_skipped_tokens_inside_a_character_do_not_break_it() -> None:
    state = ByteStream([*BYTES, b"<eos>"], frozenset({256}))
    assert [state.push(t) for t in (0xC3, 256, 0xA9)] == ["", "", "é"]


# ---------------- stop strings
def reference(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The whole text at once."""
    found = [i for s in stops if (i := text.find(s)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


SMALL = st.text("ab\n", max_size=24)


@settings(max_examples=500)
@given(
    parts=st.lists(st.text("ab\n", max_size=5), max_size=10),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4),
)
@example(parts=["xxa", "bzz"], stops=["ab", "xxabcd"])
@example(parts=["xxa", "bcd"], stops=["ab", "xxabcd"])
@example(parts=["a", "a", "a", "b"], stops=["aab"])
def test_a_stop_string_across_pieces_is_found_as_in_the_whole_text(parts: list[str], stops: list[str]) -> None:
    whole, found = reference("".join(parts), stops)
    matcher, shown = StopMatcher(stops), ""
    for i, part in enumerate(parts):
        text, matched = matcher.feed(part)
        shown += text
        assert whole.startswith(shown), "a part of a stop string leaked"
        assert not matched or found
        if not matched:
            # Nothing is held back without a reason: the rest could still begin a stop string.
            held = "".join(parts[: i + 1])[len(shown) :]
            assert not held or any(s.startswith(held) or held.startswith(s) or s.startswith(held[:1]) for s in stops)
    text, matched = matcher.flush()
    assert (shown + text, matched) == (whole, found)


@given(text=SMALL, stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_every_split_in_two_gives_the_same(text: str, stops: list[str]) -> None:
    for cut in range(len(text) + 1):
        matcher = StopMatcher(stops)
        shown = "".join(matcher.feed(part)[0] for part in (text[:cut], text[cut:]))
        rest, matched = matcher.flush()
        assert (shown + rest, matched) == reference(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.feed("one\n") == ("one", False)
    assert matcher.feed("two EN") == ("\ntwo ", False)
    assert matcher.feed("V") == ("ENV", False)
    assert matcher.feed("\n\nthree") == ("", True)
    assert matcher.feed("four") == ("", True)
    assert matcher.flush() == ("", True)


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("text") == ("text", False)
    assert matcher.flush() == ("", False)
