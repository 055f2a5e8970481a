"""Tokenizers of directories against transformers' AutoTokenizer: tokens beside tokenizer.json, spaces, other files."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minisgl.config import ModelSpec
from minisgl.errors import InvalidParam, UserError
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["hello world", "hell on earth, held in hands", "the world wide web  and more", "a b c d é ü"] * 4
WORDS = ["hello", "world", "  ", " ", "\n", "held", "<tool>", "<s>", "</s>", "[PAD]", "é", "x", ",", "<a>b", "the", "wide web"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False))
    return backend


def metaspace(scheme: str = "always", *, fallback: bool = False) -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "first")
    own = decoders.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), own]) if fallback else own
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return backend


def sentencepiece() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=tokens[:3], show_progress=False))
    return backend


def wordpiece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return backend


KINDS: dict[str, Any] = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "metaspace with bytes": lambda: metaspace(fallback=True),
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
}


def spec_of(path: Path, vocab_size: int = 1 << 16) -> ModelSpec:
    return replace(random_shape("qwen3-0.6b"), path=str(path), format="safetensors", vocab_size=vocab_size)


def write(path: Path, backend: Backend | None = None, **files: Any) -> Path:
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
    for name, value in {"config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def both(path: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return load_tokenizer(spec_of(path)), AutoTokenizer.from_pretrained(path)


def texts(seed: object, n: int = 30) -> list[str]:
    rng = random.Random(str(seed))
    return ["".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 9))) for _ in range(n)]


def assert_equal(ours: Tokenizer, theirs: Any, seed: object) -> None:
    """Encoding with and without special tokens, and decoding of that and of any tokens."""
    rng = random.Random(str(seed))
    for text in texts(seed):
        for special in (True, False):
            ids = ours.encode(text, add_special=special).tolist()
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (text, skip)
        ids = [rng.randrange(len(theirs)) for _ in range(6)]
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True), ids


def added(backend: Backend, seed: object) -> dict[str, Any]:
    """A tokenizer_config.json with tokens that tokenizer.json lacks."""
    rng, n = random.Random(str(seed)), backend.get_vocab_size()
    new = [{"content": "<tool>", "special": rng.random() < 0.5}, {"content": "<a>", "special": True}, {"content": "wide web"}]
    flags = [{key: rng.random() < 0.3 for key in ("lstrip", "rstrip", "single_word", "normalized")} for _ in new]
    for token, flag in zip(new, flags, strict=True):  # the library does not skip special tokens that are normalised
        flag["normalized"] &= not token.get("special")
    decoder = {str(n + i): {**token, **flag} for i, (token, flag) in enumerate(zip(new, flags, strict=True))}
    names = {"bos_token": "<s>", "eos_token": "</s>"} if backend.token_to_id("<s>") else {}
    ends = {key: rng.random() < 0.5 for key in ("add_bos_token", "add_eos_token") if names and rng.random() < 0.5}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder, **names, **ends}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_of_the_configuration_are_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    backend = KINDS[kind]()
    if seed and backend.token_to_id("<s>"):
        one = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[one])
    config = added(backend, f"{kind}{seed}")
    ours, theirs = both(write(tmp_path, backend, tokenizer_config=config))
    assert_equal(ours, theirs, f"{kind}{seed}")
    for i, token in config["added_tokens_decoder"].items():
        assert int(i) in ours.encode(token["content"], add_special=False)


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "sentencepiece"])
def test_tokens_of_older_files_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    backend = KINDS[kind]()
    n = backend.get_vocab_size()
    files = {
        "added_tokens": {"<tool>": n, "<a>": n + 1},
        "special_tokens_map": {"eos_token": "<tool>", "pad_token": {"content": "[PAD]"}, "bos_token": "<s>"},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    assert_equal(*both(write(tmp_path, backend, **files)), kind)


def test_a_special_token_that_the_model_has_no_embedding_for_is_left_out(tmp_path: Path) -> None:
    backend = byte_level()
    write(tmp_path, backend, tokenizer_config={"pad_token": "[PAD]"})
    n = backend.get_vocab_size()
    assert n in load_tokenizer(spec_of(tmp_path, n + 1)).encode("a[PAD]", False)
    assert len(load_tokenizer(spec_of(tmp_path, n)).encode("a[PAD]", False)) > 2


def test_a_token_with_another_id_than_the_configuration_says_is_refused(tmp_path: Path) -> None:
    backend = byte_level()
    write(tmp_path, backend, tokenizer_config={"added_tokens_decoder": {"7777": {"content": "<tool>"}}})
    with pytest.raises(UserError, match=r"'<tool>' has the id 7777 in tokenizer_config\.json"):
        load_tokenizer(spec_of(tmp_path))
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {"x": 1}})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: added_tokens_decoder has 'x'"):
        load_tokenizer(spec_of(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_spaces(kind: str, tmp_path: Path) -> None:
    """Tokens that are decoded one by one behind others join to the text of all of them, and so does an echo."""
    ours = load_tokenizer(spec_of(write(tmp_path, KINDS[kind]())))
    for text in [*texts(kind, 20), "hello world wide", "the world"]:
        ids = ours.encode(text, add_special=False).tolist()
        whole = ours.decode(ids, False)
        for cut in range(1, len(ids)):
            if not (begin := ours.decode(ids[:cut], False)) or begin.endswith("\ufffd"):
                continue
            stream = ours.stream(False)
            assert begin + "".join([*map(stream.push, ids[cut:]), stream.flush()]) == whole, (text, cut)
        stream = ours.stream(False)
        pieces = [*map(stream.push, ids), stream.flush()]
        first = next(i for i, piece in enumerate(pieces) if piece)
        assert "".join([ours.opening(ids[first], pieces[first]), *pieces[first + 1 :]]) == whole


def test_a_directory_with_vocabulary_and_merges_is_converted(tmp_path: Path) -> None:
    backend = byte_level()
    backend.model.save(str(tmp_path))
    files = {"config": {"model_type": "qwen2"}, "tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}
    ours, theirs = both(write(tmp_path, **files))
    for text in texts(3):
        ids = ours.encode(text, add_special=True).tolist()
        assert ids == theirs.encode(text)
        assert ours.decode(ids, False) == theirs.decode(ids)


@pytest.mark.parametrize("files", [(), ("tokenizer.model",), ("vocab.json",), ("tokenizer_config.json",)])
def test_a_directory_without_a_tokenizer_is_refused_in_a_sentence(files: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path)
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer\.json in it, and .*\. Add the model's tokenizer\.json\.$") as e:
        load_tokenizer(spec_of(tmp_path))
    assert "\n" not in str(e.value)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "sentencepiece" else find(name, *more))
    with pytest.raises(UserError) as e:
        load_tokenizer(spec_of(tmp_path))
    assert "pip install sentencepiece protobuf" in str(e.value)
    [command] = re.findall(r'python -c "(.*)"\.', str(e.value))
    compile(command, "command", "exec")
    assert command.count(repr(str(tmp_path))) == 2


def test_tokens_beyond_the_embedding_are_refused_by_name(tmp_path: Path) -> None:
    backend = byte_level()
    n = backend.get_vocab_size()
    write(tmp_path, backend, tokenizer_config={"added_tokens_decoder": {str(n): {"content": "<tool>"}}})
    with pytest.raises(InvalidParam, match="holds the token '<tool>', which this model has no embedding for"):
        load_tokenizer(spec_of(tmp_path, n)).encode("<tool>", False)
