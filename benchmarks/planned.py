"""MA-GC's plans for Mamba-2-2.7B with mamba-ssm's kernels, beside the paper's measurements.

    python benchmarks/planned.py

Nothing is measured here: `benchmarks/gpu.sh` measures. The table is of activation memory of one training step of
random tokens, bfloat16, batch size 1, beyond weights and gradients, in GB (10^9 bytes).
"""

from common.memory_use import gigabytes
from common.paper_figures import ACTIVATION_GB, DEVICE
from common.recording import table

from transformers_ma2mba import Ma2mbaConfig, plan_checkpoints

LENGTHS = [2**14, 2**16, 2**18, 2**19, 2**20, 2**22]
PLANS = {
    "plan": {},
    'plan, `memory_budget="minimal"`': {"memory_budget": "minimal"},
    'plan, `offload=True, memory_budget="2.8GB"`': {"offload": True, "memory_budget": "2.8GB"},
}


def main():
    config = Ma2mbaConfig.from_preset("3.1b").text_config
    paper = ACTIVATION_GB["MA-GC"]
    lines = [[f"paper, measured on {DEVICE}", *(str(paper.get(length) or "–") for length in LENGTHS)]]
    for name, settings in PLANS.items():
        plans = [plan_checkpoints(config, length, fused=True, from_ids=True, **settings) for length in LENGTHS]
        lines.append([name, *(gigabytes(plan.device_bytes) for plan in plans)])
        compute = [f"{1 + plan.extra_compute:.2f}" for plan in plans]
        lines.append(["times the computation of no checkpointing", *compute])
        if settings.get("offload"):
            lines.append(["on the host", *(gigabytes(plan.host_bytes) for plan in plans)])
    print("\n".join(table(["GB", *(f"{length:,}" for length in LENGTHS)], lines)))


if __name__ == "__main__":
    main()
