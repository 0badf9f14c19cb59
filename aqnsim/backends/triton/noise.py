"""Random words, normals and errors of logical coordinates: the twin of ``csrc/core/philox.h``, ``normal.h`` and
``error.h``. The clock is read on the device, so that a recorded graph does not hold it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from aqnsim.backends.triton.bits import abs_of, as_held, bits_of, float_of, is_finite, of
from aqnsim.errors import ErrorModel


@triton.constexpr_function
def part_of_key(place: int, part: int) -> int:
    """What is added to the key for one of the things that a model of a chain draws; see :mod:`aqnsim.rng`."""
    return (4 * place + part) * 0xD1342543DE82EF95 % (1 << 64)


@triton.constexpr_function
def at(models: tuple[Any, ...], place: int) -> Any:
    return models[place]


@triton.constexpr_function
def length(models: tuple[Any, ...]) -> int:
    return len(models)


@triton.jit
def coordinates(key, clock, DRAW: tl.constexpr, PLACE: tl.constexpr, PART: tl.constexpr):
    """The Philox key and the counter's last word; see ``coordinates`` of :mod:`aqnsim.rng`."""
    key, word = key.to(tl.uint64), clock.to(tl.uint32)
    if DRAW == "per_run":
        key ^= (clock >> 32).to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    elif DRAW == "per_step":
        word &= 0x3FFFFFFF
    elif DRAW == "frozen":
        word &= 0
    return key + tl.full((), part_of_key(PLACE, PART), tl.uint64), word


@triton.jit
def philox(c0, c1, c2, c3, key):
    """Philox4x32-10 of counters under one key: four words."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full((), 0xD2511F53, tl.uint32)), c0 * tl.full((), 0xD2511F53, tl.uint32)
        high1, low1 = tl.umulhi(c2, tl.full((), 0xCD9E8D57, tl.uint32)), c2 * tl.full((), 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def block(column, row, key, word):
    """The Philox block of a column, int64 or int32, of a logical row, int64: both broadcast."""
    zero = (column * 0 + row * 0).to(tl.uint32)
    c0, c1, c2 = (column >> 2).to(tl.uint32) + zero, row.to(tl.uint32) + zero, (row >> 32).to(tl.uint32) + zero
    return philox(c0, c1, c2, zero + word, key)


@triton.jit
def picked(w0, w1, w2, w3, column):
    """Of a column's block, its word."""
    i = column & 3
    return tl.where(i == 0, w0, tl.where(i == 1, w1, tl.where(i == 2, w2, w3)))


@triton.jit
def interleaved(v0, v1, v2, v3):
    """Four tensors as one whose last axis is four times as long: value j of v<i> goes to 4 j + i."""
    return tl.interleave(tl.interleave(v0, v2), tl.interleave(v1, v3))


