"""Parsing and formatting of memory sizes, such as "20GiB"."""

import re
from numbers import Integral

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory_size(value: int | str) -> int:
    """Convert a memory size to bytes.

    Args:
        value: a size such as `"20GiB"`, `"512MB"` or `"1.5 GB"`, or a whole number of bytes. KB, MB, GB and TB are
            powers of 1,000; KiB, MiB, GiB and TiB are powers of 1,024.

    Raises:
        ValueError: if the value is not such a size, or is below 1 byte.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        size = int(value)
    else:
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)\s*", value, re.I) if isinstance(value, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f"{value!r} is not a size of memory: give a number of bytes, or a number with a unit, "
                'such as "20GiB" or "512MB".'
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"A size of memory must be at least 1 byte; got {value!r}.")
    return size


def format_memory_size(num_bytes: float) -> str:
    """Format a number of bytes with three digits: `"17.4 GiB"`, `"1.35 GiB"`, `"512 MiB"`, `"12 B"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 999.5 or unit == "TiB":
            break
        num_bytes /= 1024
    digits = 0 if unit == "B" or abs(num_bytes) >= 99.95 else 1 if abs(num_bytes) >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"
