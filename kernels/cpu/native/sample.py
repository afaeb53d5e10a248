"""Picks the next token of one wanted row: `edgeinfer.sampling.sampler`, id for id and bit for bit.

Knows no quant type. Candidates are int64 keys in scratch memory: the logit, so transformed that
ascending keys mean descending logits, above the token id. Sorting is lazy: only the front of
the list that the chain looks at is ever sorted, and it grows when that was too short.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.simd import (
    F32,
    F64,
    I8,
    I32,
    I64,
    Vec,
    add_f,
    call,
    f32x8,
    f64x8,
    intp,
    load_f32,
    load_f32x8,
    load_f64,
    load_i32,
    load_ir,
    mapped,
    max_f,
    max_lanes,
    min_f,
    mul_f,
    scalar,
    set_word,
    splat_f32,
    splat_f64,
    splat_ir,
    store_f32,
    store_f64,
    store_i32,
    sub_f,
    word,
)

_inline = njit(error_model="numpy")

_LARGEST = 3.4028234663852886e38
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2, _LOG2_E = 0.6931471805599453, 1.4426950408889634
_ROUND = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer
_DRY_LONGEST = 128
_LAZY = 256  # candidates sorted at first where the chain keeps the whole vocabulary
_INSERTION = 16  # keys or fewer are sorted by insertion
_DEPTH = 66  # ranges that fit in the stack

# Scratch of one slot: a lock word, 8 floats, the stack of the sort, keys, saved logits.
_TAIL, _STACK, _KEYS = 64, 128, at.SAMPLE_SCRATCH_HEAD

# -- instructions --------------------------------------------------------------------------------


def _emit_mask(b, p, x, compare):
    """Bit i says how float i of the 64 at p compares with x; a NaN never does."""
    limit = splat_ir(b, x, 8)
    mask = I64(0)
    for i in range(8):
        v = load_ir(b, b.add(p, I64(32 * i)), f32x8.ir)
        bits = b.zext(b.bitcast(b.fcmp_ordered(compare, v, limit), I8), I64)
        mask = b.or_(mask, b.shl(bits, I64(8 * i)))
    return mask


def _emit_key(b, x, token):
    """-0 becomes +0 and +inf the largest float; then a monotone map to int32."""
    x = b.fadd(x, F32(0.0))
    x = b.select(b.fcmp_ordered(">", x, F32(_LARGEST)), F32(_LARGEST), x)
    bits = b.bitcast(x, I32)
    up = b.xor(bits, b.and_(b.ashr(bits, I32(31)), I32(0x7FFFFFFF)))
    return b.or_(b.shl(b.sext(b.not_(up), I64), I64(32)), token)


def _emit_value(b, key):
    up = b.not_(b.trunc(b.ashr(key, I64(32)), I32))
    bits = b.xor(up, b.and_(b.ashr(up, I32(31)), I32(0x7FFFFFFF)))
    return b.fpext(b.bitcast(bits, F32), F64)


def _emit_power(b, t):
    """2**n where t is n + _ROUND: the low bits of t, moved into the exponent."""
    wide = ir.VectorType(I64, 8) if isinstance(t.type, ir.VectorType) else I64
    fill = (lambda n: ir.Constant(wide, [n] * 8)) if wide is not I64 else I64
    moved = b.add(b.shl(b.bitcast(t, wide), fill(52)), fill(1023 << 52))
    return b.bitcast(moved, t.type)


def _emit_sum(b, v):
    for width in (4, 2, 1):
        turn = ir.Constant(ir.VectorType(I32, 8), [(i + width) % 8 for i in range(8)])
        v = b.fadd(v, b.shuffle_vector(v, v, turn))
    return b.extract_element(v, I32(0))


def _emit_real(b, x, other):
    """x where it is a candidate's logit, neither NaN nor -inf; else `other`."""
    lowest = ir.Constant(x.type, [float("-inf")] * 8)
    return b.select(b.fcmp_ordered(">", x, lowest), x, other)


def _emit_kept(b, x, y):
    """y where x is at least -700, else 0."""
    limit = ir.Constant(x.type, [-700.0] * 8)
    return b.select(b.fcmp_ordered(">=", x, limit), y, ir.Constant(x.type, [0.0] * 8))


