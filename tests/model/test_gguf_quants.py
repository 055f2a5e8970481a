"""Every quantisation of GGUF files: the loader against the gguf package, and against each format's definition read slowly.

The layouts are those of ggml's block_* structs (ggml-common.h) and dequantize_row_* functions (ggml-quants.c).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from minisgl.errors import UserError
from minisgl.model.checkpoint import weights as checkpoint
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve

OUT, IN = 24, 512
NAME = "model.layers.0.mlp.down_proj.weight"


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], np.float16)[0])


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def nibbles(packed: bytes) -> list[int]:
    """Low halves of all bytes, then the high halves."""
    return [b & 15 for b in packed] + [b >> 4 for b in packed]


def q4_0(b: bytes) -> list[float]:
    return [half(b, 0) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b: bytes) -> list[float]:
    return [half(b, 0) * q + half(b, 2) for q in nibbles(b[4:])]


def fifth(bits: bytes) -> list[int]:
    return [(int.from_bytes(bits, "little") >> i & 1) << 4 for i in range(32)]


def q5_0(b: bytes) -> list[float]:
    return [half(b, 0) * ((q | h) - 16) for q, h in zip(nibbles(b[6:]), fifth(b[2:6]), strict=True)]


def q5_1(b: bytes) -> list[float]:
    return [half(b, 0) * (q | h) + half(b, 2) for q, h in zip(nibbles(b[8:]), fifth(b[4:8]), strict=True)]


def q8_0(b: bytes) -> list[float]:
    return [half(b, 0) * signed(q) for q in b[2:]]


def q2_k(b: bytes) -> list[float]:
    """scales[16] (4-bit scale, 4-bit minimum), qs[64], d, dmin: 128 values at a time, four of two bits in a byte."""
    out = []
    for i in range(256):
        chunk, within = divmod(i, 128)
        q = b[16 + 32 * chunk + within % 32] >> 2 * (within // 32) & 3
        scale = b[i // 16]
        out.append(half(b, 80) * (scale & 15) * q - half(b, 82) * (scale >> 4))
    return out


def q3_k(b: bytes) -> list[float]:
    """hmask[32], qs[64], scales[12], d: the third bit is in hmask; 16 scales of six bits."""
    s = b[96:108]
    low = [s[j] & 15 for j in range(8)] + [s[j] >> 4 for j in range(8)]
    scales = [(low[j] | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 for j in range(16)]
    out = []
    for i in range(256):
        chunk, within = divmod(i, 128)
        q = b[32 + 32 * chunk + within % 32] >> 2 * (within // 32) & 3
        high = b[i % 32] >> (i // 32) & 1
        out.append(half(b, 108) * scales[i // 16] * (q - (0 if high else 4)))
    return out


def six_bits(s: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4: the j-th of eight scales and minima in twelve bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4


def q4_k(b: bytes) -> list[float]:
    """d, dmin, scales[12], qs[128]: eight groups of 32; two groups share 32 bytes."""
    out = []
    for i in range(256):
        group = i // 32
        scale, minimum = six_bits(b[4:16], group)
        q = b[16 + 32 * (group // 2) + i % 32] >> 4 * (group % 2) & 15
        out.append(half(b, 0) * scale * q - half(b, 2) * minimum)
    return out


def q5_k(b: bytes) -> list[float]:
    """As Q4_K, with the fifth bit of group g in bit g of qh[32], which stands before qs."""
    out = []
    for i in range(256):
        group = i // 32
        scale, minimum = six_bits(b[4:16], group)
        q = b[48 + 32 * (group // 2) + i % 32] >> 4 * (group % 2) & 15 | (b[16 + i % 32] >> group & 1) << 4
        out.append(half(b, 0) * scale * q - half(b, 2) * minimum)
    return out


def q6_k(b: bytes) -> list[float]:
    """ql[128], qh[64], scales[16] (signed), d: 128 values at a time in four groups of 32."""
    out = []
    for i in range(256):
        chunk, within = divmod(i, 128)
        group, at = divmod(within, 32)
        low = b[64 * chunk + 32 * (group % 2) + at] >> 4 * (group // 2) & 15
        high = b[128 + 32 * chunk + at] >> 2 * group & 3
        out.append(half(b, 208) * signed(b[192 + i // 16]) * ((low | high << 4) - 32))
    return out


def bf16(b: bytes) -> list[float]:
    return [float(np.frombuffer(b"\0\0" + b, np.float32)[0])]


# Kind -> its definition, and where a block keeps float16 numbers (random bytes there could be infinite).
SLOW: dict[Kind, tuple[Callable[[bytes], list[float]], tuple[int, ...]]] = {
    Kind.F32: (lambda b: [float(np.frombuffer(b, np.float32)[0])], ()),
    Kind.F16: (lambda b: [half(b, 0)], ()),
    Kind.BF16: (bf16, ()),
    Kind.Q8_0: (q8_0, (0,)),
    Kind.Q4_0: (q4_0, (0,)),
    Kind.Q4_1: (q4_1, (0, 2)),
    Kind.Q5_0: (q5_0, (0,)),
    Kind.Q5_1: (q5_1, (0, 2)),
    Kind.Q2_K: (q2_k, (80, 82)),
    Kind.Q3_K: (q3_k, (108,)),
    Kind.Q4_K: (q4_k, (0, 2)),
    Kind.Q5_K: (q5_k, (0, 2)),
    Kind.Q6_K: (q6_k, (208,)),
}
KINDS = pytest.mark.parametrize("kind", SLOW, ids=lambda kind: kind.name)


def random_bytes(kind: Kind) -> np.ndarray:
    """u8[OUT, bytes per row]: any bits, and scales of ordinary size."""
    rng = np.random.default_rng(kind)
    block, size = GGML_QUANT_SIZES[kind]
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        return gguf.quantize(rng.standard_normal((OUT, IN)).astype(np.float32), kind).view(np.uint8).reshape(OUT, -1)
    raw = rng.integers(0, 256, (OUT * IN // block, size), dtype=np.uint8)
    for at in SLOW[kind][1]:
        raw[:, at : at + 2] = rng.uniform(0.01, 2, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(OUT, -1)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """kind -> (spec of a file whose only matrix of interest has that kind, its bytes)."""
    folder = tmp_path_factory.mktemp("quants")

    def write(kind: Kind):
        raw = random_bytes(kind)
        writer = gguf.GGUFWriter(str(folder / f"{kind.name}.gguf"), "llama")
        sizes = {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": OUT,
            "feed_forward_length": IN,
            "attention.head_count": 1,
        }
        for key, value in sizes.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_tensor("token_embd.weight", np.zeros((8, OUT), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((OUT, OUT), np.float32))
        block, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor("blk.0.ffn_down.weight", raw.reshape(OUT, IN // block * size), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return resolve(str(folder / f"{kind.name}.gguf")), raw

    return write


@KINDS
def test_a_tensor_is_what_its_format_says_and_what_the_gguf_package_reads(kind, file_of):
    spec, raw = file_of(kind)
    ours = open_weights(spec, torch.float32).take(NAME, (OUT, IN))
    slow, (_, size) = SLOW[kind][0], GGML_QUANT_SIZES[kind]
    flat = raw.tobytes()
    by_definition = [v for at in range(0, len(flat), size) for v in slow(flat[at : at + size])]
    assert torch.equal(ours, torch.from_numpy(gguf.dequantize(raw, kind).reshape(OUT, IN).copy()))
    expected = torch.tensor(by_definition, dtype=torch.float64).view(OUT, IN)
    assert torch.isfinite(expected).all()
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


@KINDS
def test_rows_and_columns_are_cut_out_of_the_whole_wherever_they_begin(kind, file_of, monkeypatch):
    spec, _ = file_of(kind)
    weights = open_weights(spec, torch.bfloat16)
    whole = open_weights(spec, torch.float32).take(NAME, (OUT, IN)).bfloat16()
    monkeypatch.setattr(checkpoint, "PIECE", 1500)  # a few rows at a time
    assert torch.equal(weights.take(NAME, (OUT, IN)), whole)
    assert torch.equal(weights.take(NAME, (OUT, IN), rows=(5, 18)), whole[5:18])
    for cols in ((0, 256), (256, 512), (171, 342), (511, 512)):
        part = weights.take(NAME, (OUT, IN), cols=cols)
        assert torch.equal(part, whole[:, slice(*cols)])
        assert part.untyped_storage().nbytes() == part.nbytes


def test_a_kind_that_the_package_cannot_read_is_named(file_of, monkeypatch):
    spec, _ = file_of(Kind.Q8_0)

    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("gguf.quants.dequantize", unknown)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_down\.weight is stored as Q8_0, which cannot be read"):
        open_weights(spec, torch.float32).take(NAME, (OUT, IN))


def test_a_tensor_of_another_shape_or_none_is_named(file_of):
    weights = open_weights(file_of(Kind.Q8_0)[0], torch.float32)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_down\.weight has shape \(24, 512\), .* \(24, 500\)"):
        weights.take(NAME, (OUT, 500))
    with pytest.raises(UserError, match=r"lacks the tensor blk\.0\.attn_q\.bias"):
        weights.take("model.layers.0.self_attn.q_proj.bias", (OUT,))
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.0\.mlp\.lost\.weight"):
        weights.take("model.layers.0.mlp.lost.weight", (OUT,))
    with pytest.raises(UserError, match=r"no place for: blk\.0\.attn_q\.weight, blk\.0\.ffn_down\.weight, token_embd\.weight"):
        open_weights(dataclasses.replace(file_of(Kind.F16)[0]), torch.float32).finish()
