"""A stream of interleaved rANS (:mod:`hf_sqf.runtime.sqf_rans`) as it lies in the bytes."""

from __future__ import annotations

from dataclasses import dataclass

from .sqf_bytes import Reader, Writer
from .sqf_rans import Stream

SYMBOLS_PER_BYTE = 11_400
"""No stream holds more symbols to a byte: the likeliest has a probability of 4094 / 4096."""
_LANE_BITS = 1824  # bits of a stream for each lane, whose state wastes some 9: 0.49 %
_MOST_LANES = 4096


def lanes_for(bits: float, most: int) -> int:
    """Return the number of lanes for a stream of about ``bits`` bits: as many as cost little."""
    return max(1, min(most, _MOST_LANES, int(bits) // _LANE_BITS))


@dataclass(frozen=True)
class StreamSize:
    """The fields of a stream in a header: numbers of lanes, of words and of symbols in the tail."""

    lanes: int
    words: int
    tail: int


def write_sizes(out: Writer, stream: Stream) -> None:
    """Write the sizes of a stream."""
    out.unsigned(len(stream.states))
    out.unsigned(len(stream.words))
    if len(stream.states) > 1:
        out.unsigned(stream.tail)


def write_stream(out: Writer, stream: Stream) -> None:
    """Write a stream itself."""
    out.raw(stream.states.astype("<u4").tobytes())
    out.raw(stream.words.astype("<u2").tobytes())


def read_sizes(reader: Reader, count: int, most_lanes: int) -> StreamSize:
    """Read the sizes of a stream of ``count`` symbols and check that they are possible."""
    lanes, words = reader.unsigned(most_lanes), reader.unsigned(count)
    tail = reader.unsigned(count - 1) if lanes > 1 else 0
    if lanes == 0 or count > (4 * lanes + 2 * words) * SYMBOLS_PER_BYTE:
        raise ValueError(f"a stream of {count} symbols has {lanes} lanes and {words} words")
    return StreamSize(lanes, words, tail)


def read_stream(reader: Reader, size: StreamSize) -> Stream:
    """Read a stream of a known size."""
    return Stream(reader.array("u4", size.lanes), reader.array("u2", size.words), size.tail)