_f64 = types.float64
_above = scalar(intp, (intp, types.float32), lambda b, p, x: _emit_mask(b, p, x, ">"))
_at_least = scalar(intp, (intp, types.float32), lambda b, p, x: _emit_mask(b, p, x, ">="))
_lowest_bit = scalar(intp, (intp,), lambda b, x: call(b, "llvm.cttz.i64", I64, x, ir.IntType(1)(0)))
_key = scalar(intp, (types.float32, intp), _emit_key)
_value = scalar(_f64, (intp,), _emit_value)
_token = scalar(intp, (intp,), lambda b, key: b.and_(key, I64(0xFFFFFFFF)))
_bits = scalar(intp, (_f64,), lambda b, x: b.bitcast(x, I64))
_from_bits = scalar(_f64, (intp,), lambda b, x: b.bitcast(x, F64))
_narrow = scalar(types.float32, (_f64,), lambda b, x: b.fptrunc(x, F32))
_wide = scalar(_f64, (types.float32,), lambda b, x: b.fpext(x, F64))
_high_product = scalar(
    intp, (intp, intp), lambda b, x, y: b.lshr(b.mul(x, y), I64(32))
)  # of 32-bit numbers
_sqrt = scalar(_f64, (_f64,), lambda b, x: call(b, "llvm.sqrt.f64", F64, x))
_power1 = scalar(_f64, (_f64,), _emit_power)
_power8 = mapped(1, lambda v: v, _emit_power)
_widen = mapped(
    1, lambda v: Vec("f64", v.lanes), lambda b, x: b.fpext(x, ir.VectorType(F64, x.type.count))
)
_kept8 = mapped(2, lambda x, y: x, _emit_kept)
_real8 = mapped(2, lambda x, y: x, _emit_real)
_sum8 = scalar(_f64, (f64x8,), _emit_sum)


# -- exp and log, rounding as edgeinfer.sampling.sampler does -------------------------


@_inline
def _exp(x):
    inside = x if x > -708.0 else -708.0
    inside = inside if inside < 700.0 else 700.0
    t = inside * _LOG2_E + _ROUND
    n = t - _ROUND
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * _power1(t) if x >= -700.0 else 0.0


@_inline
def _step(p, r, c):
    return add_f(mul_f(p, r), splat_f64(c))


@_inline
def _exp8(x):
    inside = min_f(max_f(x, splat_f64(-708.0)), splat_f64(700.0))
    t = add_f(mul_f(inside, splat_f64(_LOG2_E)), splat_f64(_ROUND))
    n = sub_f(t, splat_f64(_ROUND))
    r = sub_f(inside, mul_f(n, splat_f64(_LN2_HIGH)))
    r = sub_f(r, mul_f(n, splat_f64(_LN2_LOW)))
    p = splat_f64(1.0 / 362880.0)
    p = _step(p, r, 1.0 / 40320.0)
    p = _step(p, r, 1.0 / 5040.0)
    p = _step(p, r, 1.0 / 720.0)
    p = _step(p, r, 1.0 / 120.0)
    p = _step(p, r, 1.0 / 24.0)
    p = _step(p, r, 1.0 / 6.0)
    p = _step(p, r, 0.5)
    p = _step(p, r, 1.0)
    p = _step(p, r, 1.0)
    return _kept8(x, mul_f(p, _power8(t)))


@_inline
def _log(x):
    bits = _bits(x)
    e = float((bits >> 52) - 1023)
    m = _from_bits(bits & 0xFFFFFFFFFFFFF | 1023 << 52)
    if m > 1.4142135623730951:
        m, e = m * 0.5, e + 1.0
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1.0 / 19.0
    p = p * z + 1.0 / 17.0
    p = p * z + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    p = p * z + 1.0
    return e * _LN2_HIGH + (2.0 * s * p + e * _LN2_LOW)


# -- random numbers ------------------------------------------------------------------------------


