"""Measurements of the paper (arXiv:2411.19460), for comparison."""

DEVICE = "one A100, 80 GB"
# Table 3: activation memory of Mamba-2-2.7B in GB by tokens, bfloat16, batch size 1, beyond weights and gradients.
# None stands for a run out of memory; lengths that the table lacks are left out.
_LENGTHS = [2**n for n in (10, 12, 14, 15, 16, 17, 18, 19)]
ACTIVATION_GB = {
    "none": dict(zip(_LENGTHS, (2.7, 10.7, 42.6, None, None, None, None, None), strict=True)),
    "every-layer": dict(zip(_LENGTHS, (1.1, 4.4, 17.4, 34.7, 69.3, None, None, None), strict=True)),
    "every-sqrt": dict(zip(_LENGTHS, (0.6, 2.2, 8.7, 17.3, 34.6, 69.3, None, None), strict=True)),
    "MA-GC": dict(zip(_LENGTHS, (0.7, 1.8, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2), strict=True)),
}
# Table 8: tokens per second of the same model, forward and backward, at one length for each method.
TOKENS_PER_SECOND = {
    "none": {2**14: 12168},
    "every-layer": {2**16: 8450},
    "every-sqrt": {2**17: 8618},
    "MA-GC": {2**19: 7914},
}
