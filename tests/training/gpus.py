"""Run by test_distributed.py as one of two ranks on a machine whose GPUs are made up. Prints what became of each attempt.

Arguments: this rank, and for each attempt a port, the GPUs that each rank sees, by name, and each rank's LOCAL_RANK.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from capfilt.errors import UserError
from capfilt.training import distributed


def attempt(rank: int, port: int, gpus: list[list[str]], local: list[int] | None) -> object:
    own, used, begin = gpus[rank], [], dist.init_process_group
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("LOCAL_RANK", None)
    if local is not None:
        os.environ["LOCAL_RANK"] = str(local[rank])
    torch.cuda.is_available = lambda: bool(own)
    torch.cuda.device_count = lambda: len(own)
    torch.cuda.get_device_properties = lambda where: SimpleNamespace(uuid=own[where.index])
    torch.cuda.set_device = lambda where: used.append(own[where.index])
    # There is no NCCL for made-up GPUs.
    dist.init_process_group = lambda backend, **more: used.append(backend) or begin("gloo", **more)
    try:
        with distributed.joined() as ranks:
            return [ranks.rank, *dict.fromkeys(used)]
    except UserError as error:
        return str(error)
    finally:
        dist.init_process_group = begin


for each in json.loads(sys.argv[2]):
    print(json.dumps(attempt(int(sys.argv[1]), **each)), flush=True)