@_inline
def _uniforms(seed, index):
    """Philox4x32-10 (Salmon et al. 2011): two numbers in [0, 1)."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low, (index >> 32) & low, 0, 0
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a_high, a_low = _high_product(c0, 0xD2511F53), (c0 * 0xD2511F53) & low
        b_high, b_low = _high_product(c2, 0xCD9E8D57), (c2 * 0xCD9E8D57) & low
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return _uniform(c0, c1), _uniform(c2, c3)


@_inline
def _uniform(a, b):
    return (float(a >> 5) * 67108864.0 + float(b >> 6)) * 1.1102230246251565e-16


# -- passes over all logits ----------------------------------------------------------------------


@_inline
def _fill_tail(logits, n_vocab, scratch):
    """The last n_vocab % 8 logits and -inf behind them; returns how many are not among them."""
    n = n_vocab & ~7
    for i in range(8):
        x = load_f32(logits + 4 * (n + i)) if n + i < n_vocab else _narrow(-_INF)
        store_f32(scratch + _TAIL + 4 * i, x)
    return n


_INF = float("inf")


@_inline
def _largest(logits, n_vocab, scratch):
    """The largest logit; NaN counts as -inf and +inf as the largest float."""
    n = _fill_tail(logits, n_vocab, scratch)
    m0 = max_f(load_f32x8(scratch + _TAIL), splat_f32(_narrow(-_INF)))
    m1 = m0
    for i in range(0, n - 8, 16):
        m0 = max_f(load_f32x8(logits + 4 * i), m0)
        m1 = max_f(load_f32x8(logits + 4 * i + 32), m1)
    if n & 8:
        m0 = max_f(load_f32x8(logits + 4 * (n - 8)), m0)
    m = _wide(max_lanes(max_f(m0, m1)))
    return m if m < _LARGEST else _LARGEST


@_inline
def _first_at_least(logits, n_vocab, x):
    """The lowest token whose logit is x or more."""
    n = n_vocab & ~63
    for i in range(0, n, 64):
        mask = _at_least(logits + 4 * i, x)
        if mask != 0:
            return i + _lowest_bit(mask)
    for i in range(n, n_vocab):
        if load_f32(logits + 4 * i) >= x:
            return i
    return 0


@_inline
def _load8(p):
    return _widen(min_f(splat_f32(_narrow(_LARGEST)), load_f32x8(p)))  # a NaN stays one


@_inline
def _sum_exp(logits, n_vocab, scratch, largest, inverse):
    """Sum of exp((logit - largest) * inverse) over the vocabulary, by lanes."""
    n = _fill_tail(logits, n_vocab, scratch)
    top, scale = splat_f64(largest), splat_f64(inverse)
    total = splat_f64(0.0)
    for i in range(0, n, 8):
        total = add_f(total, _exp8(mul_f(sub_f(_load8(logits + 4 * i), top), scale)))
    if n < n_vocab:
        total = add_f(total, _exp8(mul_f(sub_f(_load8(scratch + _TAIL), top), scale)))
    return _sum8(total)


@_inline
def _sigma(logits, n_vocab, scratch):
    """How many candidates, and the standard deviation of their logits."""
    n = _fill_tail(logits, n_vocab, scratch)
    zero, one = splat_f64(0.0), splat_f64(1.0)
    total, count = zero, zero
    for i in range(0, n_vocab, 8):
        x = _load8(logits + 4 * i if i < n else scratch + _TAIL)
        total = add_f(total, _real8(x, zero))
        count = add_f(count, _real8(add_f(sub_f(x, x), one), zero))
    n_real = _sum8(count)
    mean = splat_f64(_sum8(total) / n_real)
    squares = zero
    for i in range(0, n_vocab, 8):
        x = _load8(logits + 4 * i if i < n else scratch + _TAIL)
        off = sub_f(_real8(x, mean), mean)
        squares = add_f(squares, mul_f(off, off))
    return n_real, _sqrt(_sum8(squares) / n_real)


# -- the sorted front of the candidates ----------------------------------------------------------


@_inline
def _partition(keys, low, high, random):
    """Split [low, high) at the median of three random keys; returns where that one lies."""
    last = keys + 8 * (high - 1)
    n = high - low
    i = low + (((random >> 11) & 0xFFFFF) * n >> 20)
    j = low + (((random >> 31) & 0xFFFFF) * n >> 20)
    x, y, z = word(keys + 8 * i), word(keys + 8 * j), word(last)
    if (y < x) == (x < z):
        middle = i
    elif (x < y) == (y < z):
        middle = j
    else:
        middle = high - 1
    pivot = word(keys + 8 * middle)
    set_word(keys + 8 * middle, z)
    set_word(last, pivot)
    split = keys + 8 * low
    for p in range(keys + 8 * low, last, 8):
        x = word(p)
        set_word(p, word(split))
        set_word(split, x)
        split += 8 * (x < pivot)
    set_word(last, word(split))
    set_word(split, pivot)
    return (split - keys) >> 3


@_inline
def _next_random(random):
    return random * 6364136223846793005 + 1442695040888963407


@_inline
def _insertion(keys, low, high):
    for i in range(low + 1, high):
        x = word(keys + 8 * i)
        j = i - 1
        while j >= low and word(keys + 8 * j) > x:
            set_word(keys + 8 * (j + 1), word(keys + 8 * j))
            j -= 1
        set_word(keys + 8 * (j + 1), x)


@_inline
def _select(keys, n, k):
    """Move the k smallest keys to the front, the largest of them last."""
    low, high = 0, n
    random = n
    while high - low > _INSERTION:
        random = _next_random(random)
        split = _partition(keys, low, high, random)
        if split == k - 1:
            return
        if split > k - 1:
            high = split
        else:
            low = split + 1
    _insertion(keys, low, high)


@_inline
def _sort_more(keys, n, stack, depth, wanted):
    """Quicksort from the left until `wanted` keys are in place; returns how many are, and depth.

    The stack holds the ranges still to sort, leftmost on top. Where it is full, which random
    pivots all but exclude, insertion sorts the rest of a range.
    """
    random, done = n, 0
    while depth > 0 and done < wanted:
        depth -= 1
        low, high = word(stack + 16 * depth), word(stack + 16 * depth + 8)
        while high - low > _INSERTION and depth < _DEPTH:
            random = _next_random(random)
            split = _partition(keys, low, high, random)
            set_word(stack + 16 * depth, split + 1)
            set_word(stack + 16 * depth + 8, high)
            high = split
            depth += 1
        _insertion(keys, low, high)
        done = word(stack + 16 * (depth - 1)) if depth > 0 else n
    return done, depth


@_inline
def _push_all(stack, n):
    """Before the first `_sort_more` of n keys; returns its depth."""
    set_word(stack, 0)
    set_word(stack + 8, n)
    return 1


@_inline
def _gather(logits, n_vocab, scratch, k, floor):
    """The first k candidates with logits above `floor`, unsorted; returns how many.

    Keys are gathered above a threshold that rises to the k-th best seen whenever they fill up.
    """
    keys = scratch + _KEYS
    room = max(1024, 4 * k)
    above = floor
    n = 0
    for i in range(0, n_vocab, 64):
        if i + 64 <= n_vocab:
            mask = _above(logits + 4 * i, above)
            while mask != 0:
                j = i + _lowest_bit(mask)
                set_word(keys + 8 * n, _key(load_f32(logits + 4 * j), j))
                n += 1
                mask &= mask - 1
        else:
            for j in range(i, n_vocab):
                x = load_f32(logits + 4 * j)
                if x > above:
                    set_word(keys + 8 * n, _key(x, j))
                    n += 1
        if n >= room or (n > k and i + 64 >= n_vocab):
            _select(keys, n, k)
            n = k
            above = _narrow(_value(word(keys + 8 * (k - 1))))
    return n


@_inline
def _front(logits, n_vocab, scratch, k, floor):
    """The first k candidates with logits above `floor`, sorted; returns how many."""
    n = _gather(logits, n_vocab, scratch, k, floor)
    stack = scratch + _STACK
    _sort_more(scratch + _KEYS, n, stack, _push_all(stack, n), n)
    return n


# -- logits that are changed one by one ----------------------------------------------------------


@_inline
def _set_logit(p, x):
    """Change a logit, unless it is NaN or -inf; a finite one stays finite."""
    if load_f32(p) > _narrow(-_INF):
        x = x if x < _LARGEST else _LARGEST
        x = x if x > -_LARGEST else -_LARGEST
        store_f32(p, _narrow(x))


@_inline
def _logit(p):
    x = _wide(load_f32(p))
    return x if x < _LARGEST else _LARGEST


@_inline
def _clip(last_n, n_history):
    return n_history if last_n < 0 or last_n > n_history else last_n


@_inline
def _save(row, logits, n_vocab, saved, back):
    """Save (or, `back`, restore) every logit that the row changes."""
    ids, n = word(row + at.PARAM_BIAS_IDS), word(row + at.PARAM_N_BIAS)
    for _ in range(2):
        for i in range(n):
            token = intp(load_i32(ids + 4 * i))
            if 0 <= token < n_vocab:
                if back:
                    store_f32(logits + 4 * token, load_f32(saved + 4 * token))
                else:
                    store_f32(saved + 4 * token, load_f32(logits + 4 * token))
        ids, n = word(row + at.PARAM_HISTORY), word(row + at.PARAM_N_HISTORY)


@_inline
def _bias(row, logits, n_vocab):
    ids, values = word(row + at.PARAM_BIAS_IDS), word(row + at.PARAM_BIAS_VALUES)
    for i in range(word(row + at.PARAM_N_BIAS)):
        token = intp(load_i32(ids + 4 * i))
        if token < n_vocab:
            p = logits + 4 * token
            bias = _wide(load_f32(values + 4 * i))
            _set_logit(p, _logit(p) + bias)
            if bias == -_INF:
                store_f32(p, _narrow(-_INF))


@_inline
def _penalise(row, logits, n_vocab, counts, history, n):
    """`counts` is an int32 per token; only those of the history are ever touched."""
    repeat = load_f64(row + at.PARAM_REPEAT_PENALTY)
    presence = load_f64(row + at.PARAM_PRESENCE_PENALTY)
    frequency = load_f64(row + at.PARAM_FREQUENCY_PENALTY)
    for i in range(n):
        token = intp(load_i32(history + 4 * i))
        if 0 <= token < n_vocab:
            store_i32(counts + 4 * token, 0)
    for i in range(n):
        token = intp(load_i32(history + 4 * i))
        if 0 <= token < n_vocab:
            store_i32(counts + 4 * token, load_i32(counts + 4 * token) + 1)
    for i in range(n):
        token = intp(load_i32(history + 4 * i))
        if 0 <= token < n_vocab and load_i32(counts + 4 * token) > 0:
            p = logits + 4 * token
            x = _logit(p)
            x = x * repeat if x <= 0.0 else x / repeat
            _set_logit(p, x - (float(load_i32(counts + 4 * token)) * frequency + presence))
            store_i32(counts + 4 * token, 0)


@_inline
def _first_head(heads, n, token):
    """Index of the first breaker whose head is `token` or more."""
    low, high = 0, n
    while low < high:
        middle = (low + high) >> 1
        if intp(load_i32(heads + 4 * middle)) < token:
            low = middle + 1
        else:
            high = middle
    return low


@_inline
def _dry_limit(heads, n, history, n_history):
    """How many of the latest tokens come after the last breaker."""
    tails = heads + 8 * n
    for back in range(n_history):
        p = history + 4 * (n_history - 1 - back)
        head = intp(load_i32(p))
        longest = -1
        i = _first_head(heads, n, head)
        while i < n and intp(load_i32(heads + 4 * i)) == head:
            start = intp(load_i32(heads + 4 * (n + i - 1))) if i > 0 else 0
            length = intp(load_i32(heads + 4 * (n + i))) - start
            same = longest < length <= back
            j = 0
            while same and j < length:
                same = load_i32(tails + 4 * (start + j)) == load_i32(p + 4 * (1 + j))
                j += 1
            if same:
                longest = length
            i += 1
        if longest >= 0:
            return back - longest
    return n_history


@_inline
def _dry(row, logits, n_vocab, longest, history, n):
    """`longest` is an int32 per token; only those of the history are ever touched."""
    allowed = word(row + at.PARAM_DRY_ALLOWED_LENGTH)
    heads, n_breakers = word(row + at.PARAM_BREAKERS), word(row + at.PARAM_N_BREAKERS)
    limit = _dry_limit(heads, n_breakers, history, n) if n > allowed else -1
    if limit < allowed:
        return
    limit = min(limit, allowed + _DRY_LONGEST)
    for i in range(n):
        token = intp(load_i32(history + 4 * i))
        if 0 <= token < n_vocab:
            store_i32(longest + 4 * token, -1)
    last = history + 4 * (n - 1)
    for back in range(1, n):
        length = 0
        while (
            length < limit
            and length + back < n
            and load_i32(last - 4 * length) == load_i32(last - 4 * (length + back))
        ):
            length += 1
        token = intp(load_i32(last - 4 * (back - 1)))
        if length >= allowed and 0 <= token < n_vocab:
            store_i32(longest + 4 * token, max(length, load_i32(longest + 4 * token)))
    multiplier, base = load_f64(row + at.PARAM_DRY_MULTIPLIER), load_f64(row + at.PARAM_DRY_BASE)
    for i in range(n):
        token = intp(load_i32(history + 4 * i))
        if token < 0 or token >= n_vocab or load_i32(longest + 4 * token) < 0:
            continue
        j = _first_head(heads, n_breakers, token)
        breaks = False
        if j < n_breakers and intp(load_i32(heads + 4 * j)) == token:
            start = intp(load_i32(heads + 4 * (n_breakers + j - 1))) if j > 0 else 0
            breaks = intp(load_i32(heads + 4 * (n_breakers + j))) == start
        if not breaks:
            penalty = multiplier
            for _ in range(load_i32(longest + 4 * token) - allowed):
                penalty = penalty * base
                penalty = penalty if penalty < _LARGEST else _LARGEST
            p = logits + 4 * token
            _set_logit(p, _logit(p) - penalty)
        store_i32(longest + 4 * token, -1)


# -- samplers over sorted keys -------------------------------------------------------------------


@_inline
def _sum_keys(keys, n, largest, inverse):
    """Sum of exp((logit - largest) * inverse), from left to right."""
    total = 0.0
    for i in range(n):
        total += _exp((_value(word(keys + 8 * i)) - largest) * inverse)
    return total


@_inline
def _entropy(keys, n, largest):
    total, products = 0.0, 0.0
    for i in range(n):
        scaled = _value(word(keys + 8 * i)) - largest
        weight = _exp(scaled)
        total += weight
        products += weight * scaled
    return _log(total) - products / total, total


@_inline
def _surprise(keys, i, largest, log_total, entropy):
    """How far candidate i's surprise is from the entropy."""
    return abs((log_total - (_value(word(keys + 8 * i)) - largest)) - entropy)


