"""Parametric models of integer symbols: what a stream's few header bytes expand to.

A model gives each magnitude class c = 0..43 the probabilities of a generalised Gaussian of mean absolute value
``2^((c - 16) / 4)``, integrated over the cells of a grid,

    p_k  ~  integral over cell k of exp(-(|x| / alpha)^beta) dx,

rounded to integers out of 4096. There are three grids: the integers, and the two of dependent quantization
(:mod:`hf_sqf.runtime.sqf_trellis`). ``zero`` scales p_0 by ``2^(zero / 8)``: rounding with a rate term favours
zeros. Symbols that a class finds too unlikely, and those beyond +-126, are escapes: ``EVEN`` or ``ODD`` by
their parity (so that a state machine can go on), their values listed apart.

The frequencies must be the same integers on every machine, so only IEEE ``+ - * / sqrt floor`` in float64 and in
a fixed order are used here: no library ``exp`` or ``pow``, no sums of unspecified order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .sqf_jit import HAVE_NUMBA, jit

PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
CLASSES = 44
"""Magnitude classes, a quarter of an octave apart."""
LARGEST = 126
"""Largest magnitude in the alphabet."""
EVEN, ODD = -128, 127
"""The two escapes."""
SYMBOLS = 256
"""Symbols are int8; tables are indexed by ``symbol + 128``."""
COST_ONE = 65536
"""One bit in the integers of :func:`costs`."""
INTEGERS, Q0, Q1 = 0, 1, 2
"""The grids of points."""

_NODES = 8  # midpoints that a cell is integrated with
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)  # 2^(i / 4)
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453
_SHAPES = (  # beta * 4, and the mean of |x| at alpha = 1: Gamma(2 / beta) / Gamma(1 / beta)
    (2, 6.0),
    (3, 1.684894),
    (4, 1.0),
    (5, 0.767473),
    (6, 0.659455),
    (7, 0.600185),
    (8, 0.56419),
    (10, 0.524863),
    (12, 0.505468),
    (16, 0.488871),
    (32, 0.481237),
    (64, 0.486648),
)
SHAPES = len(_SHAPES)
"""Number of shapes, from heavy tails (beta = 1/2) to nearly none (beta = 16)."""
ZEROS = 16
"""Values of ``zero``: -4..11 eighths of an octave."""
_ZERO_BIAS = 4
DEFAULT_SHAPE, DEFAULT_ZERO = 5, _ZERO_BIAS
"""beta = 7/4 and no preference for zeros: what a search starts from."""


@dataclass(frozen=True, order=True)
class Model:
    """The model of one group of symbols: a ``shape`` index, a ``zero`` index and an ``offset`` added to its class."""

    shape: int
    zero: int
    offset: int = 0


def _exp_minus(y: np.ndarray) -> np.ndarray:
    """``exp(-y)`` for y >= 0 to about 1e-12, in basic operations only."""
    binary = np.minimum(y, 700.0) * _LOG2_E
    octaves = np.floor(binary)
    t = (binary - octaves) * _LN_2
    series = np.ones_like(t)
    for n in range(13, 0, -1):  # the Taylor series of exp(-t), 0 <= t < ln 2, by Horner's rule
        series = 1.0 - series * t / n
    return np.ldexp(series, -octaves.astype(np.int64))


def _cells(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges (lower, upper) of the cells of k = 0..LARGEST on ``grid``; the cell of 0 from its middle."""
    k = np.arange(LARGEST + 1, dtype=np.float64)
    if grid == INTEGERS:
        lower, upper = k - 0.5, k + 0.5
    elif grid == Q0:
        lower, upper = 2.0 * k - 1.0, 2.0 * k + 1.0
    else:
        lower, upper = 2.0 * k - 2.0, 2.0 * k
        lower[1], upper[0] = 0.5, 0.5
    lower[0] = 0.0
    return lower, upper


def frequencies(shape: int, zero: int, grid: int) -> np.ndarray:
    """Return int32 (CLASSES, SYMBOLS): how many of the 4096 slots each symbol of each class has.

    A symbol of frequency 0 has to be escaped. Both escapes have frequency 1 everywhere.
    """
    return _frequencies(shape, zero, grid).astype(np.int32)


