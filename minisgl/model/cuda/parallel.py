"""Sums and gathers over the ranks on NVIDIA GPUs (all-reduce, all-gather), on the current stream and usable inside graphs.

Small all-reduces, which are nearly all of a decode step, go through *symmetric memory*: a buffer on every GPU that the kernels
of all ranks can address.  Each rank puts its summand there and reads those of all others ("one-shot"): one exchange of signals,
where a ring needs 2 (size - 1) hops.  It reads size - 1 times the message, so larger sums, and gathers, go through NCCL.

The sums of a model's layers are not collectives of their own where symmetric memory is to be had: the kernel of the norm that
follows exchanges, adds and normalises (kernels/rank_sums.py).

The host never waits here after construction, and all buffers that a graph may refer to have fixed addresses.  A graph that
captured a collective must be dropped before `close`, and its replays, like all other collectives, must be on one stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from minisgl.model.common.activations import Product, Summand
from minisgl.model.common.parallel import Parallel, all_gather_single, join, to_stderr
from minisgl.model.kernels.rank_sums import DTYPES, EMPTY, RankSums

# Measured by others: with 8 GPUs, one-shot above 256 KB loses 3 to 7 % to multicast (vllm-project/vllm issue 44079); with two
# H100s it took 10 us for 32 tokens and was slower than NCCL from 64 tokens on (vllm-project/vllm pull request 22086).
ONE_SHOT_BYTES = 256 << 10
ROOM_BYTES = 32 << 20  # at most, of a sum within a norm; a larger one takes several launches
_LARGEST = {2: None, 3: 2 << 20, 4: 2 << 20}  # bytes of such a sum: each goes to every peer, where a ring passes each on once
_LARGEST_ELSE = 512 << 10
_MAX_RANKS = 16  # torch's kernel signals with up to 24 blocks x size words of 4 bytes, and the signal pad may have 2048 bytes
_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)  # the dtypes that torch's kernel adds
_VECTOR = 16  # bytes that a thread of the kernel reads at once
_REACH_MS = 60_000  # time for a peer to answer when all have connected
_SOCKET_PATH_MAX = 107  # bytes; a limit of AF_UNIX, which torch does not check


def use_one_shot(nbytes: int, size: int, limit: int = ONE_SHOT_BYTES) -> bool:
    """Whether a sum of `nbytes` over `size` ranks goes through symmetric memory.  All ranks get the same answer."""
    return 1 < size <= _MAX_RANKS and 0 < nbytes <= limit and nbytes % _VECTOR == 0


class CudaParallel(Parallel):
    """One rank on its own GPU."""

    def __init__(
        self,
        rank: int,
        size: int,
        group: dist.ProcessGroup,
        symmetric: SymmetricMemory | None,
        *,
        one_shot_bytes: int = ONE_SHOT_BYTES,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        """Set up symmetric memory, if any is given.  Collective: all ranks of `group` (NCCL's) construct at the same time.

        Where that fails (no peer access, another torch) every sum goes through the group, on all ranks, and one of them says
        why.  one_shot_bytes: the largest sum for symmetric memory, and the size of the buffer.  say: prints for the user.
        """
        super().__init__(rank, size, group=group)
        self._limit = one_shot_bytes
        self._symmetric: SymmetricMemory | None = None
        if symmetric is not None:
            reason = self._set_up(symmetric)
            if reason is None:
                self._symmetric = symmetric
            elif reason:
                say(f"all-reduces of every size go through {dist.get_backend(group)}: rank {rank}: {reason}")

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place.  The result is bitwise the same on every rank.

        One-shot sums: every rank adds the same summands in the order of the ranks (`load_and_reduce` in torch's
        CUDASymmetricMemory-inl.h).  NCCL: each element is reduced in one place and the result is copied.

        The path depends on shape and dtype, which all ranks have in common; never on an address.
        """
        sums = self.norm_sums
        if sums is not None and x.dim() == 2 and x.is_contiguous() and sums.takes(x):
            return sums.total(x, out=x)
        if self._symmetric is not None and self.is_one_shot(x):
            self._symmetric.all_reduce_(x)
            return x
        return self._all_reduce_large_(x)

    @property
    def norm_sums(self) -> RankSums | None:
        """Sums within norms, where there is symmetric memory and the model's dtype allows them."""
        return None if self._symmetric is None else self._symmetric.norm_sums

    @property
    def needs_tensors(self) -> bool:
        return self.norm_sums is None

    def sum_over_ranks(self, part: Product) -> Product:
        """This rank's part as a Summand, whose reader adds up: one kernel for the exchange, the sum and the norm behind it."""
        if isinstance(part, Summand):
            return part
        if self.norm_sums is not None and self.norm_sums.takes(part):
            return Summand(part, self.norm_sums)
        return self.all_reduce_(part if isinstance(part, torch.Tensor) else part.float())

    def is_one_shot(self, x: torch.Tensor) -> bool:
        """Whether a sum of x's shape and dtype goes through symmetric memory."""
        if self._symmetric is None or x.dtype not in _ONE_SHOT_DTYPES:
            return False
        return use_one_shot(x.nbytes, self.size, self._limit)

    def _all_reduce_large_(self, x: torch.Tensor) -> torch.Tensor:
        return super().all_reduce_(x)

    def close(self) -> None:
        """Free the buffers and leave the group.  Idempotent.  Graphs that captured a collective must have been dropped."""
        self._symmetric = None
        super().close()

    def _set_up(self, symmetric: SymmetricMemory) -> str | None:
        """None if every rank can use it.  Otherwise no rank does: this rank's reason, or "" if another rank has one."""
        for stage in (symmetric.allocate, symmetric.connect, symmetric.try_out):
            reason = ""
            try:
                stage()
            except Exception as e:  # RuntimeError of the driver, AttributeError of another torch, ...: all mean the same
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            # The lowest rank that failed, or `size`: all ranks learn of a failure, and exactly one reports it.
            device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
            first = torch.tensor([self.rank if reason else self.size], device=device)
            dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self._group)
            if first.item() < self.size:
                return reason if first.item() == self.rank else ""
        return None