@_inline
def _typical(row, keys, n):
    """Keep the candidates nearest to the entropy; returns how many.

    The distance falls, then rises along the keys, so two ends of a gap that grows meet them in
    order; of equal distances on the left the first comes first.
    """
    limit = load_f64(row + at.PARAM_TYPICAL_P)
    min_keep = word(row + at.PARAM_MIN_KEEP)
    largest = _value(word(keys))
    entropy, total = _entropy(keys, n, largest)
    log_total = _log(total)
    right = 0
    while right < n and log_total - (_value(word(keys + 8 * right)) - largest) < entropy:
        right += 1
    left = right  # candidates [left, right) are kept
    run, taken = right, right  # and [run, taken), of the equal ones to the left
    total = limit * total
    cum = 0.0
    count = 0
    while count < n:
        if run == taken and left == run and left > 0:
            run = left - 1
            distance = _surprise(keys, run, largest, log_total, entropy)
            while run > 0 and (_surprise(keys, run - 1, largest, log_total, entropy) == distance):
                run -= 1
            taken = run
        take_left = taken < left
        if take_left and right < n:
            take_left = _surprise(keys, taken, largest, log_total, entropy) <= _surprise(
                keys, right, largest, log_total, entropy
            )
        if take_left:
            i = taken
            taken += 1
        else:
            i = right
            right += 1
        cum += _exp(_value(word(keys + 8 * i)) - largest)
        count += 1
        if cum > total and count >= min_keep:
            break
        if take_left and taken == left:
            left = run
            taken = run
    n_left = taken - run
    for i in range(n_left):
        set_word(keys + 8 * i, word(keys + 8 * (run + i)))
    for i in range(right - left):
        set_word(keys + 8 * (n_left + i), word(keys + 8 * (left + i)))
    return n_left + right - left


