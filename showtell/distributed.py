"""Several processes that train one model, started by `torchrun --nproc-per-node N -m showtell train …`.

They are a process group of torch.distributed. Without one, every function here is that of a single process: a sum is
the number itself, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from showtell.errors import UserError, explain

Value = TypeVar("Value")
_store: dist.Store | None = None


def rank() -> int:
    """Return the number of this process; 0 writes the files and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def command() -> str:
    """Return how this program was started, for the user to type again."""
    return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} -m showtell" if world_size() > 1 else "showtell"


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Of several processes that fail, let the first show its error; the others exit with 2, in silence."""
    global _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:  # not started by torchrun
        yield
        return
    _store, *_ = next(dist.rendezvous("env://"))
    try:
        yield
    except Exception as error:
        if explain(error) and not is_first():
            raise SystemExit(2) from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def join(device: str, timeout_minutes: float) -> str:
    """Join the processes that torchrun has started, if it has; return `device`, or this process's own GPU for CUDA.

    A process that ends, or does not answer for `timeout_minutes`, is then an error of all others.
    """
    if _store is None:
        return device
    with _answers():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            store=_store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(minutes=timeout_minutes),
        )
    if not device.startswith("cuda"):
        return device
    if (number := int(os.environ["LOCAL_RANK"])) >= (n := torch.cuda.device_count()):
        given = f"--nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} needs as many GPUs"
        raise UserError(f"{given}, and this machine has {n}; start fewer processes, or add --device cpu")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def is_first() -> bool:
    """Return whether no other process has called this before."""
    with contextlib.suppress(RuntimeError):  # the process that holds the store has been killed
        return _store is None or _store.add("first", 1) == 1
    return True


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = "another process of this run has ended or does not answer"
        raise UserError(f"{lost}; to continue from the last save, type the same command with --resume") from error


def total(*numbers: float) -> Sequence[float]:
    """Return the sum of each number over all processes, exact up to 2 ** 53."""
    if world_size() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    with _answers():
        dist.all_reduce(sums)
    return sums.tolist()


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor over all processes, in float32 and in one message."""
    buffer = torch.cat([tensor.flatten().float() for tensor in tensors])
    with _answers():
        dist.all_reduce(buffer)
    return [part.view_as(own) for part, own in zip(buffer.split([t.numel() for t in tensors]), tensors, strict=True)]


def of_all(value: Value) -> list[Value]:
    """Return the values of all processes, in their order."""
    values: list = [value] * world_size()
    if len(values) > 1:
        with _answers():
            dist.all_gather_object(values, value)
    return values


def of_all_at_first(value: Value) -> list[Value]:
    """Return the values of all processes on process 0, and an empty list on the others."""
    if world_size() == 1:
        return [value]
    values = None if rank() else [value] * world_size()
    with _answers():
        dist.gather_object(value, values)
    return values or []


def of_first(value: Value) -> Value:
    """Return the value of process 0."""
    if world_size() == 1:
        return value
    values = [value]
    with _answers():
        dist.broadcast_object_list(values)
    return values[0]
