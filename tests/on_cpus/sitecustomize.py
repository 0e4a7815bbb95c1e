"""Lets Accelerate run DeepSpeed and FSDP2 on CPUs; test_accelerate.py puts this folder first on the launched path.

Accelerate takes processes on CPUs for one process, or for plain DDP with `use_cpu`. Here they are several, with gloo.
"""

import os

if "LOCAL_RANK" in os.environ:
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # On a CPU, DeepSpeed would compile its own all-reduce for minutes. Without it, DeepSpeed uses gloo's.
    deepspeed.ops.__compatible_ops__ = {}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
