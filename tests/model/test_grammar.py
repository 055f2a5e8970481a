"""Grammars: whatever is scheduled, retracted or cut short, an answer is what a slow loop with a matcher of its own makes."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, VOCAB, Loop
from tiny_models import Driver, save_byte_tokenizer, save_llama

from minisgl import grammar
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.sampling_extras import grammar_of
from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.errors import InvalidParam
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.grammar import LAST_RESORT, Grammars, Vocabulary, unpack
from minisgl.model.cpu.penalties import restrict
from minisgl.model.fake_runner import expected_tokens as plain_reference
from minisgl.model.fake_runner import next_token
from minisgl.model.text.vocabulary import vocabulary_of
from minisgl.plan import FAILED, GRAMMAR, StepPlan
from minisgl.sampling_params import Finish, SamplingParams

LETTERS = ["", *"abcdefghij", *"0123456789", "ab", "90"]  # of the fake runner's 23 tokens; the first is EOS
WORDS = Vocabulary([t.encode() for t in LETTERS], frozenset(), (EOS,))
PATTERNS = [r"[a-e]{3,9}[0-9]+f", r"(ab|90){2,5}", r"[0-9]{1,12}", r"a(b|cd)*e?", r"[a-j0-9]*", r"x|abcdefghij[0-5]{2,4}"]


def follow(text: str, said: list[int]) -> list[int]:
    """What may follow, from a matcher that reads the whole answer anew."""
    grammars = Grammars(lambda: WORDS)
    grammars.join(_plan([(0, text, said)]))
    masks, failed = grammars.masks(np.array([0]))
    assert not failed.any()
    return list(np.flatnonzero(unpack(masks, VOCAB)[0]))


def reference(ids: list[int], most: int, pattern: str) -> list[int]:
    """The fake runner's answer to a prompt: sequential, no cache, no batch."""
    out: list[int] = []
    while len(out) < most and (not out or out[-1] != EOS):
        out.append(next_token(np.array(ids + out, np.int32), VOCAB, np.array(follow(grammar.regex(pattern), out), np.int32)))
    text = "".join(LETTERS[t] for t in out)
    assert out[-1] != EOS or re.fullmatch(pattern, text)
    return out


@pytest.mark.parametrize("grammar_waits_for_token", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_answers_under_retraction_are_those_of_the_slow_loop(seed: int, grammar_waits_for_token: bool) -> None:
    rng = random.Random(seed)
    loop = Loop(
        num_pages=rng.choice([11, 40]),
        max_steps_in_flight=rng.choice([1, 2, 3]),
        grammar_waits_for_token=grammar_waits_for_token,
    )
    loop.runner.grammars = Grammars(lambda: WORDS)
    want: dict[int, list[int]] = {}
    plain: list[int] = []
    for _ in range(10):
        ids = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 9))]
        most = rng.randrange(1, 22)
        if rng.random() < 0.3:
            plain.append(loop.add(ids, most))
            continue
        pattern = rng.choice(PATTERNS)
        want[loop.add(ids, most, grammar=grammar.regex(pattern))] = reference(ids, most, pattern)
        for _ in range(rng.randrange(4)):
            loop.step()
    loop.run()
    assert {uid: loop.said[uid] for uid in want} == want
    for uid, tokens in want.items():
        assert loop.ends[uid] is (Finish.STOP if tokens[-1] == EOS else Finish.LENGTH)
    loop.asked = {uid: loop.asked[uid] for uid in plain}
    loop.ends = {uid: loop.ends[uid] for uid in plain}
    loop.check_answers()
    assert not loop.machine.table.with_grammar


def test_some_of_these_runs_retract_bound_requests() -> None:
    loop = Loop(num_pages=11)
    loop.runner.grammars = Grammars(lambda: WORDS)
    uids = [loop.add([i + 1], 20, grammar=grammar.regex(r"[a-j]{18}")) for i in range(4)]
    loop.run()
    assert loop.machine.counters.retractions > 0
    assert any(plan.said.size for plan in loop.plans)
    assert all(loop.said[uid] == reference([i + 1], 20, "[a-j]{18}") for i, uid in enumerate(uids))