@_inline
def _xtc(row, keys, n):
    """How many to drop from the front."""
    largest = _value(word(keys))
    limit = load_f64(row + at.PARAM_XTC_THRESHOLD) * _sum_keys(keys, n, largest, 1.0)
    last = -1
    while last + 1 < n and _exp(_value(word(keys + 8 * (last + 1))) - largest) >= limit:
        last += 1
    return last if last > 0 and n - last >= word(row + at.PARAM_MIN_KEEP) else 0


@_inline
def _dynamic_temperature(row, keys, n):
    temperature = load_f64(row + at.PARAM_TEMPERATURE)
    around = load_f64(row + at.PARAM_DYNATEMP_RANGE)
    exponent = load_f64(row + at.PARAM_DYNATEMP_EXPONENT)
    entropy, _ = _entropy(keys, n, _value(word(keys)))
    lowest, highest = max(0.0, temperature - around), temperature + around
    share = entropy / _log(float(n))
    power = 1.0 if exponent == 0.0 else 0.0
    if share > 0.0:
        power = _exp(exponent * _log(share))
    return lowest + (highest - lowest) * power


@_inline
def _mirostat_k(keys, n, inverse, mu, n_vocab):
    """How many candidates mirostat 1 keeps, from Zipf's exponent of the first 100."""
    products, squares = 0.0, 0.0
    largest = _value(word(keys))
    for i in range(min(99, n - 1)):
        t = _log((float(i) + 2.0) / (float(i) + 1.0))
        x = (_value(word(keys + 8 * i)) - largest) * inverse
        y = (_value(word(keys + 8 * (i + 1))) - largest) * inverse
        products += t * (x - y)
        squares += t * t
    if not products > 0.0:
        return n_vocab
    s = products / squares
    epsilon = s - 1.0
    above = epsilon * _exp(mu * _LN2)
    below = 1.0 - _exp(-epsilon * _log(float(n_vocab)))
    if below == 0.0 or not 0.0 < above / below < 1e300:
        return n_vocab
    k = _exp(_log(above / below) / s)
    return n_vocab if k >= float(n_vocab) else max(1, int(k))


