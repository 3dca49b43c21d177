"""Reading and writing the fields of the format. A reader never goes past its end and never allocates on trust."""

from __future__ import annotations

import numpy as np


class Writer:
    """Collects fields; ``bytes(writer)`` is what they make."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def raw(self, data: bytes) -> None:
        """Append bytes as they are."""
        self._parts.append(data)

    def byte(self, value: int) -> None:
        """Append an integer 0..255."""
        self._parts.append(bytes((value,)))

    def unsigned(self, value: int) -> None:
        """Append an integer >= 0 in groups of 7 bits, lowest first (LEB128)."""
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
        self._parts.append(bytes(out))

    def signed(self, value: int) -> None:
        """Append any integer, zigzag: 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ..."""
        self.unsigned(2 * value if value >= 0 else -2 * value - 1)

    def block(self, data: bytes) -> None:
        """Append bytes preceded by their number."""
        self.unsigned(len(data))
        self._parts.append(data)


class Reader:
    """Reads the fields of ``data`` in order.

    Every method raises ValueError where the data end too early.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Number of bytes not read yet."""
        return len(self._data) - self._at

    def raw(self, count: int) -> memoryview:
        """Return the next ``count`` bytes."""
        if count < 0 or count > self.left:
            raise ValueError(f"the data end {count - self.left} bytes too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        """Return an integer 0..255."""
        return self.raw(1)[0]

    def unsigned(self, limit: int = 1 << 48) -> int:
        """Return an integer 0..limit."""
        value = shift = 0
        while True:
            part = self.byte()
            value |= (part & 127) << shift
            if value > limit:
                raise ValueError(f"a field exceeds {limit}")
            if part < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a field has too many bytes")

    def signed(self, limit: int = 1 << 32) -> int:
        """Return an integer -limit..limit."""
        value = self.unsigned(2 * limit)
        return value >> 1 if value % 2 == 0 else -(value + 1 >> 1)

    def block(self) -> memoryview:
        """Return bytes preceded by their number."""
        return self.raw(self.unsigned())

    def array(self, dtype: str, count: int) -> np.ndarray:
        """Return ``count`` little-endian numbers, copied (and so aligned)."""
        dt = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(self.raw(count * dt.itemsize), dt).astype(np.dtype(dtype))

    def end(self) -> None:
        """Check that nothing is left."""
        if self.left:
            raise ValueError(f"{self.left} bytes follow the end of the data")


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Return non-negative integers below ``2^width``, each in ``width`` bits, lowest bit first, zero-padded."""
    if width == 0 or not len(values):
        return b""
    bits = np.empty((len(values), width), np.uint8)
    for b in range(width):
        bits[:, b] = values >> b & 1
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack_bits(data: bytes | memoryview, width: int, count: int) -> np.ndarray:
    """Return the ``count`` integers of :func:`pack_bits`, int64 (count,)."""
    values = np.zeros(count, np.int64)
    if width and count:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
        for b in range(width):
            values |= bits[b::width].astype(np.int64) << b
    return values


def packed_size(width: int, count: int) -> int:
    """Return the number of bytes of :func:`pack_bits`."""
    return (width * count + 7) // 8
