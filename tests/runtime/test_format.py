"""FORMAT.md is enough to write a decoder: this one is written from it alone, in plain Python, and reads the vectors."""

import json
import math
import struct
import zlib
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "vectors"
QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
EIGHTHS = (
    1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704,
    0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288,
)  # fmt: skip
BETA4 = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 32, 64)
MEAN = (6, 1.684894, 1, 0.767473, 0.659455, 0.600185, 0.56419, 0.524863, 0.505468, 0.488871, 0.481237, 0.486648)
CHECKS = {4: ("5", "2"), 8: ("13", "4"), 16: ("23", "4"), 32: ("45", "10"), 64: ("103", "24")}
CHECKS |= {128: ("235", "126"), 256: ("515", "362")}
STRUCTURES = (None, "grid", "svd", "sparse_pca", "vq", "pgd", "svd+grid")


class Bytes:
    def __init__(self, data):
        self.data, self.at = data, 0

    def raw(self, count):
        assert self.at + count <= len(self.data)
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self):
        return self.raw(1)[0]

    def uint(self):
        value = shift = 0
        while True:
            byte = self.u8()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def int(self):
        value = self.uint()
        return -(value + 1) // 2 if value % 2 else value // 2

    def block(self):
        return Bytes(self.raw(self.uint()))

    def bits(self, width, count):
        number = int.from_bytes(self.raw((width * count + 7) // 8), "little")
        return [number >> (i * width) & ((1 << width) - 1) for i in range(count)]

    def end(self):
        assert self.at == len(self.data)


def clip(value, low, high):
    return min(max(value, low), high)


def exp_minus(y):
    b = min(y, 700.0) * 1.4426950408889634
    o = math.floor(b)
    t, s = (b - o) * 0.6931471805599453, 1.0
    for q in range(13, 0, -1):
        s = 1.0 - (s * t) / q
    return math.ldexp(s, -o)


@cache
def model(shape, zero, grid, c):
    """Return [(symbol, frequency)] in the order of the slots; grid: None, 0 or 1."""
    alpha = math.ldexp(QUARTERS[c % 4], c // 4 - 4) / MEAN[shape]
    p = []
    for k in range(127):
        if grid is None:
            a, b = k - 0.5, k + 0.5
        elif grid == 0:
            a, b = 2.0 * k - 1, 2.0 * k + 1
        else:
            a, b = (0.5 if k == 1 else 2.0 * k - 2), (0.5 if k == 0 else 2.0 * k)
        a = 0.0 if k == 0 else a
        w, total = (b - a) / 8, 0.0
        for i in range(8):
            r = math.sqrt(math.sqrt((a + (i + 0.5) * w) / alpha))
            y = r
            for _ in range(BETA4[shape] - 1):
                y *= r
            total += exp_minus(y)
        p.append(total * w)
    z = zero - 4
    p[0] *= 2 * math.ldexp(QUARTERS[z // 2 % 4] * (math.sqrt(QUARTERS[1]) if z % 2 else 1.0), z // 8)
    t = p[0] + 2 * sum_left(p[1:])[-1]
    p = [x if k == 0 or x * (4094 / t) >= 1 else 0.0 for k, x in enumerate(p)]
    side = sum_left(p[1:])
    q = 4094 / (p[0] + 2 * side[-1])
    bounds = [0] + [math.floor(x * q + 0.5) for x in side]
    f = [4094 - 2 * bounds[-1]] + [bounds[k] - bounds[k - 1] for k in range(1, 127)]
    return [(-128, 1)] + [(k, f[abs(k)]) for k in range(-126, 127)] + [(127, 1)]


def sum_left(values):
    out, total = [], 0.0
    for value in values:
        total += value
        out.append(total)
    return out


def slots(frequencies):
    table = [(symbol, f, o) for symbol, f in frequencies for o in range(f)]
    assert len(table) == 4096
    return table


def next_state(states, s, z):
    h0, h1 = (int(h, 8) for h in CHECKS[states])
    nu, out = states.bit_length() - 1, 0
    for i in range(1, nu + 1):
        bit = (s >> i & 1 if i < nu else 0) ^ (h0 >> i & s & 1) ^ (h1 >> i & z & 1)
        out |= bit << (i - 1)
    return out


def read_stream(data, lanes, words):
    states = struct.unpack(f"<{lanes}I", data.raw(4 * lanes))
    return list(states), struct.unpack(f"<{words}H", data.raw(2 * words))


def decode_stream(states, words, tail, count, table_of, follow):
    """Decode ``count`` symbols; ``table_of(t)`` gives the slots of symbol t, ``follow(t, symbol)`` is told of it."""

    def part(x, words, first, last):
        at = 0
        for t in range(first, last):
            lane = (t - first) % len(x)
            symbol, f, o = table_of(t)[x[lane] % 4096]
            x[lane] = f * (x[lane] // 4096) + o
            if x[lane] < 1 << 16:
                x[lane] = x[lane] << 16 | words[at]
                at += 1
            follow(t, symbol)
        return at

    x = list(states)
    assert part(x, words, 0, count - tail) == len(words)
    carried = [value - (1 << 16) for value in x]
    assert all(0 <= value < 1 << 16 for value in carried)
    if not tail:
        assert not any(carried)
        return
    few = -(-len(x) // 16)
    x = [carried[2 * i] | carried[2 * i + 1] << 16 for i in range(few)]
    left = carried[2 * few :]
    read = part(x, left, count - tail, count)
    assert not any(left[read:])
    assert x == [1 << 16] * few


def array(data, m, n, row_prior=None, col_prior=None, trellis=0):
    flags = data.u8()
    if flags & 3 == 3:
        value = data.int()
        data.end()
        return [[value] * n for _ in range(m)]
    offset = data.int() if flags & 4 else 0
    shift = data.u8() if flags & 8 else 0
    escape_bits = data.u8() if flags & 64 else 0
    base, models = data.int(), []
    for group in range(2 if trellis else 1):
        byte = data.u8()
        models.append((byte >> 4, byte & 15, data.int() if group else 0))
    row_spread = array(data.block(), 1, m)[0] if flags & 16 else [0] * m
    col_spread = array(data.block(), 1, n)[0] if flags & 32 else [0] * n
    row_prior = (row_prior or [0]) * (1 if row_prior and len(row_prior) > 1 else m)
    col_prior = (col_prior or [0]) * (1 if col_prior and len(col_prior) > 1 else n)
    tables = {}

    def table(i, j, group):
        shape, zero, extra = models[group]
        c = clip(base + row_spread[i] + col_spread[j] - row_prior[i] - col_prior[j], 0, 43)
        key = group, clip(c + extra, 0, 43)
        if key not in tables:
            tables[key] = slots(model(shape, zero, group if trellis else None, key[1]))
        return tables[key]

    height = max(1, min(m, (1 << 20) // n))
    sizes = []
    for top in range(0, m, height):
        lanes, words = data.uint(), data.uint()
        tail = data.uint() if lanes > 1 else 0
        sizes.append((top, min(height, m - top), lanes, words, tail, data.uint() if flags & 64 else 0))
    values = []
    for top, rows, lanes, words, tail, escapes in sizes:
        states, stream = read_stream(data, lanes, words)
        escaped = [-(u + 1) // 2 if u % 2 else u // 2 for u in data.bits(escape_bits, escapes)]
        low = data.bits(shift, rows * n)
        column, symbols, grids = [0] * n, [], []

        def table_of(t, top=top, column=column):
            return table(top + t // n, t % n, column[t % n] % 2 if trellis else 0)

        def follow(t, symbol, column=column, symbols=symbols, grids=grids, low=low):
            symbols.append(symbol)
            grids.append(column[t % n] % 2)
            if trellis:
                column[t % n] = next_state(trellis, column[t % n], (low[t] if shift else symbol) & 1)

        decode_stream(states, stream, tail, rows * n, table_of, follow)
        assert sum(s in (-128, 127) for s in symbols) == escapes
        at = iter(escaped)
        codes = [next(at) if s in (-128, 127) else s for s in symbols]
        codes = [k << shift | b for k, b in zip(codes, low, strict=True)] if shift else codes
        if trellis:
            codes = [2 * k - g * ((k > 0) - (k < 0)) for k, g in zip(codes, grids, strict=True)]
        values += [[k + offset for k in codes[i * n : (i + 1) * n]] for i in range(rows)]
    data.end()
    return values


def indices(data, count, atoms):
    if atoms == 1 or count == 0:
        data.end()
        return [0] * count
    shift = max(0, (atoms - 1).bit_length() - 8)
    symbols = ((atoms - 1) >> shift) + 1
    levels = [0] * symbols
    kind = data.u8()
    if kind == 1:
        differences = array(data.block(), 1, symbols)[0]
        levels = [sum(differences[: i + 1]) for i in range(symbols)]
    used = sum(q != 127 for q in levels)
    sums = sum_left([0.0 if q == 127 else math.ldexp(EIGHTHS[q % 8], -(q // 8)) for q in levels])
    bounds = [0] + [math.floor(a / sums[-1] * (4096 - used) + 0.5) for a in sums]
    table = slots([(s, bounds[s + 1] - bounds[s] + (levels[s] != 127)) for s in range(symbols)])
    lanes, words = data.uint(), data.uint()
    tail = data.uint() if lanes > 1 else 0
    states, stream = read_stream(data, lanes, words)
    found = []
    decode_stream(states, stream, tail, count, lambda t: table, lambda t, s: found.append(s))
    low = data.bits(shift, count)
    data.end()
    return [s << shift | b for s, b in zip(found, low, strict=True)]


def term(data, m, n):
    flags, scale, step_resolution, row_resolution = data.u8(), data.int(), data.uint(), data.uint()
    trellis = data.uint() if flags & 16 else 0
    k = data.uint()
    d = data.uint() if flags & 2 else n
    lines = m * -(-n // d)
    steps = array(data.block(), 1, 1 if flags & 4 else k)[0]
    rows = array(data.block(), 1, 1 if flags & 8 else lines)[0]
    codes = data.block()
    if flags & 1:
        codes = indices(codes, lines, k)
    else:
        row_prior = [(8 * q + row_resolution) // (2 * row_resolution) for q in rows] if flags & 64 else None
        col_prior = [(8 * q + step_resolution) // (2 * step_resolution) for q in steps] if flags & 32 else None
        codes = array(codes, lines, k, row_prior, col_prior, trellis)
    return {
        "scale": scale,
        "step_resolution": step_resolution,
        "row_resolution": row_resolution,
        "one_hot": bool(flags & 1),
        "trellis": trellis,
        "codes": codes,
        "steps": steps,
        "rows": rows,
        "atoms": array(data.block(), k, d) if flags & 2 else None,
    }


def weight(data):
    assert data[:4] == b"SQF\x01"
    assert zlib.crc32(data[8:]) == int.from_bytes(data[4:8], "little")
    data = Bytes(data[8:])
    sizes = [data.uint() for _ in range(data.uint())]
    matrices = []
    for size in sizes:
        record = Bytes(data.raw(size))
        structure = STRUCTURES[record.uint()] or record.block().data.decode("ascii")
        m, n = record.uint(), record.uint()
        terms = [term(record, m, n) for _ in range(record.uint())]
        record.end()
        matrices.append({"shape": [m, n], "structure": structure, "terms": terms})
    data.end()
    return matrices


def vectors(name):
    return [pytest.param(v, id=v["name"]) for v in json.loads((FOLDER / f"{name}.json").read_text("utf-8"))]


@pytest.mark.parametrize("vector", vectors("arrays"))
def test_arrays(vector):
    m, n = vector["shape"]
    data = Bytes(bytes.fromhex(vector["bytes"]))
    rows = array(data, m, n, vector["row_prior"], vector["col_prior"], vector["trellis"])
    assert [value for row in rows for value in row] == vector["values"]


@pytest.mark.parametrize("vector", vectors("indices"))
def test_indices(vector):
    found = indices(Bytes(bytes.fromhex(vector["bytes"])), len(vector["values"]), vector["atoms"])
    assert found == vector["values"]


@pytest.mark.parametrize("vector", vectors("weights"))
def test_weights(vector):
    assert weight(bytes.fromhex(vector["bytes"])) == vector["matrices"]
