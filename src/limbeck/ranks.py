"""Which process of a torchrun this is, and waiting for the main one.

The one idea: stages that are made once are made by rank 0 while the others wait for the finished folder;
stages that all ranks share (the cache's shards, training) start once rank 0 has begun the folder.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from limbeck.console import say


def rank() -> int:
    """Number of this process, 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes, 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until the main process has brought `condition` about; torchrun ends the wait if that one fails."""
    started = said = time.monotonic()
    while not condition():
        time.sleep(0.2)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            say(f"rank {rank()} has waited {said - started:.0f} s for {what}")


def end(code: int) -> NoReturn:
    """End a process of a torchrun: threads of the process group that are still there would abort the usual end."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shut_down() -> None:
    """Leave the process group together; a rank that exits while another still talks would abort it."""
    if world_size() > 1 and "torch" in sys.modules:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