def test_bound_rows_wait_for_their_tokens_and_the_others_do_not() -> None:
    loop = Loop(grammar_waits_for_token=True)
    loop.runner.grammars = Grammars(lambda: WORDS)
    bound = loop.add([1, 2], 12, grammar=grammar.regex("[a-j]{12}"))
    free = loop.add([3, 4], 12)
    loop.run()
    assert len(loop.said[bound]) == 12
    batches: list[list[int]] = []  # the slots that decode in each step
    for plan in loop.plans:
        batches.append(batches[-1] if plan.decode is None else plan.decode.tolist())
    rows = [{b: sum(s == b for s in batch) for b in (0, 1)} for batch in batches]
    first = next(i for i, row in enumerate(rows) if row[0])
    assert all(not (a[0] and b[0]) for a, b in zip(rows[first:], rows[first + 1 :], strict=False) if a[1] and b[1])
    assert free in loop.ends


def test_plans_without_grammars_say_nothing_of_them_and_others_come_back_as_they_were() -> None:
    plan = StepPlan(3)
    assert len(plan.pack()) == 64
    plan.grammars = np.array([(1, 5, 2), (7, 0, 0), (2, 3, 0)], GRAMMAR)
    plan.said, plan.grammar_text = np.array([4, 5], np.int32), "äbcdxyz".encode()
    back = StepPlan.unpack(plan.pack())
    assert back.grammars.tolist() == plan.grammars.tolist()
    assert back.said.tolist() == [4, 5]
    assert back.grammar_text == plan.grammar_text
    with pytest.raises(ValueError, match="header"):
        StepPlan.unpack(plan.pack()[:-1])


def test_a_slot_forgets_the_grammar_of_its_former_owner() -> None:
    loop = Loop(slots=1)
    loop.runner.grammars = Grammars(lambda: WORDS)
    loop.add([1, 2], 5, grammar=grammar.regex("[0-9]{5}"))
    uid = loop.add([3, 4], 5)
    third = loop.add([5, 6], 5)
    loop.run()
    assert not loop.runner.grammars
    assert [loop.said[u] for u in (uid, third)] == [plain_reference(*loop.asked[u], VOCAB, (EOS,)) for u in (uid, third)]
    assert [len(plan.grammars) for plan in loop.plans if len(plan.new_slots)] == [1, 1, 0]


def test_a_grammar_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    loop.runner.grammars = Grammars(lambda: WORDS)
    bad = loop.add([1, 2], 9, grammar=grammar.regex("[a-j]{9}"))
    good = loop.add([1, 3], 9)
    masks, calls = loop.runner.grammars.masks, []

    def failing(slots: Any) -> Any:
        calls.append(1)
        words, failed = masks(slots)
        return words, failed | (len(calls) == 4)

    monkeypatch.setattr(loop.runner.grammars, "masks", failing)
    loop.run()
    assert loop.ends[bad] is Finish.GRAMMAR
    assert len(loop.said[bad]) == 3
    assert FAILED not in loop.said[bad]
    assert len(loop.said[good]) == 9 or loop.ends[good] is Finish.STOP


