"""Sums over ranks within norms: every rank in this process, one after the other, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if not torch.cuda.is_available():
    import interpreter  # noqa: F401  before the kernels

from minisgl.model.common.activations import PartialSums, Product, Quantized, Scaled, Summand, plain
from minisgl.model.cuda.layers import Norm
from minisgl.model.cuda.parallel import CudaParallel
from minisgl.model.kernels.rank_sums import EMPTY, TURNS, RankSums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16
EPS = 1e-5


class Ranks:
    """`size` ranks without concurrency: before a rank runs, the parts of those behind it are put into its buffer by hand."""

    def __init__(self, size: int, room: int, processors: int = 2, largest: int | None = None) -> None:
        self.size, self.room, self.used = size, room, {}
        words = RankSums.words(size, room)
        self.inboxes = [torch.full((words,), EMPTY, dtype=torch.int16, device=DEVICE) for _ in range(size)]
        options = {"processors": processors, "largest": largest}
        self.ranks = [RankSums(rank, self.inboxes, DTYPE, **options) for rank in range(size)]

    def place(self, rank: int, sender: int, turn: int, values: int) -> torch.Tensor:
        places = self.inboxes[rank].view(TURNS, self.size - 1, self.room)
        return places[turn, sender if sender < rank else sender - 1, :values]

    def send_ahead(self, rank: int, parts: list[torch.Tensor], turn: int) -> None:
        for sender in range(rank + 1, self.size):
            bits = parts[sender].reshape(-1).view(torch.int16)
            self.place(rank, sender, turn, bits.numel()).copy_(torch.where(bits == EMPTY, 0, bits))

    def take_late(self, rank: int, parts: list[torch.Tensor], turn: int) -> None:
        """What came from the ranks behind when they ran is what was put there by hand; take it out again."""
        for sender in range(rank + 1, self.size):
            place = self.place(rank, sender, turn, parts[sender].numel())
            assert torch.equal(place.view(DTYPE).float(), parts[sender].reshape(-1).float())
            place.fill_(EMPTY)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def in_form(x: torch.Tensor, kind: str) -> Product:
    """Rows of small whole numbers, whatever the form: exact."""
    if kind == "parts":
        return PartialSums(torch.stack([x.float() - 3, torch.full_like(x, 3.0).float()]))
    if kind == "scaled":
        rows, columns = torch.full((len(x), 1), 0.5, device=DEVICE), torch.full((x.shape[1],), 2.0, device=DEVICE)
        return Scaled(x, rows, columns)
    return x


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "parts", "scaled"])
def test_every_rank_adds_all_parts_to_its_residual_and_normalises_with_the_same_bits(size: int, kind: str) -> None:
    torch.manual_seed(size)
    rows, width = 5, 96  # more rows than programs
    ranks, weight = Ranks(size, 1024), rand(width)
    for step in range(3):
        parts = [torch.randint(-8, 8, (rows, width), device=DEVICE).to(DTYPE) for _ in range(size)]
        x, total = rand(rows, width), sum(p.float() for p in parts)
        kept, outs = [], []
        for rank, sums in enumerate(ranks.ranks):
            ranks.send_ahead(rank, parts, step % 2)
            kept.append(x.clone())
            out = sums.add_rms_norm(kept[-1], in_form(parts[rank], kind), weight, EPS)
            assert isinstance(out, torch.Tensor)
            outs.append(out)
        assert error(kept[0], x.float() + total) < 1e-3
        assert error(outs[0], F.rms_norm(kept[0].float(), (width,), weight.float(), EPS)) < 2e-3
        assert all(torch.equal(k, kept[0]) for k in kept)
        assert all(torch.equal(o, outs[0]) for o in outs)
        for rank in range(size):
            ranks.take_late(rank, parts, step % 2)
        assert all(bool((inbox == EMPTY).all()) for inbox in ranks.inboxes)  # whatever was sent has been read


def test_what_a_rank_sends_stands_in_the_place_of_the_turn_until_it_is_read() -> None:
    rows, width = 3, 64
    ranks, parts = Ranks(2, 512), [rand(rows, width), rand(rows, width)]
    parts[0][1, 7] = -0.0  # what is sent is never EMPTY
    for turn in (0, 1, 0):
        ranks.send_ahead(0, parts, turn)
        total = ranks.ranks[0].total(parts[0])
        assert error(total, parts[0].float() + parts[1].float()) < 1e-3
        sent = ranks.place(1, 0, turn, rows * width)
        assert not bool((sent == EMPTY).any())
        assert torch.equal(sent.view(DTYPE).view(rows, width), parts[0])
        assert bool((ranks.place(1, 0, 1 - turn, rows * width) == EMPTY).all())
        assert torch.equal(ranks.ranks[1].total(parts[1]), total)
        ranks.take_late(0, parts, turn)


def test_rows_take_turns_of_their_own() -> None:
    """Steps have different numbers of rows: a row's next place is the other one, whatever the rows beside it did."""
    width, ranks = 64, Ranks(2, 512)
    turns = [0] * 6
    for rows in (2, 6, 1, 3, 6):
        parts = [rand(rows, width), rand(rows, width)]
        for row in range(rows):
            ranks.place(0, 1, turns[row], 512)[row * width : (row + 1) * width].copy_(parts[1][row].view(torch.int16))
            turns[row] = 1 - turns[row]
        total = ranks.ranks[0].total(parts[0])
        assert error(total, parts[0].float() + parts[1].float()) < 1e-3
        assert torch.equal(ranks.ranks[1].total(parts[1]), total)