@lru_cache(maxsize=256)
def _frequencies(shape: int, zero: int, grid: int) -> np.ndarray:
    """Return :func:`frequencies` in 16 bits: a model's weights take a hundred tables, and it may be small itself."""
    quarters, mean = _SHAPES[shape]
    lower, upper = _cells(grid)
    width = (upper - lower) / _NODES
    nodes = lower[:, None] + (np.arange(_NODES) + 0.5) * width[:, None]
    alpha = np.array([np.ldexp(_QUARTERS[c % 4], c // 4 - 4) / mean for c in range(CLASSES)])
    root = np.sqrt(np.sqrt(nodes / alpha[:, None, None]))
    power = root
    for _ in range(quarters - 1):
        power = power * root
    density = _exp_minus(power)
    mass = np.zeros(density.shape[:2])
    for node in range(_NODES):
        mass = mass + density[:, :, node]
    mass = mass * width
    exponent = zero - _ZERO_BIAS
    boost = np.ldexp(_QUARTERS[exponent // 2 % 4] * (np.sqrt(_QUARTERS[1]) if exponent % 2 else 1.0), exponent // 8)
    mass[:, 0] = mass[:, 0] * (2.0 * boost)
    total = mass[:, 0] + 2.0 * np.cumsum(mass[:, 1:], axis=1)[:, -1]
    free = TOTAL - 2  # two slots are the escapes'
    # Symbols with less than one slot are left out, what remains is scaled up to fill all slots, and the cumulated
    # masses of one side are rounded, so that the sum is right by construction.
    likely = mass * (free / total)[:, None] >= 1.0
    likely[:, 0] = True
    kept = np.where(likely, mass, 0.0)
    side = np.cumsum(kept[:, 1:], axis=1)
    scale = free / (kept[:, 0] + 2.0 * side[:, -1])
    bounds = np.floor(side * scale[:, None] + 0.5).astype(np.int32)
    counts = np.diff(bounds, axis=1, prepend=0)
    table = np.zeros((CLASSES, SYMBOLS), np.int16)
    table[:, 129 : 129 + LARGEST] = counts
    table[:, 128 - LARGEST : 128] = counts[:, ::-1]
    table[:, 128] = free - 2 * bounds[:, -1]
    table[:, EVEN + 128] = table[:, ODD + 128] = 1
    return table


@lru_cache(maxsize=512)
def costs(shape: int, zero: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of each symbol times 65536, int64 (CLASSES, SYMBOLS), and where a symbol is escaped (0 or 1).

    The value of an escaped symbol costs extra. Integers, so that sums of costs do not depend on their order.
    """
    table = frequencies(shape, zero, grid)
    bits = np.rint((PROBABILITY_BITS - np.log2(np.maximum(table, 1))) * COST_ONE).astype(np.int64)
    escaped = (table == 0).astype(np.int64)
    escaped[:, [EVEN + 128, ODD + 128]] = 1
    return bits, escaped


@lru_cache(maxsize=64)
def mean_magnitudes(shape: int, zero: int, grid: int) -> np.ndarray:
    """Return float64 (CLASSES,): the expected magnitude on the fine grid in each class (for fitting, not decoding)."""
    k = np.abs(np.arange(SYMBOLS) - 128)
    points = k if grid == INTEGERS else 2 * k - (grid == Q1) * (k > 0)
    table = frequencies(shape, zero, grid) * (np.abs(np.arange(SYMBOLS) - 128) <= LARGEST)
    return table @ points.astype(np.float64) / TOTAL


@jit
def _fill_slots(table: np.ndarray, out: np.ndarray) -> None:
    for c in range(table.shape[0]):
        slot = 0
        for symbol in range(table.shape[1]):
            frequency = table[c, symbol]
            for offset in range(frequency):
                out[c, slot] = offset << 20 | frequency << 8 | (symbol - 128 & 0xFF)
                slot += 1


def slots(table: np.ndarray, compiled: bool = HAVE_NUMBA) -> np.ndarray:
    """Expand frequencies (C, SYMBOLS) to the decoder's uint32 (C, 4096): offset << 20 | frequency << 8 | symbol.

    The offset is the slot's distance from the symbol's first slot; symbols lie in rising order.
    """
    classes = table.shape[0]
    if compiled:
        out = np.empty((classes, TOTAL), np.uint32)
        _fill_slots(table, out)
        return out
    start = np.cumsum(table, axis=1) - table
    flat = table.reshape(-1)
    symbol = np.tile(np.arange(SYMBOLS, dtype=np.uint32) - 128 & 0xFF, classes)
    entry = np.repeat(flat.astype(np.uint32) << 8 | symbol, flat).reshape(classes, TOTAL)
    offset = np.arange(TOTAL, dtype=np.uint32) - np.repeat(start.reshape(-1), flat).reshape(classes, TOTAL)
    return entry | offset.astype(np.uint32) << 20
