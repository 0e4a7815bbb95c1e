"""Parsing and formatting of memory sizes."""

import re

import pytest

from transformers_ma2mba.gradient_checkpointing.memory_size import format_memory_size, parse_memory_size

GiB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * GiB),
        ("512MB", 512 * 10**6),
        ("1.5 GB", 1_500_000_000),
        (" 3 kib ", 3072),
        ("2TiB", 2 * 2**40),
        ("12345", 12345),
        (12345, 12345),
    ],
)
def test_sizes_are_parsed(text, size):
    assert parse_memory_size(text) == size


@pytest.mark.parametrize("value", ["", "lots", "20 gigs", "GiB", "nan", "inf", "1e3", "1,5GB", None, True, 1.5, [1]])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=re.escape(f"{value!r} is not a size of memory")):
        parse_memory_size(value)


@pytest.mark.parametrize("value", [0, -1, "0", "-3GiB", "0.1B"])
def test_sizes_must_be_above_zero(value):
    with pytest.raises(ValueError, match="must be at least 1 byte"):
        parse_memory_size(value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1.00 KiB"), (3.2 * 1024, "3.20 KiB"), (17.4 * GiB, "17.4 GiB")]
    + [(512 * 2**20, "512 MiB"), (9.996 * GiB, "10.0 GiB"), (99.96 * GiB, "100 GiB"), (2.5 * 2**50, "2,560 TiB")],
)
def test_sizes_are_formatted_with_three_digits(size, text):
    assert format_memory_size(size) == text
