"""Training in several processes: how they find each other, average gradients, and split weights between them.

Plain torch.distributed, whoever started the processes: torchrun, Ray Train, or capfilt itself. Not here: what a loss needs
of other ranks' rows (`capfilt.models.ranks`), who starts the processes (`capfilt.execution`).
"""

from __future__ import annotations

import datetime as dt
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from capfilt.errors import UserError
from capfilt.models.common.layers import running
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.training.launched import local_rank, started_together

TIMEOUT = dt.timedelta(minutes=30)
"""A rank that waits longer for the others has lost them. Rank 0 may take minutes to write a large checkpoint."""

M = TypeVar("M", bound=nn.Module)


def device() -> torch.device:
    """This rank's GPU where there are GPUs, else the processor. `joined` finds out whether the GPU is this rank's own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Some launchers show each process its own GPU only.
    return torch.device("cuda", local_rank() if local_rank() < torch.cuda.device_count() else 0)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside, this process has joined those that it was started with; alone, it is the only rank.

    Raises UserError, in all ranks, where two of them would train on one GPU, or some on GPUs and others on processors.
    """
    if not started_together():
        yield ALONE
        return
    where = device()
    # Ray Train joins its workers itself, and has given each of them a GPU.
    mine = not dist.is_initialized()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if mine:
        _join(where)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=TIMEOUT))
    finally:
        if mine:
            dist.destroy_process_group()


def _join(where: torch.device) -> None:
    on_gpu = where.type == "cuda"
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    # Before there is a group: a GPU's and a processor's wait for each other, and NCCL fails where a GPU is there twice.
    store.set(f"gpu {rank}", str(torch.cuda.get_device_properties(where).uuid) if on_gpu else "")
    problem = shared_gpu(
        [each.decode() for each in store.multi_get([f"gpu {each}" for each in range(world)])]
    )
    if problem:
        store.set(f"told {rank}", "")
        if rank == 0:
            # The store may end with this process, and other ranks still ask it.
            store.wait([f"told {each}" for each in range(world)])
        raise UserError(
            f"{problem}: start as many ranks on each machine as it has GPUs, with LOCAL_RANK counting them from 0, or hide "
            "all GPUs with CUDA_VISIBLE_DEVICES= to train on processors"
        )
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def shared_gpu(gpus: Sequence[str]) -> str:
    """Why ranks with these GPUs (their UUIDs; "" for a rank without) cannot train together; "" where they can."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if not gpu and any(gpus):
            return f"rank {rank} has no GPU, and other ranks have"
        if gpu and first.setdefault(gpu, rank) != rank:
            return f"ranks {first[gpu]} and {rank} have one GPU between them ({gpu})"
    return ""


def seed_of(seed: int, ranks: Ranks, step: int = 0) -> int:
    """The seed of this rank's own draws (dropout, crops): rank 0 has `seed` itself, as a run alone."""
    if ranks.rank == 0:
        return seed
    return int(np.random.SeedSequence([seed, ranks.rank, step]).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------- gradients


class _Forward(nn.Module):
    """`losses` as a forward pass, which is what torch's wrappers listen to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.module.losses(*args)  # type: ignore[operator]
        return found


class Together:
    """A module whose gradients are those of all ranks: after the last backward pass of a step, their mean.

    So are the running statistics of batch normalisations, which each rank takes from its own rows; what the rows are
    normalised by stays each rank's own, as in torch and in OpenCLIP unless told otherwise.

    Args:
        module: with `losses`, and where it has them `blocks()`, the submodules whose weights are gathered one at a time
            when they are split, and `leaves_unused`, whether some parameters get no gradient. Its parameters are made
            equal to rank 0's.
        ranks: alone, this does nothing.
        shard: split weights, gradients and whatever is made of them over the ranks (FSDP2, torch.distributed.fsdp's
            fully_shard) in place of a whole copy in each (DDP). From then on parameters are DTensors: see `whole`.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, shard: bool = False) -> None:
        self.ranks = ranks
        self._run: nn.Module = _Forward(module)
        self._scalars: list[nn.Parameter] = []
        # By memory: a module that is shared has several names.
        self._running = list({each.data_ptr(): each for each in running(module).values()}.values())
        self._sharded = shard and ranks.world > 1
        if ranks.world == 1:
            return
        if self._sharded:
            self._shard(module)
        else:
            # Imported with the class: several seconds that a run alone does not pay.
            from torch.nn.parallel import DistributedDataParallel

            # Queues are the same everywhere by themselves, and running statistics are averaged here: DDP would overwrite
            # everyone's by rank 0's. The option got another name, and the old one a warning.
            names = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            options: dict[str, Any] = {buffers: False}
            self._run = DistributedDataParallel(
                self._run,
                **options,
                gradient_as_bucket_view=True,
                find_unused_parameters=bool(getattr(module, "leaves_unused", False)),
            )

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)
        where = next(module.parameters()).device
        mesh = init_device_mesh(where.type, (self.ranks.world,))
        # It splits rows, and a number has none: those few stay whole, and their gradients are averaged by `average`.
        scalars = {each for each in module.parameters() if not each.dim()}
        self._scalars = [each for each in module.parameters() if each in scalars]
        for block in getattr(module, "blocks", tuple)():
            fully_shard(block, mesh=mesh)
        fully_shard(self._run, mesh=mesh, ignored_params=scalars)

    def losses(self, *args: Any) -> dict[str, Tensor]:
        """The module's."""
        found: dict[str, Tensor] = self._run(*args)
        return found

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over ranks in the last one only."""
        if self.ranks.world == 1:
            yield
        elif self._sharded:
            self._run.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
            for parameter in self._scalars if last else []:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.ranks.world
        else:
            context: AbstractContextManager[Any] = nullcontext() if last else self._run.no_sync()  # type: ignore[operator]
            with context:
                yield
        if last and self.ranks.world > 1 and self._running:
            self._average_statistics()

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """All in one exchange: a ResNet has a hundred small ones."""
        joined = torch.cat([each.flatten() for each in self._running])
        dist.all_reduce(joined)
        joined /= self.ranks.world
        parts = torch.split(joined, [each.numel() for each in self._running])
        for each, mean in zip(self._running, parts, strict=True):
            each.copy_(mean.view_as(each))


# ---------------------------------------------------------------------- split tensors


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a split tensor, over the same memory; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a split tensor, which all ranks ask for together; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, split as `like` is, on its device; a copy of it where `like` is not."""
    if not hasattr(like, "device_mesh"):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Every tensor whole, on rank 0 only (elsewhere empty); one at a time leaves the GPUs, so that they need no room."""
    if ranks.world == 1:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor.detach())
        if ranks.rank == 0:
            found[name] = complete.cpu()
    return found


def unsplit(module: M, make: Callable[[], M]) -> M:
    """`module` itself where its tensors are whole, else a copy on the processor: `make()` filled with the whole of them.

    All ranks call it together.
    """
    if not any(hasattr(each, "device_mesh") for each in module.parameters()):
        return module
    copy: M = make()
    copy.load_state_dict({name: whole(tensor).cpu() for name, tensor in module.state_dict().items()})
    return copy


def norm(gradients: Iterable[Tensor]) -> Tensor:
    """The joint L2 norm, of split gradients over all ranks: fp32 scalar."""
    split: list[Tensor] = []
    rest: list[Tensor] = []
    for each in gradients:
        (split if hasattr(each, "full_tensor") else rest).append(each)
    total = torch.nn.utils.get_total_norm(rest).float()
    if split:
        total = torch.hypot(
            total.to(local(split[0]).device), whole(torch.nn.utils.get_total_norm(split)).float()
        )
    return total