# -- one row -------------------------------------------------------------------------------------


@_inline
def _pick(row, logits, n_vocab, scratch, largest):
    """The whole chain on changed logits; returns the token and the next mu."""
    keys = scratch + _KEYS
    temperature = load_f64(row + at.PARAM_TEMPERATURE)
    mirostat = word(row + at.PARAM_MIROSTAT)
    mu = load_f64(row + at.PARAM_MU)
    draw, chance = _uniforms(word(row + at.PARAM_SEED), word(row + at.PARAM_INDEX))
    inverse = 1.0 / (temperature if temperature > 1e-30 else 1e-30)
    min_keep = word(row + at.PARAM_MIN_KEEP)
    typical = mirostat == 0 and load_f64(row + at.PARAM_TYPICAL_P) < 1.0
    dynamic = mirostat == 0 and load_f64(row + at.PARAM_DYNATEMP_RANGE) > 0.0
    excludes = (
        mirostat == 0
        and load_f64(row + at.PARAM_XTC_PROBABILITY) > 0.0
        and load_f64(row + at.PARAM_XTC_THRESHOLD) <= 0.5
        and chance <= load_f64(row + at.PARAM_XTC_PROBABILITY)
    )
    # `whole`: nothing was cut off yet. `complete`: the n keys sorted so far are all there are.
    whole = True
    lowest = -_INF
    asked = n_vocab
    if mirostat == 0:
        n_sigma = load_f64(row + at.PARAM_TOP_N_SIGMA)
        if n_sigma > 0.0:
            n_real, deviation = _sigma(logits, n_vocab, scratch)
            if n_real > 1.0:
                lowest = largest - n_sigma * deviation
                whole = False
        top_k = word(row + at.PARAM_TOP_K)
        if 0 < top_k < n_vocab:
            asked = top_k
            whole = False
    complete = not whole or typical or dynamic or excludes
    if not complete:
        asked = min(_LAZY, n_vocab)
    floor = lowest - abs(lowest) * 1e-6 - 1e-30  # a float below `lowest`, whatever its rounding
    n = _front(logits, n_vocab, scratch, asked, _narrow(floor))
    complete = complete or n < asked or asked == n_vocab
    if lowest > -_INF:
        while n > 1 and _value(word(keys + 8 * (n - 1))) < lowest:
            n -= 1
    if typical:
        n = _typical(row, keys, n)
        whole = False
        largest = _value(word(keys))

    # First walk along the keys: top_p and min_p together, or mirostat's cut.
    target, threshold, length, log_total = _INF, -_INF, n_vocab, 0.0
    cuts = False
    if mirostat == 1:
        length = _mirostat_k(keys, n, inverse, mu, n_vocab)
        cuts = True
    elif mirostat == 2:
        log_total = _log(_sum_exp(logits, n_vocab, scratch, largest, inverse))
        cuts = True
    else:
        top_p, min_p = load_f64(row + at.PARAM_TOP_P), load_f64(row + at.PARAM_MIN_P)
        if top_p < 1.0:
            if whole:
                target = top_p * _sum_exp(logits, n_vocab, scratch, largest, 1.0)
            else:
                target = top_p * _sum_keys(keys, n, largest, 1.0)
            cuts = True
        if min_p > 0.0:
            threshold = largest + _log(min_p)
            cuts = True
    total = 0.0
    last = 0
    depth, n_all = 0, 0
    for walk in range(2):
        if walk == 0 and not cuts:
            continue
        if walk == 1:
            if excludes:
                n_drop = _xtc(row, keys, n)
                if n_drop > 0:
                    keys += 8 * n_drop
                    n -= n_drop
                    whole = False
                    largest = _value(word(keys))
            if dynamic and n > 1:
                temperature = _dynamic_temperature(row, keys, n)
                inverse = 1.0 / (temperature if temperature > 1e-30 else 1e-30)
            if temperature <= 0.0:
                return _token(word(keys)), mu
            if whole:
                total = _sum_exp(logits, n_vocab, scratch, largest, inverse)
            else:
                total = _sum_keys(keys, n, largest, inverse)
            target = draw * total
        i = 0
        cum = 0.0
        while True:
            if i == n and not complete:
                if depth == 0:
                    n_all = _gather(logits, n_vocab, scratch, n_vocab, _narrow(-_INF))
                    depth = _push_all(scratch + _STACK, n_all)
                n, depth = _sort_more(keys, n_all, scratch + _STACK, depth, n + 1)
                complete = depth == 0
            if i == n:
                break
            value = _value(word(keys + 8 * i))
            x = value - largest
            if walk == 1:
                weight = _exp(x * inverse)
                cum += weight
                if weight > 0.0:
                    last = i
                if cum > target:
                    break
            elif mirostat != 0:
                if i == length or (
                    mirostat == 2 and i > 0 and (log_total - x * inverse) * _LOG2_E > mu
                ):
                    break
            else:
                if i >= max(min_keep, 1) and value < threshold:
                    break
                if target < _INF:
                    cum += _exp(x)
                    if cum >= target and i + 1 >= min_keep:
                        i += 1
                        break
            i += 1
        if walk == 0:
            n = i
            whole = False
            complete = True
    x = (_value(word(keys + 8 * last)) - largest) * inverse
    if mirostat != 0:
        surprise = (_log(total) - x) * _LOG2_E
        mu = mu - load_f64(row + at.PARAM_MIROSTAT_ETA) * (
            surprise - load_f64(row + at.PARAM_MIROSTAT_TAU)
        )
    return _token(word(keys + 8 * last)), mu