# ---------------- planted bugs
def _the_past_is_left_behind(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(
        "minisgl.actors.scheduler.plan_builder.grammar_of",
        lambda r: (r.params.grammar.encode(), r.ids[:0]),
    )


def _draws_are_not_read(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Grammars, "advance", lambda self, slots, tokens: None)


def _slots_keep_their_grammar(plant: pytest.MonkeyPatch) -> None:
    real = Grammars.join

    def join(self: Grammars, plan: StepPlan) -> None:
        plan.grammars = plan.grammars[plan.grammars["n_bytes"] > 0]
        real(self, plan)

    plant.setattr(Grammars, "join", join)


@pytest.mark.parametrize("plant", [_the_past_is_left_behind, _draws_are_not_read, _slots_keep_their_grammar])
def test_planted_bugs_are_noticed(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for test in (test_some_of_these_runs_retract_bound_requests, test_a_slot_forgets_the_grammar_of_its_former_owner):
        try:
            test()
        except AssertionError:
            return
    raise AssertionError("nothing was noticed")


# ---------------- masks
@pytest.mark.parametrize("seed", range(30))
def test_what_may_follow_is_what_a_regular_expression_can_be_continued_with(seed: int) -> None:
    """Tried out on all texts up to a length, of a pattern in which no text is forced."""
    rng = random.Random(seed)
    atoms = ["[ab]", "[0-2]", "(a|0)", "(ab|b)", "[ab]{0,2}", "(1|22)*", "b?"]
    pattern = "".join(rng.choice(atoms) for _ in range(rng.randrange(1, 4))) + "(a|0)?"
    texts = ["".join(t) for n in range(7) for t in itertools.product("ab012", repeat=n)]
    full = {t for t in texts if re.fullmatch(pattern, t)}
    begun = {t[:i] for t in full for i in range(len(t) + 1)}
    said: list[int] = []
    for _ in range(3):
        text = "".join(LETTERS[t] for t in said)
        want = {t for t in range(1, VOCAB) if text + LETTERS[t] in begun} | ({EOS} if text in full else set())
        got = set(follow(grammar.regex(pattern), said))
        forced = EOS not in want and len({LETTERS[t][0] for t in want}) == 1  # then it may be written in one way only
        assert got == want or (forced and len(got) == 1 and got < want)
        if not (said := [*said, rng.choice(sorted(got))])[-1]:
            break


def test_masks_are_what_a_regular_expression_says() -> None:
    grammars = Grammars(lambda: WORDS)
    grammars.join(_plan([(0, grammar.regex("[ab]{2}|90x?"), [])]))
    slots = np.array([0])

    def allowed() -> set[str]:
        masks, _ = grammars.masks(slots)
        return {LETTERS[t] for t in np.flatnonzero(unpack(masks, VOCAB)[0])}

    assert allowed() == {"a", "b", "ab", "9", "90"}
    grammars.advance(slots, np.array([LETTERS.index("a")], np.int32))
    assert allowed() == {"a", "b"}
    grammars.advance(slots, np.array([LETTERS.index("b")], np.int32))
    assert allowed() == {""}
    grammars.advance(slots, np.array([EOS], np.int32))
    assert allowed() == {""}


def test_every_eos_token_ends_what_one_of_them_may_end_and_specials_are_never_text() -> None:
    words = Vocabulary([b"a", b"b", b"</s>", b"<|end|>", b"ab"], frozenset({4}), (3, 2))
    grammars = Grammars(lambda: words)
    grammars.join(_plan([(5, grammar.regex("(ab?)+"), [0])]))
    masks, _ = grammars.masks(np.array([5]))
    assert np.flatnonzero(unpack(masks, 5)[0]).tolist() == [0, 1, 2, 3]


def test_a_grammar_outranks_what_forbids_its_only_tokens() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0, -torch.inf]])
    allowed = torch.tensor([[False, True, False, True]])
    assert restrict(logits, allowed).tolist() == [
        [-torch.inf, pytest.approx(LAST_RESORT), -torch.inf, pytest.approx(LAST_RESORT)]
    ]
    allowed[0, 0] = True
    assert restrict(logits, allowed).argmax().item() == 0


def _plan(owners: list[tuple[int, str, list[int]]]) -> StepPlan:
    plan = StepPlan(0)
    texts = [text.encode() for _, text, _ in owners]
    plan.grammars = np.array([(slot, len(t), len(said)) for (slot, _, said), t in zip(owners, texts, strict=True)], GRAMMAR)
    plan.said = np.array([t for *_, said in owners for t in said], np.int32)
    plan.grammar_text = b"".join(texts)
    return plan