class SharedGpuParallel(CudaParallel):
    """All ranks on one GPU, which NCCL refuses.  For checks: slow, because the driver runs the ranks' kernels by turns.

    All collectives go through symmetric memory, so that they can be captured; the group (gloo's) only sets it up.
    """

    def _set_up(self, symmetric: SymmetricMemory) -> str | None:
        """Raises RuntimeError on all ranks if symmetric memory cannot be had."""
        reason = super()._set_up(symmetric)
        if reason is not None:
            raise RuntimeError(f"ranks can share a GPU only through symmetric memory, which cannot be set up here: {reason}")
        return None

    def _all_reduce_large_(self, x: torch.Tensor) -> torch.Tensor:
        """Same summands, same kernel, same shape on every rank: bitwise the same result."""
        return x.copy_(self._gather(x.contiguous()).sum(0))

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        assert self._symmetric is not None
        return self._symmetric.gather(x)


class SymmetricMemory:
    """torch's symmetric memory, without multicast: a buffer on every rank that all ranks can address.

    It is set up in three stages, `allocate`, `connect` and `try_out`, each called on all ranks or on none.

    One buffer serves all calls.  A call writes this rank's buffer, exchanges signals, reads the others' buffers, and exchanges
    signals again.  So when a call has finished on this rank, its peers have read this rank's buffer, and the next call on the
    stream may write it.  In `gather` these are two barriers; in `all_reduce_` they are inside torch's kernel
    (`one_shot_all_reduce_kernel` in CUDASymmetricMemoryOps.cu: each block signals its counterparts on all ranks at its
    beginning and at its end, and a kernel has finished when all of its blocks have).

    torch's `one_shot_all_reduce_copy` would save the copy into the buffer, but its blocks signal without waiting until all of
    their threads have copied (torch 2.11).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        nbytes: int,
        run_dir: str,
        *,
        dtype: torch.dtype | None = None,
        width: int | None = None,
    ) -> None:
        """Allocates nothing yet.  nbytes: size of the buffer, rounded up to full vectors; the same on all ranks.

        dtype, width: of the model's sums; another buffer is for those within norms (`norm_sums`), if they can have it.
        """
        self._group = group
        self._device = device
        self._nbytes = -(-nbytes // _VECTOR) * _VECTOR
        self._run_dir = run_dir
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._dtype, self._width = dtype if dtype in DTYPES else None, width
        self._largest = _LARGEST.get(self._size, _LARGEST_ELSE)
        self.norm_sums: RankSums | None = None

    def allocate(self) -> None:
        """Allocate this rank's buffer.

        Raises RuntimeError without peer access, AttributeError in a torch without symmetric memory.
        """
        where = self._device if dist.get_backend(self._group) == "nccl" else "cpu"
        devices = torch.empty(self._size, dtype=torch.int64, device=where)
        all_gather_single(devices, torch.tensor([self._device.index], device=where), group=self._group)
        # Only local work from here on, so a failure leaves no other rank waiting.
        for peer in devices.tolist():
            if peer != self._device.index and not torch.cuda.can_device_access_peer(self._device, peer):
                raise RuntimeError(f"GPU {self._device.index} has no peer access to GPU {peer}")
        if len(f"{self._run_dir}/symm_mem-4194304".encode()) > _SOCKET_PATH_MAX:
            raise RuntimeError(f"the run directory {self._run_dir} is too long for a Unix socket")
        from torch._C._distributed_c10d import _SymmetricMemory

        self._all_reduce = torch.ops.symm_mem.one_shot_all_reduce_out.default
        # Not `empty` of torch's module: it returns a piece of a pool, and the kernels need the beginning of an allocation.
        self._mine = _SymmetricMemory.empty_strided_p2p((self._nbytes,), (1,), torch.uint8, self._device)
        if self._dtype is not None:
            shape = (RankSums.words(self._size, min(ROOM_BYTES, self._largest or ROOM_BYTES) // 2),)
            self._inbox = _SymmetricMemory.empty_strided_p2p(shape, (1,), torch.int16, self._device).fill_(EMPTY)

    def connect(self) -> None:
        """Map the buffers of all ranks.

        Raises the errors of torch or the driver.  If only some ranks fail, the others wait for the store's timeout.
        """
        from torch._C._distributed_c10d import _SymmetricMemory

        # The ranks pass file descriptors through sockets with guessable names in $TMPDIR, so that is a private directory.
        with _environ("TMPDIR", self._run_dir):
            self._handle = _SymmetricMemory.rendezvous(self._mine, self._group.group_name)
            if self._dtype is not None:
                self._inboxes = _SymmetricMemory.rendezvous(self._inbox, self._group.group_name)
        if self._dtype is not None:
            inboxes = [self._inboxes.get_buffer(r, self._inbox.shape, torch.int16) for r in range(self._size)]
            processors = torch.cuda.get_device_properties(self._device).multi_processor_count
            self.norm_sums = RankSums(
                self._rank,
                inboxes,
                self._dtype,
                processors=processors,
                width=self._width,
                largest=self._largest,
            )

    def try_out(self) -> None:
        """Check a sum whose result is known, to find peer access that the driver reports and the host's IOMMU breaks.

        Raises RuntimeError for a wrong sum.  If a peer cannot be signalled, the kernel traps after a minute: the process loses
        its GPU, and the start ends with an error instead of a hang.
        """
        self._handle.barrier(0, _REACH_MS)
        count = min(self._nbytes, 4096) // 4
        sums = [torch.full((count,), self._rank + 1, dtype=dtype, device=self._device) for dtype in _ONE_SHOT_DTYPES]
        for x in sums:  # all sums before the first check: a rank that left early would keep the others waiting
            self.all_reduce_(x)
        if self.norm_sums is not None:
            for rows in (1, 2, 2, 1):  # both places of a row, and twice
                part = torch.full((rows, 64), self._rank + 1, dtype=self._dtype, device=self._device)
                sums.append(self.norm_sums.total(part))
        if any(bool((x != self._size * (self._size + 1) // 2).any()) for x in sums):
            raise RuntimeError("the GPUs' memory reads back wrong from each other")

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum over the ranks, in place, of a tensor that `use_one_shot` allows."""
        mine = self._mine.view(x.dtype)[: x.numel()].view(x.shape)
        mine.copy_(x)
        fits = x.is_contiguous() and x.data_ptr() % _VECTOR == 0
        out = x if fits else torch.empty_like(x, memory_format=torch.contiguous_format)
        self._all_reduce(mine, "sum", self._group.group_name, out)
        if not fits:
            x.copy_(out)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous [...] of any size -> [size, ...].  A tensor larger than the buffer goes in pieces."""
        flat = x.view(-1)
        out = x.new_empty(self._size, len(flat))
        step = self._nbytes // x.itemsize
        for start in range(0, len(flat), step):
            piece = flat[start : start + step]
            self._mine.view(x.dtype)[: len(piece)].copy_(piece)
            self._handle.barrier(0)
            for rank in range(self._size):
                theirs = self._handle.get_buffer(rank, (len(piece),), x.dtype)
                out[rank, start : start + step].copy_(theirs)
            self._handle.barrier(0)
        return out.view(self._size, *x.shape)


@contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


Kind = Literal["gloo", "nccl", "shared-gpu"]


def make_parallel(
    kind: Kind,
    rank: int,
    size: int,
    run_dir: str,
    device: torch.device | None = None,
    *,
    one_shot_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    say: Callable[[str], None] = to_stderr,
) -> Parallel:
    """The collectives of this rank; returns when all ranks have called it with the same arguments.

    kind: "gloo" for tensors on the CPU, "nccl" for one GPU per rank, "shared-gpu" for all ranks on one GPU (slow; for checks on
    a machine that has no second one).  device: this rank's GPU, already current.  one_shot_bytes (0: never), say: see
    CudaParallel.  dtype, width: of the model's sums (see RankSums); without a dtype there are none within norms.

    Raises RuntimeError where the kind cannot work: no such backend in this torch, or no symmetric memory for "shared-gpu".
    """
    if size == 1:
        return Parallel()
    if kind == "gloo":
        return Parallel(rank, size, run_dir)
    if device is None or device.index is None:
        raise ValueError(f'kind "{kind}" needs a device with an index')
    limit = ONE_SHOT_BYTES if one_shot_bytes is None else one_shot_bytes
    if kind == "nccl":
        group = join("nccl", rank, size, run_dir, device)
        small = SymmetricMemory(group, device, limit, run_dir, dtype=dtype, width=width) if limit else None
        return CudaParallel(rank, size, group, small, one_shot_bytes=limit, say=say)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    group = join("gloo", rank, size, run_dir)
    memory = SymmetricMemory(group, device, max(limit, 8 << 20), run_dir, dtype=dtype, width=width)
    return SharedGpuParallel(rank, size, group, memory, one_shot_bytes=limit, say=say)
