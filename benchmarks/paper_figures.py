"""What the paper measured (arXiv:2411.19460), to stand beside what is measured here."""

DEVICE = "one A100, 80 GB"
# Table 3: activation memory of Mamba-2-2.7B in GB, bfloat16, batch size 1, beyond weights and gradients; None where it
# ran out of memory. What is not in the table is not here.
ACTIVATION_GB = {
    "none": {2**10: 2.7, 2**12: 10.7, 2**14: 42.6, 2**15: None, 2**16: None, 2**17: None, 2**18: None, 2**19: None},
    "every-layer": {
        2**10: 1.1,
        2**12: 4.4,
        2**14: 17.4,
        2**15: 34.7,
        2**16: 69.3,
        2**17: None,
        2**18: None,
        2**19: None,
    },
    "every-sqrt": {
        2**10: 0.6,
        2**12: 2.2,
        2**14: 8.7,
        2**15: 17.3,
        2**16: 34.6,
        2**17: 69.3,
        2**18: None,
        2**19: None,
    },
    "MA-GC": {2**10: 0.7, 2**12: 1.8, 2**14: 4.2, 2**15: 6.9, 2**16: 10.5, 2**17: 17.2, 2**18: 25.9, 2**19: 42.2},
}
# Table 8: tokens per second of the same model, forward and backward, at one length for each method.
TOKENS_PER_SECOND = {
    "none": {2**14: 12168},
    "every-layer": {2**16: 8450},
    "every-sqrt": {2**17: 8618},
    "MA-GC": {2**19: 7914},
}