def test_more_rows_than_there_is_room_for_go_in_several_launches() -> None:
    rows, width, ranks = 4, 64, Ranks(2, 2 * 64)
    x, weight, parts = rand(rows, width), rand(width), [rand(rows, width), rand(rows, width)]
    for turn in (0, 1):  # two launches of two rows
        ranks.send_ahead(0, [p[2 * turn : 2 * turn + 2] for p in parts], turn)
    kept = [x.clone(), x.clone()]
    outs = [r.add_rms_norm(k, p, weight, EPS) for r, k, p in zip(ranks.ranks, kept, parts, strict=True)]
    assert error(kept[0], x.float() + parts[0].float() + parts[1].float()) < 2e-3
    assert torch.equal(kept[0], kept[1])
    assert isinstance(outs[0], torch.Tensor)
    assert torch.equal(outs[0], outs[1])


def test_a_norm_into_float8_scales_each_row() -> None:
    ranks, x, weight = Ranks(2, 512), rand(3, 128), rand(128)
    parts = [rand(3, 128), rand(3, 128)]
    ranks.send_ahead(0, parts, 0)
    norm = Norm(weight, EPS, quantize=True)
    kept = x.clone()
    got = norm(kept, Summand(parts[0], ranks.ranks[0]))
    assert isinstance(got, Quantized)
    want = F.rms_norm(kept.float(), (128,), weight.float(), EPS)
    assert error(got.values.float() * got.scales, want) < 0.1


def test_readers_other_than_norms_find_the_sum() -> None:
    ranks, parts = Ranks(2, 512), [rand(4, 64), rand(4, 64)]
    want = parts[0].float() + parts[1].float()
    ranks.send_ahead(0, parts, 0)
    assert error(plain(Summand(parts[0], ranks.ranks[0])), want) < 1e-3
    some = torch.tensor([2, 0], device=DEVICE)
    ranks.inboxes[0].fill_(EMPTY)
    ranks.send_ahead(0, [p[some] for p in parts], 1)
    assert error(Summand(parts[0], ranks.ranks[0])[some].float(), want[some]) < 1e-3


def test_rows_of_another_width_are_not_taken_because_they_would_lie_across_places() -> None:
    inboxes = Ranks(2, 512).inboxes
    sums = RankSums(0, inboxes, DTYPE, processors=2, width=64)
    assert sums.takes(rand(3, 64))
    assert not sums.takes(rand(3, 32))
    assert RankSums(0, inboxes, DTYPE, processors=2).takes(rand(3, 32))


def test_only_what_all_ranks_can_exchange_becomes_a_summand() -> None:
    class Symmetric:
        norm_sums = Ranks(2, 512, largest=2 * 64 * 3).ranks[0]

        def nothing(self) -> None: ...

        allocate = connect = try_out = nothing

    parallel = CudaParallel.__new__(CudaParallel)
    parallel.rank, parallel.size, parallel._limit, parallel._symmetric = 0, 2, 0, Symmetric()  # type: ignore[assignment]
    summed: list[torch.Tensor] = []
    parallel._all_reduce_large_ = lambda x: summed.append(x) or x  # type: ignore[method-assign, func-returns-value]
    assert not parallel.needs_tensors
    assert isinstance(parallel.sum_over_ranks(rand(3, 64)), Summand)
    assert isinstance(parallel.sum_over_ranks(in_form(rand(3, 64), "parts")), Summand)
    large = rand(4, 64)
    assert parallel.sum_over_ranks(large) is large
    parts = parallel.sum_over_ranks(in_form(large, "parts"))
    assert isinstance(parts, torch.Tensor)
    assert error(parts, large) < 1e-3
    assert len(summed) == 2