@_inline
def _list_top(logits, n_vocab, scratch, n_top, largest, log_total, ids, values):
    """The n_top likeliest tokens; returns nothing, writes (-1, -inf) where there are no more."""
    n = 0
    if n_top > 0 and largest > -_INF:
        n = _front(logits, n_vocab, scratch, min(n_top, n_vocab), _narrow(-_INF))
    for i in range(n_top):
        if i < n:
            key = word(scratch + _KEYS + 8 * i)
            store_i32(ids + 4 * i, _token(key))
            store_f32(values + 4 * i, _narrow(_value(key) - largest - log_total))
        else:
            store_i32(ids + 4 * i, -1)
            store_f32(values + 4 * i, _narrow(-_INF))


@_inline
def _sample(table, i, logits, n_vocab, scratch):
    row = word(table + at.SAMPLES_ROWS) + i * word(table + at.SAMPLES_ROW_BYTES)
    raw_largest, log_total = 0.0, 0.0
    n_top = word(row + at.PARAM_N_LOGPROBS)
    if n_top >= 0:
        raw_largest = _largest(logits, n_vocab, scratch)
        if raw_largest > -_INF:
            log_total = _log(_sum_exp(logits, n_vocab, scratch, raw_largest, 1.0))
        offset = 4 * i * word(table + at.SAMPLES_MAX_LOGPROBS)
        _list_top(
            logits, n_vocab, scratch, n_top, raw_largest, log_total,
            word(table + at.SAMPLES_TOP_IDS) + offset,
            word(table + at.SAMPLES_TOP_LOGPROBS) + offset,
        )  # fmt: skip
    saved = scratch + _KEYS + 8 * (n_vocab + 64)
    n_history = word(row + at.PARAM_N_HISTORY)
    n_penalised = _clip(word(row + at.PARAM_REPEAT_LAST_N), n_history)
    n_dry = _clip(word(row + at.PARAM_DRY_PENALTY_LAST_N), n_history)
    changes = word(row + at.PARAM_N_BIAS) > 0 or n_history > 0
    if changes:
        end = word(row + at.PARAM_HISTORY) + 4 * n_history
        _save(row, logits, n_vocab, saved, False)
        _bias(row, logits, n_vocab)
        _penalise(row, logits, n_vocab, scratch + _KEYS, end - 4 * n_penalised, n_penalised)
        if n_dry > 0:
            _dry(row, logits, n_vocab, scratch + _KEYS, end - 4 * n_dry, n_dry)
    largest = _largest(logits, n_vocab, scratch)
    token, mu, status = 0, load_f64(row + at.PARAM_MU), 0
    if largest == -_INF:
        status = 1
    elif load_f64(row + at.PARAM_TEMPERATURE) <= 0.0:
        token = _first_at_least(logits, n_vocab, _narrow(largest))
    else:
        token, mu = _pick(row, logits, n_vocab, scratch, largest)
    if changes:
        _save(row, logits, n_vocab, saved, True)
    logprob = _narrow(_INF - _INF)
    if n_top >= 0:
        logprob = _narrow(-_INF)
        if raw_largest > -_INF and load_f32(logits + 4 * token) > logprob:
            logprob = _narrow(_logit(logits + 4 * token) - raw_largest - log_total)
    store_i32(word(table + at.SAMPLES_IDS) + 4 * i, token)
    store_i32(word(table + at.SAMPLES_STATUS) + 4 * i, status)
    store_f32(word(table + at.SAMPLES_LOGPROBS) + 4 * i, logprob)
    store_f64(word(table + at.SAMPLES_MU) + 8 * i, mu)


def make(isa):
    def kernel(h, a, chunk, thread):
        table = word(h + at.H_SAMPLES)
        if table == 0:
            return
        scratch = word(a + at.SAMPLE_SCRATCH) + thread * word(a + at.SAMPLE_SCRATCH_BYTES)
        logits = word(a + at.SAMPLE_LOGITS) + chunk * word(a + at.SAMPLE_STRIDE)
        _sample(table, chunk, logits, word(a + at.SAMPLE_N_VOCAB), scratch)

    return kernel
