"""The codec: every message survives the wire, and nothing else gets in."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import tracemalloc
import typing

import msgpack
import numpy as np
import pytest
from conftest import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.actors import messages as m
from minisgl.actors import wire
from minisgl.sampling_params import RequestOptions, SamplingParams


def _value(hint: object) -> st.SearchStrategy:
    kinds = wire._kinds(hint)
    if tuple in kinds:
        return st.lists(st.text() if str in kinds[tuple] else st.integers(-(2**60), 2**60), max_size=4).map(tuple)
    arms = []
    for c in kinds:
        if c is np.ndarray:
            dtype = np.dtype(typing.get_args(typing.get_args(hint)[1])[0])
            arms.append(st.lists(st.integers(0, 200), max_size=5).map(lambda v, d=dtype: np.array(v, d)))
        elif c is RequestOptions:
            arms.append(
                st.builds(RequestOptions, priority=st.integers(-9, 9), timeout=st.floats(0, 99), cache_salt=st.text(max_size=5))
            )
        elif c is SamplingParams:
            arms.append(
                st.builds(
                    SamplingParams,
                    max_tokens=st.none() | st.integers(1, 9999),
                    temperature=st.floats(0, 2),
                    seed=st.none() | st.integers(0, 2**62),
                    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
                    presence_penalty=st.floats(-2, 2),
                    logit_bias=st.dictionaries(st.integers(0, 9999), st.floats(-100, 100) | st.integers(-9, 9), max_size=3),
                    logprobs=st.none() | st.integers(0, 20),
                    echo=st.booleans(),
                )
            )
        else:
            arms.append(
                {
                    int: st.integers(-(2**63), 2**63 - 1),
                    float: st.floats(allow_nan=False),
                    str: st.text(),
                    bytes: st.binary(max_size=50),
                    bool: st.booleans(),
                    type(None): st.none(),
                }[c]
            )
    return st.one_of(arms)


def _messages() -> st.SearchStrategy:
    builds = []
    for cls in wire.registry().values():
        if cls not in (SamplingParams, RequestOptions):
            hints = typing.get_type_hints(cls)
            builds.append(st.builds(cls, **{f.name: _value(hints[f.name]) for f in dc.fields(cls)}))
    return st.one_of(builds)


@settings(max_examples=cases(150), deadline=None)
@given(_messages())
def test_every_message_survives_the_wire_unless_its_values_do_not_fit_together(msg: object) -> None:
    if not getattr(msg, "agrees", lambda: True)():
        with pytest.raises(wire.BadMessage, match="do not fit together"):
            wire.decode(wire.encode(msg))
        return
    back = wire.decode(wire.encode(msg))
    assert type(back) is type(msg)
    for f in dc.fields(msg):
        a, b = getattr(msg, f.name), getattr(back, f.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
        else:
            assert a == b


@settings(max_examples=cases(500), deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_bad_message_and_nothing_else(raw: bytes) -> None:
    for data in (raw, bytes([wire.PROTOCOL]) + raw):
        with pytest.raises(wire.BadMessage):
            wire.decode(data)


@settings(max_examples=cases(500), deadline=None)
@given(_messages(), st.data())
def test_a_mutated_frame_is_a_message_or_a_bad_message(msg: object, data: st.DataObject) -> None:
    raw = bytearray(wire.encode(msg))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(wire.BadMessage):
        assert type(wire.decode(bytes(raw))) in wire.registry().values()


def _nested(depth: int) -> bytes:
    """A value within a value, and so on."""
    body = msgpack.packb(["SamplingParams"])
    for _ in range(depth):
        body = msgpack.packb(["SamplingParams", msgpack.ExtType(1, body)])
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\x91" * 100_000,  # a hundred thousand arrays deep
        b"\xdc\xff\xff" + b"\x90" * 65535,  # 65,535 empty arrays
        msgpack.packb(["Cancel"]),  # a field is missing
        msgpack.packb(["Cancel", 1, 2]),  # one too many
        msgpack.packb(["Cancel", "one"]),  # the wrong type
        msgpack.packb(["Cancel", True]),  # a bool is not an int
        msgpack.packb(["__import__", "os"]),  # not a message
        msgpack.packb({"__type__": "Cancel"}),  # maps never occur
        msgpack.packb(["Tokenize", 1, {"a": 1}, None, False]),
        msgpack.packb(["Tokenized", 1, msgpack.ExtType(42, b"")]),
        msgpack.packb(["Text", *[msgpack.ExtType(2, b"|O8xxxxxxxx")] * 5, []]),  # an array of objects
        msgpack.packb(["Generate", 1, 1, 1, 1, 1, msgpack.ExtType(1, msgpack.packb(["SamplingParams", -5] + [0] * 9))]),
        msgpack.packb(["Cancel", 1]) + b"trailing",
        b"\xdc\xff\xff" * 1000,  # thousands of items each, for which memory would be taken
        b"\x93\xa4Text\xdc\xff\xff" + (b"\xdc\xff\xff" + b"\xa2ab" * 65535) * 20,  # more small objects than any message has
        b"\xdc\xff\xff" + b"\xc7\x03\x02<i4" * 65535,  # tens of thousands of arrays
        _nested(5),
        _nested(300),  # on the C stack
        wire.encode(m.Stats(("a",), np.zeros(1, np.int64)))[1:].replace(b"\xa1a", b"\x07"),  # a name that is no string
        wire.encode(m.Stats(("a",), np.zeros(1, np.int64)))[1:].replace(b"\xa1a", b"\x91\xa1a"),  # a tuple too deep
        wire.encode(m.Track(1, 0, np.zeros(0, np.int32), SamplingParams(logit_bias={7: 1.0}), 0.0, np.zeros(0, np.int32)))[
            1:
        ].replace(b"\x92\x07", b"\x92\xc3"),
    ],
)
def test_bombs_and_forgeries_are_refused(body: bytes) -> None:
    with pytest.raises(wire.BadMessage):
        wire.decode(bytes([wire.PROTOCOL]) + body)


def test_a_foreign_version_is_refused_with_both_numbers() -> None:
    with pytest.raises(wire.BadMessage, match="version 99, expected 1"):
        wire.decode(b"\x63" + wire.encode(m.Cancel(1))[1:])


@pytest.mark.parametrize("value", [{"a": 1}, object(), np.zeros((2, 2), np.int32), np.zeros(2, np.float64), np.array(["x"])])
def test_what_is_not_declared_may_not_travel(value: object) -> None:
    with pytest.raises(TypeError):
        wire.encode(value)
    with pytest.raises(TypeError):
        wire.encode(m.Tokens(value, value, value, value))


def test_a_message_type_is_declared_once() -> None:
    with pytest.raises(TypeError, match="declared twice"):
        wire.message(type("Cancel", (), {"__annotations__": {"uid": int}}))


def test_an_array_is_copied_and_writable() -> None:
    tokens = np.arange(3, dtype=np.int32)
    back = wire.decode(wire.encode(m.Track(1, 0, tokens, SamplingParams(), 0.0, tokens)))
    back.prompt[0] = 9
    assert tokens[0] == 0


def test_what_is_refused_has_taken_memory_in_proportion_to_its_bytes() -> None:
    for body in (b"\xdc\xff\xff" * 1000, b"\xdd\x00\x01\xff\xff" * 300, _nested(100) + bytes(1 << 18)):
        tracemalloc.start()
        with pytest.raises(wire.BadMessage):
            wire.decode(bytes([wire.PROTOCOL]) + body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (2 << 20) + 8 * len(body)


@pytest.mark.parametrize(
    "msg",
    [
        m.Tokens(np.zeros(2, np.int64), np.ones(1, np.uint8), np.zeros(1, np.int32), np.zeros(1, np.uint8)),
        m.Tokens(np.zeros(1, np.int64), np.ones(1, np.uint8), np.zeros(2, np.int32), np.zeros(1, np.uint8)),
        m.Tokens(np.zeros(1, np.int64), np.ones(1, np.uint8), np.zeros(1, np.int32), np.full(1, 99, np.uint8)),
        m.Tokens(np.zeros(1, np.int64), np.ones(1, np.uint8), np.full(1, -1, np.int32), np.zeros(1, np.uint8)),
        m.Text(
            np.zeros(1, np.int64),
            np.zeros(1, np.uint8),
            np.zeros(0, np.int32),
            np.full(1, 200, np.uint8),
            np.zeros(1, np.int32),
            ("x",),
        ),
        m.Stats(("a", "b"), np.zeros(1, np.int64)),
        m.Track(1, 1 << 40, np.zeros(1, np.int32), SamplingParams(), 0.0, np.zeros(0, np.int32)),
        m.Track(1, 0, np.zeros(0, np.int32), SamplingParams(echo=True), 0.0, np.zeros(0, np.int32)),
        m.Generate(1 << 63, 1, 1, 1, 0, SamplingParams(), RequestOptions()),
        m.Generate(1, 1, 2, 1, 0, SamplingParams(), RequestOptions()),
        m.Generate(1, 9, 1, 1, 0, SamplingParams(), RequestOptions()),
        m.Generate(1, 1, 1, -1, 0, SamplingParams(), RequestOptions()),
        m.Capacity(0),
        m.Rejected(1, 99999, "x", None, None, None),
        m.Tokenize(1, "x", b"{}", False),
        m.Tokenize(1, None, None, False),
        m.Tokenize(1, "x", None, False, reasoning="unheard of"),
        m.Detokenize(1, np.array([-1], np.int32), False),
    ],
    ids=lambda msg: type(msg).__name__,
)
def test_values_that_cannot_belong_together_are_no_message(msg: object) -> None:
    with pytest.raises(wire.BadMessage, match=f"the values of {type(msg).__name__} do not fit together"):
        wire.decode(wire.encode(msg))
