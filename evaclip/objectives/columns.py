"""The columns of a matrix whose rows are spread over processes.

A process owns the rows of its images and meets every column, the captions of all processes. A sweep hands out the
columns block by block: their values, and places to add up what belongs to them over the rows of all processes. How the
columns travel is hidden behind that:

* gathered: every process holds all captions (B x D in 16 bits, 201 MB at a batch of 131,072 and 768 dimensions); what
  was added up goes home in a reduce-scatter per chunk, while the next chunk is computed.
* ring: the captions move from neighbour to neighbour with their totals close behind, as in ring attention (Liu et al.,
  arXiv 2310.01889, section 3). Memory is that of two neighbours, whatever the batch; latency grows with the number of
  processes.

Blocks come in the same order on every call, so results have the same bits on every run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup

# Reduce-scatters that may fly at a time; each holds the totals of a chunk.
IN_FLIGHT = 1


class Gathered:
    """The rows of every process, on their way since this was made."""

    def __init__(self, rows: Tensor, group: ProcessGroup) -> None:
        """`rows`: [local, ...], the same shape in every process of the group."""
        self._shape = (group.size(), *rows.shape)
        self._flat = rows.new_empty(group.size() * rows.numel())  # gloo takes no more than one dimension
        self._work: Any = dist.all_gather_into_tensor(self._flat, rows.detach().reshape(-1), group, async_op=True)

    def wait(self) -> Tensor:
        """[processes, local, ...]"""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._flat.view(self._shape)


@dataclass
class Total:
    """A number or a vector per column, added up over the rows of all processes."""

    home: Tensor
    """[local, ...]: the totals of this process's own columns, whole once `wait` was called; at first as `started`."""
    op: Literal["sum", "max"] = "sum"
    works: list[Any] = field(default_factory=list)

    def started(self, *leading: int) -> Tensor:
        """Totals of no rows at all, shaped like those of `leading` columns."""
        return self.home.new_full((*leading, *self.home.shape[1:]), 0.0 if self.op == "sum" else -torch.inf)

    def wait(self) -> Tensor:
        """The finished totals."""
        while self.works:
            self.works.pop(0).wait()
        return self.home

    def merge(self, into: Tensor, other: Tensor) -> None:
        """Combine the totals of two sets of rows."""
        if self.op == "sum":
            into.add_(other)
        else:
            torch.maximum(into, other, out=into)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Between whom and how the captions travel."""

    group: ProcessGroup | None = None
    """The processes whose rows form the batch; None for this one alone."""
    ring: bool = False
    """Pass the captions round instead of gathering them."""
    arriving: Gathered | None = None
    """The captions of all processes when their journey began earlier, see `early_exchange`."""
    returning: list[Total] = field(default_factory=list)
    """The captions' gradient on its way home when somebody waits for it later, see `early_exchange`."""
    waited_for: bool = False

    def brought_home(self, total: Total) -> Tensor:
        """The captions' gradient: whole, or on its way when somebody waits for it later."""
        if not self.waited_for:
            return total.wait()
        self.returning.append(total)
        return total.home

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.size()


@dataclass(frozen=True)
class Block:
    """Some columns of one process."""

    values: tuple[Tensor, ...]
    totals: tuple[Tensor, ...]
    """To be added to, in place."""
    own: slice | None
    """Where these columns stand among this process's own, None for another's."""


def sent_off(rows: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor | Gathered]:
    """This process's rows, and what `sweep` takes to see those of all; gathering begins now if it has not before."""
    if exchange.group is None or exchange.ring:
        return rows, rows
    gathered = exchange.arriving or Gathered(rows, exchange.group)
    return gathered.wait()[dist.get_rank(exchange.group)], gathered  # a view: the rows are not kept twice


def sweep(
    values: Sequence[Tensor | Gathered],
    totals: Sequence[Total],
    exchange: Exchange,
    *,
    chunk: int,
) -> Iterator[Block]:
    """Every column once. `values`: [local, ...] each, or already on their way. `chunk`: most columns of a block."""
    group = exchange.group
    if group is None or group.size() == 1:
        return _alone([v.wait()[0] if isinstance(v, Gathered) else v for v in values], totals, chunk)
    if exchange.ring:
        return _ring([v for v in values if isinstance(v, Tensor)], totals, group, chunk)
    gathered = [v if isinstance(v, Gathered) else Gathered(v, group) for v in values]
    return _gathered([v.wait() for v in gathered], totals, group, chunk)


