"""How processes that `torchrun` started find a name that nobody has used before.

Words between them lie in a store that outlives them: `torchrun --max-restarts` starts processes
anew with the store in which those that died have left theirs. So each asks with a word of its own,
which nobody can have answered before, and the first, which alone is the first now, answers all that
it sees asked until everybody has told it that the answer came.
"""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist

LOOK = 0.02  # seconds between two looks


def meet(store: dist.Store, rank: int, size: int) -> str:
    """The name of this meeting, the same in all `size` processes and in no earlier one."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"told/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    left = set(range(1, size))
    while left:
        for one in [r for r in left if store.check([f"asks/{r}"])]:
            store.set(f"told/{store.get(f'asks/{one}').decode()}", own)
        left = {r for r in left if not store.check([f"{own}/{r}"])}
        time.sleep(LOOK)
    return own
