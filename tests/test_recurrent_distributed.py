"""DistributedDataParallel: two processes (gloo, on the loopback) make the gradients of one."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import seqfuse
from seqfuse.testing import assert_accurate


class Model(torch.nn.Module):
    """An LSTM with lengths and peepholes, a GRU with heads, a step of a cell."""

    def __init__(self):
        super().__init__()
        self.lstm = seqfuse.nn.LSTM(4, 6, bidirectional=True, peephole=True, batch_first=True)
        self.gru = seqfuse.nn.GRU(12, 6, heads=2, batch_first=True)
        self.cell = seqfuse.nn.LSTMCell(6, 5)

    def forward(self, x, lengths):
        y, _ = self.gru(self.lstm(x, lengths=lengths)[0], lengths=lengths)
        return self.cell(y[:, 0])[0].square().sum(-1) + y.square().sum((1, 2))


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 7, 4), torch.tensor([7, 2, 5, 1, 7, 3])


def gradients(model, x, lengths):
    model(x, lengths).mean().backward()
    return [p.grad for p in model.parameters()]


def worker(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    x, lengths = batch()
    half = slice(3 * rank, 3 * rank + 3)
    for _ in range(2):  # the second backward uses the buckets as the first one rebuilt them
        model.zero_grad()
        grads = gradients(model, x[half], lengths[half])
    results.put((rank, [g.numpy() for g in grads]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout=100)
    assert all(p.exitcode == 0 for p in processes)
    got = dict(results.get() for _ in processes)
    torch.manual_seed(0)
    model, (x, lengths) = Model(), batch()
    one = [g.clone() for g in gradients(model, x, lengths)]
    model.zero_grad()
    exact = gradients(model.double(), x.double(), lengths)
    for first, second, alone, truth in zip(got[0], got[1], one, exact, strict=True):
        assert (first == second).all()
        assert_accurate(torch.from_numpy(first), truth, alone)
