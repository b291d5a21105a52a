"""Sequences of different lengths in one batch, without sorting and without packing by the user.

Two forms. *Padded*: [T, B, X], for backends that stop each sequence at its length. *Rows*: [N, X], N = sum(lengths),
the rows that exist, sequence after sequence: every GEMM and the scan then touch nothing else. Rows need the lengths on
the CPU; the whole stack of layers stays in that form, so the batch is gathered once and scattered once.
"""

from typing import NamedTuple

import torch

from seqfuse.ops.autograd import apply, traced


class Ragged(NamedTuple):
    """lengths: [B] int64. steps: T of the padded batch. rows: whether sequences are rows, else they are padded.
    index: [N] int64, the rows b*T + t that exist; None where the CPU extension copies them by their lengths.

    In rows, lengths is on the CPU and holds no zero.
    """

    lengths: torch.Tensor
    steps: int
    rows: bool = False
    index: torch.Tensor | None = None

    def pack(self, padded):
        """[T, B, ...] -> [N, ...]."""
        if self.index is None:
            return _copied(_Pack, padded, self.lengths)
        T, B = padded.shape[:2]
        if padded.is_contiguous():
            return padded.reshape(T * B, *padded.shape[2:]).index_select(0, self.index % T * B + self.index // T)
        return padded.transpose(0, 1).reshape(T * B, *padded.shape[2:]).index_select(0, self.index)

    def pad(self, rows, batch_major=False):
        """[N, X] -> [T, B, X], zeros where no row is; batch_major: a view of [B, T, X] memory."""
        if self.index is None:
            return _copied(_Pad, rows, self.lengths, self.steps, batch_major)
        T, B = self.steps, self.lengths.shape[0]
        index = self.index if batch_major else self.index % T * B + self.index // T
        padded = rows.new_zeros(T * B, *rows.shape[1:]).index_copy(0, index, rows)
        shape = (B, T) if batch_major else (T, B)
        padded = padded.view(*shape, *rows.shape[1:])
        return padded.transpose(0, 1) if batch_major else padded

    def spread(self, per_sequence):
        """[B, X] to what multiplies a batch of this form: itself, or [N, X]."""
        return per_sequence if not self.rows else per_sequence.repeat_interleave(self.lengths, 0)

    def first_rows(self, reverse):
        """[B]: the row at which each sequence's scan begins."""
        ends = self.lengths.cumsum(0)
        return ends - 1 if reverse else ends - self.lengths

    def active(self):
        """[T, B] bool: the steps that exist."""
        return torch.arange(self.steps, device=self.lengths.device)[:, None] < self.lengths

    def first_steps(self, reverse):
        """[T, B] bool: the step at which each sequence's scan begins."""
        first = self.lengths - 1 if reverse else torch.zeros_like(self.lengths)
        return torch.arange(self.steps, device=self.lengths.device)[:, None] == first


def check_lengths(op, lengths, steps, batch, device):
    """lengths as an int64 tensor [B]: on the CPU as given there, else on `device`. GPU lengths are not looked at."""
    if not isinstance(lengths, torch.Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{op}: lengths must be int64 of shape [{batch}] (one number for each sequence), got {lengths!r}"
            ) from None
    if lengths.dtype not in (torch.int64, torch.int32) or tuple(lengths.shape) != (batch,):
        kind = f"a {str(lengths.dtype).removeprefix('torch.')} tensor of shape {list(lengths.shape)}"
        raise ValueError(f"{op}: lengths must be int64 of shape [{batch}] (one number for each sequence), got {kind}")
    lengths = lengths.long()
    if lengths.device.type != "cpu":
        if lengths.device != device:
            raise ValueError(f"{op}: lengths is on {lengths.device}, but x is on {device}: use x's device or the CPU")
        return lengths
    if not traced() and batch:
        least, most = lengths.aminmax()
        if int(least) < 1 or int(most) > steps:
            wrong = int(least) if int(least) < 1 else int(most)
            raise ValueError(f"{op}: lengths must lie between 1 and T = {steps}, got {wrong}")
    return lengths


def rows_of(lengths, steps):
    """The batch as rows, on the CPU."""
    return Ragged(lengths, steps, True, _index(lengths, steps) if traced() else None)


def _index(lengths, steps):
    exists = torch.arange(steps) < lengths[:, None]  # (B, T)
    return exists.reshape(-1).nonzero().squeeze(1)


def shifted(states, lengths, first, reverse):
    """Rows [N, X] on the CPU moved on by one step of the scan; first: [B, X], where sequences begin; None: zeros."""
    return torch.ops.seqfuse.rnn_shift(states, lengths, first, reverse)


class _Pack(torch.autograd.Function):
    """[T, B, X] -> [N, X]."""

    @staticmethod
    def forward(padded, lengths):
        return torch.ops.seqfuse.rnn_pack(padded, lengths)

    @staticmethod
    def setup_context(ctx, inputs, output):
        padded, ctx.lengths = inputs
        ctx.steps, ctx.batch_major = padded.shape[0], not padded.is_contiguous()

    @staticmethod
    def backward(ctx, d_rows):
        return apply(_Pad, d_rows, ctx.lengths, ctx.steps, ctx.batch_major), None


class _Pad(torch.autograd.Function):
    """[N, X] -> [T, B, X], zeros where no row is."""

    @staticmethod
    def forward(rows, lengths, steps, batch_major):
        return torch.ops.seqfuse.rnn_pad(rows, lengths, steps, batch_major)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.lengths = inputs[1]

    @staticmethod
    def backward(ctx, d_padded):
        return apply(_Pack, d_padded, ctx.lengths), None, None, None


def _copied(function, sequence, *args):
    """One of the two above, also for a sequence of single numbers: [T, B] or [N]."""
    if sequence.dim() == (3 if function is _Pack else 2):
        return apply(function, sequence, *args)
    return apply(function, sequence.unsqueeze(-1), *args).squeeze(-1)


class PackedRows(NamedTuple):
    """How a torch PackedSequence maps to rows. order: [N], the row of its data that each of ours is."""

    ragged: Ragged
    order: torch.Tensor

    def take(self, data):
        return data.index_select(0, self.order)

    def give(self, rows):
        return torch.empty_like(rows).index_copy(0, self.order, rows)


def of_packed_sequence(batch_sizes):
    """batch_sizes: [T] int64 on the CPU, how many sequences have a step t (never growing), as in PackedSequence."""
    T, B = batch_sizes.shape[0], int(batch_sizes[0])
    exists = torch.arange(B)[:, None] < batch_sizes  # (B, T)
    lengths = exists.sum(1)
    index = exists.reshape(-1).nonzero().squeeze(1)
    first = batch_sizes.cumsum(0) - batch_sizes  # where step t begins in the data
    return PackedRows(Ragged(lengths, T, True, index), first[index % T] + index // T)
