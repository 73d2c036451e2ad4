"""Digests of values: one canonical, typed, length-prefixed encoding, hashed with BLAKE3."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

DIGEST_PREFIX = "blake3:"


def encode(value: Any) -> bytes:
    """Return bytes that are equal exactly for equal values of equal kinds.

    ``1``, ``1.0``, ``True`` and ``"1"`` are four different values; a mapping's order does not
    count; lists and tuples are the same kind. Every item carries its kind and its length, so no two
    different values run together into the same bytes.

    Raises:
        TypeError: The value, or one inside it, has no stable form.
    """
    parts: list[bytes] = []
    _encode(value, parts)
    return b"".join(parts)


def digest(kind: str, value: Any) -> str:
    """Return 64 lowercase hex digits that identify ``value`` among all values of this ``kind``.

    Args:
        kind: What is digested and by which version of the rules, such as ``step-v1``.
        value: None, booleans, numbers, strings, bytes and containers of them.

    Raises:
        TypeError: The value, or one inside it, has no stable form.
    """
    from blake3 import blake3

    return blake3(encode([kind, value])).hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return the BLAKE3 digest of the bytes themselves, as 64 lowercase hex digits."""
    from blake3 import blake3

    return blake3(data).hexdigest()


def _tagged(tag: bytes, payload: bytes, parts: list[bytes]) -> None:
    parts.append(tag + struct.pack(">Q", len(payload)))
    parts.append(payload)


def _encode(value: Any, parts: list[bytes]) -> None:  # noqa: C901 - one branch a kind
    # bool before int: a bool is an int to isinstance, but not to a reader.
    if value is None:
        parts.append(b"N")
    elif isinstance(value, bool):
        parts.append(b"T" if value else b"F")
    elif isinstance(value, int):
        _tagged(b"i", str(int(value)).encode(), parts)
    elif isinstance(value, float):
        _tagged(b"f", struct.pack(">d", value) if value == value else b"nan", parts)
    elif isinstance(value, str):
        _tagged(b"s", value.encode("utf-8", "surrogatepass"), parts)
    elif isinstance(value, (bytes, bytearray)):
        _tagged(b"b", bytes(value), parts)
    elif isinstance(value, Mapping):
        items = sorted((encode(key), encode(item)) for key, item in value.items())
        parts.append(b"m" + struct.pack(">Q", len(items)))
        for key, item in items:
            parts += (key, item)
    elif isinstance(value, AbstractSet):
        members = sorted(encode(member) for member in value)
        parts.append(b"e" + struct.pack(">Q", len(members)))
        parts += members
    elif isinstance(value, Sequence):
        parts.append(b"l" + struct.pack(">Q", len(value)))
        for item in value:
            _encode(item, parts)
    else:
        raise TypeError(f"{type(value).__qualname__} has no stable form to digest")
