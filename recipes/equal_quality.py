"""What dependent quantization saves at equal quality, read off two measured curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float, float]
"""Bits per weight in the file; the divergence on text of the calibration's kind, and on other text."""


def saved_bits(scalar: Sequence[Point], dependent: Sequence[Point]) -> list[str]:
    """Return, for each point along a trellis, a line that says what scalar rounding needs more for equal divergence.

    The scalar curve is interpolated: its bits over the logarithm of the divergence. Beyond its ends, its last point
    bounds what it needs.
    """
    lines = []
    for bits, *divergences in dependent:
        more = []
        for place, divergence in enumerate(divergences, 1):
            curve = sorted((math.log(point[place]), point[0]) for point in scalar)
            if not curve:
                more.append("?")
            elif math.log(divergence) < curve[0][0]:
                more.append(f"more than {curve[0][1] - bits:.3f}")
            elif math.log(divergence) > curve[-1][0]:
                more.append(f"less than {curve[-1][1] - bits:.3f}")
            else:
                at = np.interp(math.log(divergence), [log for log, _ in curve], [rate for _, rate in curve])
                more.append(f"{float(at) - bits:.3f}")
        lines.append(
            f"at {bits:.3f} bits, scalar needs {more[0]} bits more for the same quality, {more[1]} on other text"
        )
    return lines