@triton.jit
def neg_log_uniform(word):
    """-ln(u) for u = m / 2^31, m = (word >> 1) | 1."""
    u = bits_of(((word >> 1) | 1).to(tl.int32).to(tl.float32))
    e = (u - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    x = float_of(u - (e.to(tl.uint32) << 23)) - 1.0
    q = 0.09272214025259018 * x + -0.1411842554807663
    q = q * x + 0.14676396548748016
    q = q * x + -0.16592855751514435
    q = q * x + 0.19985127449035645
    q = q * x + -0.2500092089176178
    q = q * x + 0.3333340883255005
    x2 = x * x
    log1p = (x - 0.5 * x2) + (x2 * x) * q
    return (31 - e).to(tl.float32) * 0.6931471805599453 - log1p


@triton.jit
def box_muller(radius_word, angle_word):
    """Two standard normals from two words, in exact operations only."""
    r2 = 2.0 * neg_log_uniform(radius_word)
    radius = tl.sqrt_rn(tl.where(r2 < 0.0, 0.0, r2))
    quadrant = angle_word >> 30
    f = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    g = f * f
    s = -0.004602163098752499 * g + 0.07968021929264069
    s = s * g + -0.6459634900093079
    s = s * g + 1.5707963705062866
    s = s * f
    c = 0.0009092451655305922 * g + -0.020862624049186707
    c = c * g + 0.2536695599555969
    c = c * g + -1.2337005138397217
    c = c * g + 1.0
    odd = (quadrant & 1) != 0
    a, b = tl.where(odd, s, c), tl.where(odd, c, s)
    flip_cos, flip_sin = ((quadrant + 1) & 2) << 30, (quadrant & 2) << 30
    return radius * float_of(bits_of(a) ^ flip_cos), radius * float_of(bits_of(b) ^ flip_sin)


@triton.jit
def words_of(column, row, key, word):
    """The random words of four columns each, interleaved; ``column`` [.., n] are multiples of 4."""
    w0, w1, w2, w3 = block(column, row, key, word)
    return interleaved(w0, w1, w2, w3)


@triton.jit
def normals_of(column, row, key, word):
    """The standard normals of the same columns."""
    w0, w1, w2, w3 = block(column, row, key, word)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return interleaved(z0, z1, z2, z3)


@triton.constexpr_function
def kind_of(model: ErrorModel) -> str:
    return model.kind


@triton.jit
def hit_by(y, column, each, row, key, clock, last_hit, MODEL: tl.constexpr, PLACE: tl.constexpr):
    """Which values a model with a rate hits; ``each`` are the columns one by one."""
    key, word = coordinates(key, clock, of(MODEL, "draw"), PLACE, 0)
    if kind_of(MODEL) == "stuck" and of(MODEL, "lanes") > 0:
        lane = each % of(MODEL, "lanes")
        w0, w1, w2, w3 = block(lane, tl.zeros((), tl.int64), key, word)
        words = picked(w0, w1, w2, w3, lane)
    else:
        words = words_of(column, row, key, word)
    return (words <= last_hit.to(tl.uint32)) & is_finite(y)


@triton.jit
def missed(
    y,
    magnitude,
    column,
    each,
    row,
    key,
    clock,
    a,
    b,
    last_hit,
    MODEL: tl.constexpr,
    PLACE: tl.constexpr,
    OUT: tl.constexpr,
):
    """``y`` after a model of a chain, and the values that it hit. Infinities and NaNs pass unchanged."""
    KIND: tl.constexpr = kind_of(MODEL)
    hit = tl.zeros(y.shape, tl.int32) != 0
    if KIND == "relative-gaussian":
        key, word = coordinates(key, clock, of(MODEL, "draw"), PLACE, 0)
        z = normals_of(column, row, key, word)
        result = y + (a * z) * abs_of(magnitude if of(MODEL, "reference") == "absdot" else y)
    elif KIND == "absolute-gaussian":
        key, word = coordinates(key, clock, of(MODEL, "draw"), PLACE, 0)
        result = y + a * normals_of(column, row, key, word)
    elif KIND == "systematic-bias":
        result = y + (a * y + b)
    elif KIND == "dead-zone":
        result = tl.where(abs_of(y) < a, 0.0, y)
    elif KIND == "saturation":
        result = tl.where(y > a, a, tl.where(y < -a, -a, y))
    elif KIND == "spike":
        hit = hit_by(y, column, each, row, key, clock, last_hit, MODEL, PLACE)
        key, word = coordinates(key, clock, of(MODEL, "draw"), PLACE, 1)
        result = tl.where(hit, a * normals_of(column, row, key, word), y)
    elif KIND == "stuck":
        hit = hit_by(y, column, each, row, key, clock, last_hit, MODEL, PLACE)
        result = tl.where(hit, a, y)
    else:  # bit-flip, of the pattern that the output holds
        y = as_held(y, OUT)
        LOW: tl.constexpr = 16 if tl.bfloat16 == OUT else 0
        hit = hit_by(y, column, each, row, key, clock, last_hit, MODEL, PLACE)
        if of(MODEL, "bit") < 0:
            key, word = coordinates(key, clock, of(MODEL, "draw"), PLACE, 1)
            bit = words_of(column, row, key, word) >> (28 if tl.bfloat16 == OUT else 27)
        else:
            bit = tl.full((), of(MODEL, "bit"), tl.uint32)
        flip = tl.full(y.shape, 1, tl.uint32) << (bit + LOW)
        result = tl.where(hit, float_of(bits_of(y) ^ flip), y)
    return tl.where(is_finite(y), result, y), hit