def slices(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _alone(values: Sequence[Tensor], totals: Sequence[Total], chunk: int) -> Iterator[Block]:
    for part in slices(len(values[0]), chunk):
        yield Block(tuple(v[part] for v in values), tuple(t.home[part] for t in totals), part)


def _gathered(values: Sequence[Tensor], totals: Sequence[Total], group: ProcessGroup, chunk: int) -> Iterator[Block]:
    """A chunk is the same slice of every process's columns, so its totals are one reduce-scatter."""
    size, rank = group.size(), dist.get_rank(group)
    for part in slices(values[0].shape[1], chunk):
        buffers = [t.started(size, part.stop - part.start) for t in totals]
        for owner in range(size):
            own = part if owner == rank else None
            yield Block(tuple(v[owner, part] for v in values), tuple(b[owner] for b in buffers), own)
        for total, buffer in zip(totals, buffers, strict=True):
            if len(total.works) == IN_FLIGHT:
                total.works.pop(0).wait()
            total.works.append(_Scattered(buffer, total.home[part], total.op, group))


class _Scattered:
    """A reduce-scatter in flight; it keeps its input alive."""

    def __init__(self, buffer: Tensor, home: Tensor, op: str, group: ProcessGroup) -> None:
        operation = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        self._buffer = buffer
        self._work: Any = dist.reduce_scatter_tensor(home.view(-1), buffer.view(-1), operation, group, async_op=True)

    def wait(self) -> None:
        self._work.wait()


def _ring(values: Sequence[Tensor], totals: Sequence[Total], group: ProcessGroup, chunk: int) -> Iterator[Block]:
    """At hop h a process works on the columns of the process h places before it."""
    size = group.size()
    values = [v.contiguous() for v in values]
    received: list[Tensor] = []
    arriving: list[Any] = []
    for hop in range(size):
        last = hop == size - 1
        coming, moving = ([], []) if last else _passed_on(values, group)
        own = [t.started(len(t.home)) for t in totals]
        for part in slices(len(values[0]), chunk):
            yield Block(tuple(v[part] for v in values), tuple(o[part] for o in own), part if hop == 0 else None)
        for work in arriving:
            work.wait()
        # Before the first hop nothing has come.
        for total, mine, other in zip(totals, own, received, strict=False):
            total.merge(mine, other)
        # What the process before this one has just finished are the columns that come here next.
        sent = own  # stays alive while it travels
        received, arriving = _passed_on(sent, group)
        for work in moving:
            work.wait()
        values = coming
    for work in arriving:
        work.wait()
    for total, other in zip(totals, received, strict=True):
        total.home.copy_(other)


def _passed_on(tensors: Sequence[Tensor], group: ProcessGroup) -> tuple[list[Tensor], list[Any]]:
    """Start sending to the next process and receiving from the one before; nothing is there before the works end."""
    size, rank = group.size(), dist.get_rank(group)
    after = dist.get_global_rank(group, (rank + 1) % size)
    before = dist.get_global_rank(group, (rank - 1) % size)
    received = [torch.empty_like(t) for t in tensors]
    sends = [dist.P2POp(dist.isend, t, after, group) for t in tensors]
    receives = [dist.P2POp(dist.irecv, t, before, group) for t in received]
    return received, dist.batch_isend_irecv([*sends, *receives])


def early_exchange(
    text: Float[Tensor, "local dim"], exchange: Exchange, precision: Literal["fp16", "fp32"] = "fp16"
) -> tuple[Float[Tensor, "local dim"], Exchange]:
    """Send the captions off now, to be waited for by the loss, and wait for their gradient as late as can be.

    Call it between the text tower and the image tower: the gathering flies under the image tower's forward pass, and
    since autograd goes backwards through the same order, the gradient's way home under its backward pass.
    """
    rows = text.detach().to(torch.float16 if precision == "fp16" else torch.float32)
    assert exchange.group is not None and not exchange.ring
    early = replace(exchange, arriving=Gathered(rows, exchange.group), returning=[], waited_for=True)
    return _WaitForGradient.apply(text, early), early  # type: ignore[return-value]


class _WaitForGradient(torch.autograd.Function):
    """The identity, whose backward pass waits until the gradient it was given is whole."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return text.view_as(text)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        while ctx.exchange.returning:
            ctx.exchange.returning.pop().wait()
        return gradient, None


def mean(values: Tensor, exchange: Exchange) -> Tensor:
    """The mean over the processes."""
    if exchange.group is not None:
        dist.all_reduce(values, group=exchange.group)
    return values / exchange.processes