# ---------------- with a model
def test_the_worker_draws_the_masked_argmax_and_leaves_other_rows_alone(tmp_path: Any) -> None:
    save_llama(tmp_path)
    config = Config(resolve(str(tmp_path)), EngineConfig(kv_tokens=512, page_size=4, max_running=4, step_tokens=64, threads=1))
    words = Vocabulary([bytes([i]) for i in range(128)] + [b""] * 75, frozenset(), (202,))
    pattern = r"[0-9]{2}(-[a-z]{3}){2}"

    def run(bound: dict[int, str]) -> tuple[dict[int, list[int]], list[np.ndarray]]:
        runner = make_runner(config, 0, str(tmp_path))
        runner._grammars = Grammars(lambda: words)
        runner.allocate(config.engine.kv_tokens // 4)
        driver, rows = Driver(128, 4), []
        model = runner._model
        runner._model = lambda *a: rows.append(model(*a)) or rows[-1]  # type: ignore[assignment, method-assign]
        for slot in range(3):
            driver.join(slot, temperature=0.0 if slot < 2 else 0.8, seed=7)
        plan = driver.plan([(s, [3 + s, 5, 8], True) for s in range(3)])
        entered = _plan([(s, text, []) for s, text in bound.items()])
        if bound:
            plan.grammars, plan.said, plan.grammar_text = entered.grammars, entered.said, entered.grammar_text
        said: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for _ in range(11):
            tokens = runner.launch(plan).result().tokens.tolist()
            for slot, token in enumerate(tokens):
                said[slot].append(token)
            plan = driver.plan(decode=[0, 1, 2])
        runner.close()
        return said, [r.numpy() for r in rows]

    free, _ = run({})
    bound, logits = run({0: grammar.regex(pattern), 2: grammar.regex(pattern)})
    assert bound[1] == free[1]
    for slot in (0, 2):
        assert bound[slot][10] == 202
        assert re.fullmatch(pattern, b"".join(words.tokens[t] for t in bound[slot]).decode())
    text = ""
    for step, token in enumerate(bound[0]):  # greedy: the most likely of what may follow, tried one by one
        follow = [t for t in range(128) if _may_follow(text + chr(t))] or [202]
        assert token == max(follow, key=lambda t: (logits[step][0][t], -t))
        text += words.tokens[token].decode()


def _may_follow(text: str) -> bool:
    shape = "dd-aaa-aaa"
    return len(text) <= 10 and all(
        (c.isdigit() and c < ":") if k == "d" else c == "-" if k == "-" else "a" <= c <= "z"
        for c, k in zip(text, shape, strict=False)
    )


def test_the_vocabulary_of_a_checkpoint_has_its_bytes(tmp_path: Any) -> None:
    save_llama(tmp_path)
    save_byte_tokenizer(tmp_path)
    words = vocabulary_of(resolve(str(tmp_path)))
    assert words.tokens == [bytes([i]) for i in range(203)]
    assert words.encode("Az") == [65, 122]


# ---------------- grammars from requests
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (grammar.regex("[a-"), "unclosed character class"),
        (grammar.json_schema({"type": "objet"}), "objet"),
        (grammar.json_schema({"not": {"type": "string"}}), "not"),
        (grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (grammar.lark("start: foo"), "foo"),
        (grammar.choice(["x" * (1 << 17)]), "characters"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused_in_a_sentence(text: str, why: str) -> None:
    with pytest.raises(InvalidParam, match=why) as e:
        grammar.check(text, "response_format")
    assert e.value.param == "response_format"
    assert e.value.message.endswith(".")


def test_ebnf_may_be_gbnf_or_lark() -> None:
    for text in ('root ::= "a" [0-9]+', 'start: "a" /[0-9]+/'):
        grammars = Grammars(lambda: WORDS)
        grammars.join(_plan([(0, grammar.ebnf(text), [LETTERS.index("a")])]))
        masks, _ = grammars.masks(np.array([0]))
        assert {LETTERS[t] for t in np.flatnonzero(unpack(masks, VOCAB)[0])} == {*"0123456789", "90"}
    with pytest.raises(InvalidParam, match="grammar"):
        grammar.ebnf("root ::= foo")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(["object", "array", "string", "integer", "boolean", "enum", "null"])
    if kind == "object" and depth:
        names = rng.sample(["a", "b", "name", "ü", "x y"], rng.randrange(1, 4))
        required = [n for n in names if rng.random() < 0.7]
        properties = {n: random_schema(rng, depth - 1) for n in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array" and depth:
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": 3}
    if kind == "enum":
        return {"enum": rng.sample([1, "one", None, True, 'zwei "2"', -3], 3)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randrange(-20, 5), "maximum": rng.randrange(5, 300)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    return {"type": "string", "maxLength": rng.randrange(1, 9)}


def matches(value: Any, schema: dict[str, Any]) -> bool:
    """JSON schema, as far as `random_schema` goes."""
    if "enum" in schema:
        return any(value == e and type(value) is type(e) for e in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        known = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
        return known and all(matches(v, schema["properties"][k]) for k, v in value.items())
    if kind == "array":
        sized = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return sized and all(matches(v, schema["items"]) for v in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_drawn_under_a_random_schema_is_admitted_by_it(seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    grammar.check(text := grammar.json_schema(schema), "response_format")
    tokens = [bytes([i]) for i in range(256)] + [b'": ', b', "', b'{"', b'"}', b"tr", b"null", b"</s>", "ü".encode(), b'"a']
    grammars = Grammars(lambda: Vocabulary(tokens, frozenset(), (262,)))
    for _ in range(4):
        grammars.join(_plan([(0, text, [])]))
        out = b""
        for _ in range(400):
            masks, failed = grammars.masks(np.array([0]))
            assert not failed.any()
            follow = np.flatnonzero(unpack(masks, len(tokens))[0]).tolist()
            token = rng.choice(follow)
            if token == 262:
                break
            out += tokens[token]
            grammars.advance(np.array([0]), np.array([token], np.int32))
        assert matches(json.loads(out), schema), (schema, out)


def test_a_request_of_a_replay_brings_what_it_has_said() -> None:
    request = Request(1, np.array([1, 2, 3, 4, 5], np.int32), 20, 0, SamplingParams(grammar=grammar.regex("a*")), n_prompt=3)
    assert grammar_of(request)[1].tolist() == [4, 5]
