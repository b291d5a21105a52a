"""What differs when several processes train one model, as torchrun starts them. In one process: nothing.

    ddp     each process has the whole model; gradients are averaged while the backward pass runs
    fsdp    each process has a share of every weight, gradient and moment (FSDP2), and gathers a block when it needs it

Each global batch is cut into as many shares as there are processes, in order; which examples it holds is decided by
the task alone. So the number of processes changes neither the order of the data nor, but for rounding, the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from seqfuse.models import files
from seqfuse.models.blocks import Block
from seqfuse.models.files import CheckpointError
from seqfuse.models.heads import Head


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises ValueError for what there is not."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


class Lost(Exception):
    """Another process of the group has gone."""


def says_lost(error: Exception) -> bool:
    """Whether an error says that another process has gone."""
    words = ("gloo", "NCCL", "Connection", "peer")
    return distributed.is_initialized() and isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def parts(indices: list[int], count: int) -> list[list[int]]:
    """Indices cut into `count` parts of almost one size, in order; some are empty if there are fewer indices."""
    bounds = [len(indices) * i // count for i in range(count + 1)]
    return [indices[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, or the tensor itself: one memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Group:
    """The processes that train together; this one is number `rank` of `size`. Here: one alone."""

    rank, size = 0, 1
    sharded = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, indices: list[int], accumulate: int) -> list[list[int]]:
        """The parts of a global batch that this process works off, one after another. All processes have equally many;
        where there are more processes than examples, some are empty."""
        largest = -(-len(indices) // self.size)
        return parts(parts(indices, self.size)[self.rank], max(1, min(accumulate, largest)))

    def wrap(self, loss: nn.Module, sharding: str) -> nn.Module:
        """What computes the loss and its gradients on all processes."""
        return loss

    def quiet(self, loss: nn.Module):
        """A backward pass inside exchanges no gradients yet."""
        return contextlib.nullcontext()

    def gathered(self, loss: nn.Module):
        """Methods of the model may be called inside, not only `loss`."""
        return contextlib.nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        return tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """All rows of a tensor [rows of the global batch, ...], of which each process knows those of its share."""
        return tensor

    def agree(self, value):
        """What the first process has."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors by name, as the first process is to write them."""
        return files.tensors_of(model)


class Processes(Group):
    """Those that torchrun started, joined by torch.distributed."""

    def __init__(self):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def wrap(self, loss, sharding):
        if sharding == "fsdp":
            self.sharded = True
            # blocks give out views, and nothing changes them in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            for module in loss.modules():
                if isinstance(module, Block):
                    fully_shard(module)
            root = fully_shard(loss)
            # The root is what runs first, and a resumed run may begin with an evaluation, which calls the model inside:
            # a block would become the root. There is no public way to say it.
            root._get_fsdp_state()._lazy_init()
            return root
        device = next(loss.parameters()).device
        ids = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():  # newer versions of torch have another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                loss, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True,
                find_unused_parameters=isinstance(loss.model, Head),  # its body's pooler or output layer
            )  # fmt: skip

    def quiet(self, loss):
        # FSDP would have to keep whole gradients between the parts: it exchanges them each time
        return contextlib.nullcontext() if self.sharded else loss.no_sync()

    @contextlib.contextmanager
    def gathered(self, loss):
        if self.sharded:
            loss.unshard()  # what is in no block; blocks gather themselves when they are called
        try:
            yield
        finally:
            if self.sharded:
                loss.reshard()

    def sum(self, tensor):
        distributed.all_reduce(tensor)
        return tensor

    def rows(self, tensor):
        own = torch.zeros_like(tensor)
        for i in parts(list(range(len(tensor))), self.size)[self.rank]:
            own[i] = tensor[i]
        return self.sum(own)

    def agree(self, value):
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def wait(self):
        distributed.all_reduce(torch.zeros(1))  # by gloo, which has half an hour of patience; a barrier would be NCCL's

    def whole(self, model):
        if not self.sharded:
            return super().whole(model)
        names = files.tensors_of(model)
        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = sharded.get_model_state_dict(model, options=options)
        return {name: tensors[name] for name in names if name in tensors}  # empty but on the first process


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Group, torch.device]]:
    """The group that this process was started in, and its device: of torchrun's processes each has a GPU of its own."""
    where = pick_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Group(), where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    distributed.init_process_group("cuda:nccl,cpu:gloo" if where.type == "cuda" else "gloo")
    group = Processes()
    try:
        yield group, where
    except (RuntimeError, distributed.DistError) as error:
        if not says_lost(error):
            raise
        reason = str(error).splitlines()[0]
        raise Lost(f"process {group.rank} of {group.size} lost another one ({reason})") from error
    else:
        _leave(group)


def _leave(group: Group) -> None:
    """Together: a process that leaves early takes the connections along that others still need.

    The group itself is never taken apart, the end of the process does that: its destructor, called by
    DistributedDataParallel's under the interpreter's lock, waits for gloo's threads, which may want that lock to let go
    of what they summed. Processes now and then hung in their last moment.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(distributed.group.WORLD))
    group.wait()
    distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ checkpoints in shares


def _shares(loss: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> dict:
    model, moments = sharded.get_state_dict(loss, optimizer)
    names = [name for name, p in loss.named_parameters() if p.requires_grad]
    return {"model": model, "optimizer": moments, "average": dict(zip(names, average, strict=bool(average)))}


def save_shares(folder: Path, loss: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> None:
    """Every process writes its share of weights, moments and averages; all must call it. What goes wrong on any of
    them is raised on all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(_shares(loss, optimizer, average), checkpoint_id=folder)
    except dcp.CheckpointException as error:  # no Exception to Python: a bundle of those of all processes
        reason, _ = next(iter(error.failures.values()))
        raise reason from None


def load_shares(folder: Path, loss: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> None:
    """Read what save_shares wrote, on any number of processes, into weights, moments and averages that there are."""
    state = _shares(loss, optimizer, average)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=folder)
    except (dcp.CheckpointException, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: is damaged or no checkpoint in shares: {error}") from error
    sharded.set_state_dict(loss, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
