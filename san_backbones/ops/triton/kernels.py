"""Triton kernels of footprint attention, forwards and backwards.

A program works on a block of M pixels, numbered through the batch, and loops over the taps of their footprints. Maps
are channels last, a pixel `ROW` elements from the next; gamma is folded, as `fused` describes it. All is float32,
except that factors of a matrix product have the dtype of the maps (with float32 maps, PRECISION says how they are
multiplied). Sizes of channels are constants of a compiled kernel, sizes of images are not.

Names: q, k, v are phi(x_i), psi(x_j), beta(x_j); x the relation and e its positive part after norm1; u the hidden
vector before the second ReLU and h behind it; w the weights; g the gradient of the output. FORM and RELATION are names
of the table `relations.RELATIONS`; a relation has CENTRE channels of phi(x_i) alone, then TAP of each tap. Blocks of
channels are R (of phi and psi), T (TAP), H (hidden), C (weight channels), S (shares) and B (shares at a time), all
powers of 2. A new relation is a case in `_relate` and one in `_relate_backward`.
"""
import triton
import triton.language as tl

NO_POSITION = tl.constexpr(0)
RELATIVE = tl.constexpr(1)
ABSOLUTE = tl.constexpr(2)

IMAGE_SIZES = ['pixels', 'height', 'width']
"""Arguments of kernels whose values make no new one."""


@triton.jit
def _relu(x):
    return tl.maximum(x, 0., propagate_nan=tl.PropagateNan.ALL)


INTERPRETED = not isinstance(_relu, triton.JITFunction)
"""Whether these kernels run in Triton's interpreter, on the CPU: decided when they are made."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_NARROWEST = tl.constexpr(16 if triton.__version__.startswith('3.4.') else 8)  # columns of a product in tl.dot


@triton.jit
def _product(a, b, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, on tensor cores unless it is too narrow for them."""
    if a.shape[0] >= 16 and a.shape[1] >= 16 and b.shape[1] >= _NARROWEST:
        a = a.to(KIND)
        b = b.to(KIND)
        if _INTERPRETED:  # which multiplies the bits of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        c = tl.dot(a, b, input_precision=PRECISION)
    else:
        c = tl.sum(a[:, :, None] * b[None, :, :], 1)
    return c


@triton.jit
def _pixel_block(block, pixels, height, width, M: tl.constexpr):
    """Pixels of a block, which of them exist (the others are read as the first), and their row and column."""
    pixel = block * M + tl.arange(0, M)
    live = pixel < pixels
    pixel = tl.where(live, pixel, 0)
    return pixel, live, (pixel // width) % height, pixel % width


@triton.jit
def _reflect(position, size, PAD: tl.constexpr):
    """As geometry.reflection_index."""
    period = tl.maximum(2 * size - 2, 1)
    position = (position + period - PAD % period) % period  # no product: large ones are beyond int32
    return tl.minimum(position, period - position)


@triton.jit
def _neighbour(tap, row, column, height, width, K: tl.constexpr, DILATION: tl.constexpr):
    """Number, within its image, of what every pixel sees at a tap."""
    PAD: tl.constexpr = DILATION * (K - 1) // 2
    return _reflect(row + tap // K * DILATION, height, PAD) * width + _reflect(column + tap % K * DILATION, width, PAD)


@triton.jit
def _channel_pointers(base, pixel, ROW: tl.constexpr, BLOCK: tl.constexpr):
    return base + pixel.to(tl.int64)[:, None] * ROW + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _read(base, pixel, ROW: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of pixels: (M, BLOCK)."""
    at = _channel_pointers(base, pixel, ROW, BLOCK)
    if BLOCK == COUNT:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=tl.arange(0, BLOCK)[None, :] < COUNT, other=0.)
    return x.to(tl.float32)


@triton.jit
def _share_pointers(base, pixel, ROW: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """Channels that share a weight are `CHANNELS` apart: (M, S, C)."""
    channel = tl.arange(0, S)[:, None] * CHANNELS + tl.arange(0, C)[None, :]
    return base + pixel.to(tl.int64)[:, None, None] * ROW + channel[None, :, :]


@triton.jit
def _share_mask(live, CHANNELS: tl.constexpr, shares, S: tl.constexpr, C: tl.constexpr):
    used = (tl.arange(0, S)[:, None] < shares) & (tl.arange(0, C)[None, :] < CHANNELS)
    return live[:, None, None] & used[None, :, :]


@triton.jit
def _read_shares(base, pixel, ROW: tl.constexpr, CHANNELS: tl.constexpr, SHARES: tl.constexpr, S: tl.constexpr,
                 C: tl.constexpr):
    at = _share_pointers(base, pixel, ROW, CHANNELS, S, C)
    if S == SHARES and C == CHANNELS:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=_share_mask(tl.full((1,), 1, tl.int1), CHANNELS, SHARES, S, C), other=0.)
    return x.to(tl.float32)


@triton.jit
def _read_vector(base, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(base + i, mask=i < COUNT, other=0.)


@triton.jit
def _matrix(base, ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Pointers to and mask of a matrix of ROWS x COLUMNS in a block of A x B."""
    i, j = tl.arange(0, A), tl.arange(0, B)
    return base + i[:, None] * ROW + j[None, :], (i[:, None] < ROWS) & (j[None, :] < COLUMNS)


@triton.jit
def _read_matrix(base, ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    at, mask = _matrix(base, ROW, ROWS, COLUMNS, A, B)
    return tl.load(at, mask=mask, other=0.)


@triton.jit
def _again(base, tap, K: tl.constexpr):
    """`base`, in a way that the compiler cannot know: what is read from there is not kept while the taps go by. Two
    matrices of wide layers would not stay in shared memory together, with 99 KiB of it as on compute capability 8.6.
    """
    return base + tap // (K * K)


@triton.jit
def _relate(q, k, FORM: tl.constexpr, RELATION: tl.constexpr):
    """The channels that one tap adds to the relation: (M, T)."""
    if FORM == 'pairwise' and RELATION == 'subtraction':
        x = q - k
    elif FORM == 'pairwise' and RELATION == 'summation':
        x = q + k
    elif FORM == 'pairwise' and RELATION == 'hadamard':
        x = q * k
    elif FORM == 'pairwise' and RELATION == 'dot' or FORM == 'patchwise' and RELATION == 'star':
        x = tl.sum(q * k, 1)[:, None]
    else:
        tl.static_assert(RELATION == 'concatenation', 'the Triton kernels have no such relation')
        x = k
    return x


@triton.jit
def _relate_backward(d_x, q, k, d_q, FORM: tl.constexpr, RELATION: tl.constexpr):
    """Adds to the gradient of q; that of k."""
    if FORM == 'pairwise' and RELATION == 'subtraction':
        d_q += d_x
        d_k = -d_x
    elif FORM == 'pairwise' and RELATION == 'summation':
        d_q += d_x
        d_k = d_x
    elif FORM == 'pairwise' and (RELATION == 'hadamard' or RELATION == 'dot') \
            or FORM == 'patchwise' and RELATION == 'star':
        d_q += d_x * k
        d_k = d_x * q
    else:
        tl.static_assert(RELATION == 'concatenation', 'the Triton kernels have no such relation')
        d_k = d_x
    return d_q, d_k


@triton.jit
def _offset(place, spot, there, channel: tl.constexpr, POSITION: tl.constexpr):
    """A position channel of a pair: (M,)."""
    x = tl.load(place + 2 * there + channel)
    if POSITION == RELATIVE:
        x = tl.load(place + 2 * spot + channel) - x
    return x


@triton.jit
def _add_positions(u, place, spot, there, scale, shift, weight, HIDDEN: tl.constexpr, H: tl.constexpr,
                   POSITION: tl.constexpr):
    """Adds what the two position channels contribute to the hidden vectors; scale, shift and weight are theirs."""
    if POSITION != NO_POSITION:
        for c in tl.static_range(2):
            e = _relu(_offset(place, spot, there, c, POSITION) * tl.load(scale + c) + tl.load(shift + c))
            u += e[:, None] * _read_vector(weight + c * HIDDEN, HIDDEN, H)[None, :]
    return u


@triton.jit
def _add_centre(u, q, scale, shift, weight, REL: tl.constexpr, HIDDEN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
                CENTRE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what the channels of phi(x_i) alone contribute to the hidden vectors; their positive part."""
    e = q
    if CENTRE:
        e = _relu(q * _read_vector(scale, REL, R)[None, :] + _read_vector(shift, REL, R)[None, :])
        u += _product(e, _read_matrix(weight, HIDDEN, REL, HIDDEN, R, H), KIND, PRECISION)
    return u, e


@triton.jit(do_not_specialize=IMAGE_SIZES)
def attend_pairwise(
        query, key, value, place, scale1, shift1, weight1, shift2, weight2, bias2, shift, gradient, output, lse, slope,
        pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, POSITION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
        REL: tl.constexpr, CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
        SHARES: tl.constexpr, QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
        PRECISION: tl.constexpr, R: tl.constexpr, T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
        M: tl.constexpr, WIDE: tl.constexpr):
    """The output, relu(output + shift) where shift is given; or, given the output's gradient, what
    `attend_pairwise_backward` needs of every pixel: log sum exp of the logits, and sum_o w_o dw_o, which is the sum
    over shares of y dy.
    """
    KIND: tl.constexpr = key.dtype.element_ty
    LAST: tl.constexpr = CENTRE + TAP
    pixel, live, row, column = _pixel_block(tl.program_id(0), pixels, height, width, M)
    image = pixel // (height * width) * (height * width)
    spot = pixel - image
    q = _read(query, pixel, QUERY_ROW, REL, R)
    s1 = _read_vector(scale1 + CENTRE, TAP, T)
    t1 = _read_vector(shift1 + CENTRE, TAP, T)
    if not WIDE:
        w1 = _read_matrix(weight1 + CENTRE * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
        w2 = _read_matrix(weight2, CHANNELS, HIDDEN, CHANNELS, H, C)
    b2 = _read_vector(bias2, CHANNELS, C)
    common = tl.zeros((M, H), tl.float32) + _read_vector(shift2, HIDDEN, H)[None, :]
    common, _ = _add_centre(common, q, scale1, shift1, weight1, REL, HIDDEN, R, H, CENTRE, KIND, PRECISION)
    top = tl.full((M, C), float('-inf'), tl.float32)
    total = tl.zeros((M, C), tl.float32)
    y = tl.zeros((M, S, C), tl.float32)
    for tap in range(K * K):
        there = _neighbour(tap, row, column, height, width, K, DILATION)
        k = _read(key, image + there, KEY_ROW, REL, R)
        e = _relu(_relate(q, k, FORM, RELATION) * s1[None, :] + t1[None, :])
        if WIDE:
            w1 = _read_matrix(_again(weight1 + CENTRE * HIDDEN, tap, K), HIDDEN, TAP, HIDDEN, T, H)
        u = common + _product(e, w1, KIND, PRECISION)
        u = _add_positions(u, place, spot, there, scale1 + LAST, shift1 + LAST, weight1 + LAST * HIDDEN, HIDDEN, H,
                           POSITION)
        if WIDE:
            w2 = _read_matrix(_again(weight2, tap, K), CHANNELS, HIDDEN, CHANNELS, H, C)
        logits = _product(_relu(u), w2, KIND, PRECISION) + b2[None, :]
        new = tl.maximum(top, logits)
        safe = tl.where(new == float('-inf'), 0., new)  # until a logit is more than that
        old = tl.exp(top - safe)
        w = tl.exp(logits - safe)
        total = total * old + w
        v = _read_shares(value, image + there, VALUE_ROW, CHANNELS, SHARES, S, C)
        y = y * old[:, None, :] + w[:, None, :] * v
        top = new
    y = y / total[:, None, :]
    mask = _share_mask(live, CHANNELS, SHARES, S, C)
    if gradient is None:
        if shift is not None:
            channel = tl.arange(0, S)[:, None] * CHANNELS + tl.arange(0, C)[None, :]
            used = _share_mask(tl.full((1,), 1, tl.int1), CHANNELS, SHARES, S, C)
            y = _relu(y + tl.load(shift + channel[None, :, :], mask=used, other=0.))
        tl.store(_share_pointers(output, pixel, CHANNELS * SHARES, CHANNELS, S, C), y, mask=mask)
    else:
        g = tl.load(_share_pointers(gradient, pixel, CHANNELS * SHARES, CHANNELS, S, C), mask=mask, other=0.)
        mask = live[:, None] & (tl.arange(0, C)[None, :] < CHANNELS)
        tl.store(_channel_pointers(lse, pixel, CHANNELS, C), top + tl.log(total), mask=mask)
        tl.store(_channel_pointers(slope, pixel, CHANNELS, C), tl.sum(y * g.to(tl.float32), 1), mask=mask)


@triton.jit
def _add_sums(total, squares, u, live, M: tl.constexpr):
    """Adds those of u and of u * u over the pixels of a block, of which the first always exists."""
    # of differences from the first: float32 has no digits for the variance beside a large mean
    centre = tl.sum(tl.where(tl.arange(0, M)[:, None] == 0, u, 0.), 0)
    v = tl.where(live[:, None], u - centre[None, :], 0.)
    count = tl.sum(live.to(tl.float32), 0).to(tl.float64)
    centre = centre.to(tl.float64)
    sums = tl.sum(v, 0).to(tl.float64)
    total += count * centre + sums
    squares += count * centre * centre + 2 * centre * sums + tl.sum(v * v, 0).to(tl.float64)
    return total, squares


@triton.jit(do_not_specialize=IMAGE_SIZES)
def pairwise_sums(
        query, key, place, scale1, shift1, weight1, sums, pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, POSITION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
        REL: tl.constexpr, CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, QUERY_ROW: tl.constexpr,
        KEY_ROW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
        M: tl.constexpr):
    """Sums of u and of u * u over the blocks of a program: sums[program] is (2, HIDDEN) in float64."""
    KIND: tl.constexpr = key.dtype.element_ty
    LAST: tl.constexpr = CENTRE + TAP
    s1 = _read_vector(scale1 + CENTRE, TAP, T)
    t1 = _read_vector(shift1 + CENTRE, TAP, T)
    w1 = _read_matrix(weight1 + CENTRE * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
    total = tl.zeros((H,), tl.float64)
    squares = tl.zeros((H,), tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(pixels, M), tl.num_programs(0)):
        pixel, live, row, column = _pixel_block(block, pixels, height, width, M)
        image = pixel // (height * width) * (height * width)
        spot = pixel - image
        q = _read(query, pixel, QUERY_ROW, REL, R)
        common = tl.zeros((M, H), tl.float32)
        common, _ = _add_centre(common, q, scale1, shift1, weight1, REL, HIDDEN, R, H, CENTRE, KIND, PRECISION)
        for tap in range(K * K):
            there = _neighbour(tap, row, column, height, width, K, DILATION)
            k = _read(key, image + there, KEY_ROW, REL, R)
            e = _relu(_relate(q, k, FORM, RELATION) * s1[None, :] + t1[None, :])
            u = common + _product(e, w1, KIND, PRECISION)
            u = _add_positions(u, place, spot, there, scale1 + LAST, shift1 + LAST, weight1 + LAST * HIDDEN, HIDDEN, H,
                               POSITION)
            total, squares = _add_sums(total, squares, u, live, M)
    at = sums + tl.program_id(0) * 2 * HIDDEN + tl.arange(0, H)
    tl.store(at, total, mask=tl.arange(0, H) < HIDDEN)
    tl.store(at + HIDDEN, squares, mask=tl.arange(0, H) < HIDDEN)


@triton.jit
def _weights_backward(
        gradient, value, d_value, w, pixel, there, live, CHANNELS: tl.constexpr, SHARES: tl.constexpr,
        VALUE_ROW: tl.constexpr, B: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """Gradient of the weights of a tap, the sum over shares of g v; g w goes to d_value where that is given.

    B shares at a time: all of them would not stay in registers beside the rest of a backward pass.
    """
    d_w = tl.zeros((M, C), tl.float32)
    for first in range(0, SHARES, B):
        mask = _share_mask(live, CHANNELS, SHARES - first, B, C)
        at = _share_pointers(gradient + first * CHANNELS, pixel, CHANNELS * SHARES, CHANNELS, B, C)
        g = tl.load(at, mask=mask, other=0.).to(tl.float32)
        at = _share_pointers(value + first * CHANNELS, there, VALUE_ROW, CHANNELS, B, C)
        d_w += tl.sum(g * tl.load(at, mask=mask, other=0.).to(tl.float32), 1)
        if d_value is not None:
            at = _share_pointers(d_value + first * CHANNELS, there, CHANNELS * SHARES, CHANNELS, B, C)
            tl.atomic_add(at, g * w[:, None, :], mask=mask, sem='relaxed')
    return d_w


@triton.jit
def _scatter(d_map, d, pixel, live, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    mask = live[:, None] & (tl.arange(0, BLOCK)[None, :] < COUNT)
    tl.atomic_add(_channel_pointers(d_map, pixel, COUNT, BLOCK), d, mask=mask, sem='relaxed')


@triton.jit(do_not_specialize=IMAGE_SIZES)
def attend_pairwise_backward(
        query, key, value, place, scale1, shift1, weight1, shift2, weight2, bias2, gradient, lse, slope, slopes,
        d_query, d_key, d_value, d_place, parameters, pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, POSITION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
        REL: tl.constexpr, CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
        SHARES: tl.constexpr, QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr,
        INPUTS: tl.constexpr, TOTAL: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
        H: tl.constexpr, C: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Gradients of the maps, and of gamma in parameters[program]: scale1, shift1, weight1, shift2, weight2 (TOTAL
    numbers). What goes to neighbours is added atomically. With `slopes` instead of `value`: the gradients of
    `pairwise_sums`, d loss / d u being slopes[0] + slopes[1] * u.
    """
    KIND: tl.constexpr = key.dtype.element_ty
    LAST: tl.constexpr = CENTRE + TAP
    s1 = _read_vector(scale1 + CENTRE, TAP, T)
    t1 = _read_vector(shift1 + CENTRE, TAP, T)
    w1 = _read_matrix(weight1 + CENTRE * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
    base = tl.zeros((H,), tl.float32)
    if value is not None:
        w2 = _read_matrix(weight2, CHANNELS, HIDDEN, CHANNELS, H, C)
        b2 = _read_vector(bias2, CHANNELS, C)
        base += _read_vector(shift2, HIDDEN, H)
        d_w2 = tl.zeros((H, C), tl.float32)
    else:
        slope0 = _read_vector(slopes, HIDDEN, H)
        slope1 = _read_vector(slopes + HIDDEN, HIDDEN, H)
    d_w1 = tl.zeros((T, H), tl.float32)
    d_s1 = tl.zeros((T,), tl.float32)
    d_t1 = tl.zeros((T,), tl.float32)
    d_t2 = tl.zeros((H,), tl.float32)
    if CENTRE:
        d_wq = tl.zeros((R, H), tl.float32)
        d_sq = tl.zeros((R,), tl.float32)
        d_tq = tl.zeros((R,), tl.float32)
    if POSITION != NO_POSITION:
        sx = tl.load(scale1 + LAST)
        sy = tl.load(scale1 + LAST + 1)
        wx = _read_vector(weight1 + LAST * HIDDEN, HIDDEN, H)
        wy = _read_vector(weight1 + (LAST + 1) * HIDDEN, HIDDEN, H)
        d_wx = tl.zeros((H,), tl.float32)
        d_wy = tl.zeros((H,), tl.float32)
        d_p1 = tl.zeros((M, 4), tl.float32)  # of scale x, scale y, shift x, shift y, for every pixel of the block
        which = tl.arange(0, 4)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(pixels, M), tl.num_programs(0)):
        pixel, live, row, column = _pixel_block(block, pixels, height, width, M)
        image = pixel // (height * width) * (height * width)
        spot = pixel - image
        q = _read(query, pixel, QUERY_ROW, REL, R)
        common = tl.zeros((M, H), tl.float32) + base[None, :]
        common, e_q = _add_centre(common, q, scale1, shift1, weight1, REL, HIDDEN, R, H, CENTRE, KIND, PRECISION)
        if value is not None:
            log_sum = _read(lse, pixel, CHANNELS, CHANNELS, C)
            dot = tl.where(live[:, None], _read(slope, pixel, CHANNELS, CHANNELS, C), 0.)
        d_q = tl.zeros((M, R), tl.float32)
        sum_a = tl.zeros((M, T), tl.float32)
        sum_ax = tl.zeros((M, T), tl.float32)
        sum_u = tl.zeros((M, H), tl.float32)
        if POSITION != NO_POSITION:
            sum_x = tl.zeros((M, H), tl.float32)
            sum_y = tl.zeros((M, H), tl.float32)
            d_px = tl.zeros((M,), tl.float32)
            d_py = tl.zeros((M,), tl.float32)
        for tap in range(K * K):
            there = _neighbour(tap, row, column, height, width, K, DILATION)
            k = _read(key, image + there, KEY_ROW, REL, R)
            x = _relate(q, k, FORM, RELATION)
            e = _relu(x * s1[None, :] + t1[None, :])
            u = common + _product(e, w1, KIND, PRECISION)
            u = _add_positions(u, place, spot, there, scale1 + LAST, shift1 + LAST, weight1 + LAST * HIDDEN, HIDDEN, H,
                               POSITION)
            if value is not None:
                h = _relu(u)
                w = tl.exp(_product(h, w2, KIND, PRECISION) + b2[None, :] - log_sum)
                d_w = _weights_backward(gradient, value, d_value, w, pixel, image + there, live, CHANNELS, SHARES,
                                        VALUE_ROW, B, C, M)
                d_logits = w * (d_w - dot)
                d_w2 += _product(tl.trans(h), d_logits, KIND, PRECISION)
                d_u = tl.where(h <= 0, 0., _product(d_logits, tl.trans(w2), KIND, PRECISION))
            else:
                d_u = tl.where(live[:, None], slope0[None, :] + slope1[None, :] * u, 0.)
            sum_u += d_u
            d_w1 += _product(tl.trans(e), d_u, KIND, PRECISION)
            d_a = tl.where(e <= 0, 0., _product(d_u, tl.trans(w1), KIND, PRECISION))
            sum_a += d_a
            sum_ax += d_a * x
            d_q, d_k = _relate_backward(d_a * s1[None, :], q, k, d_q, FORM, RELATION)
            _scatter(d_key, d_k, image + there, live, REL, R)
            if POSITION != NO_POSITION:
                px = _offset(place, spot, there, 0, POSITION)
                py = _offset(place, spot, there, 1, POSITION)
                e_x = _relu(px * sx + tl.load(shift1 + LAST))
                e_y = _relu(py * sy + tl.load(shift1 + LAST + 1))
                sum_x += e_x[:, None] * d_u
                sum_y += e_y[:, None] * d_u
                d_x = tl.where(e_x <= 0, 0., tl.sum(d_u * wx[None, :], 1))
                d_y = tl.where(e_y <= 0, 0., tl.sum(d_u * wy[None, :], 1))
                d_p1 += tl.where(which == 0, (d_x * px)[:, None], tl.where(which == 1, (d_y * py)[:, None], tl.where(
                    which == 2, d_x[:, None], d_y[:, None])))
                d_x *= sx
                d_y *= sy
                if POSITION == RELATIVE:
                    d_px += d_x
                    d_py += d_y
                    d_x = -d_x
                    d_y = -d_y
                at = d_place + 2 * (image + there).to(tl.int64)
                tl.atomic_add(at, d_x, mask=live, sem='relaxed')
                tl.atomic_add(at + 1, d_y, mask=live, sem='relaxed')
        d_t2 += tl.sum(sum_u, 0)
        d_s1 += tl.sum(sum_ax, 0)
        d_t1 += tl.sum(sum_a, 0)
        if CENTRE:
            w_q = _read_matrix(weight1, HIDDEN, REL, HIDDEN, R, H)
            d_wq += _product(tl.trans(e_q), sum_u, KIND, PRECISION)
            d_a = tl.where(e_q <= 0, 0., _product(sum_u, tl.trans(w_q), KIND, PRECISION))
            d_sq += tl.sum(d_a * q, 0)
            d_tq += tl.sum(d_a, 0)
            d_q += d_a * _read_vector(scale1, REL, R)[None, :]
        tl.store(_channel_pointers(d_query, pixel, REL, R), d_q,
                 mask=live[:, None] & (tl.arange(0, R)[None, :] < REL))
        if POSITION != NO_POSITION:
            d_wx += tl.sum(sum_x, 0)
            d_wy += tl.sum(sum_y, 0)
            if POSITION == RELATIVE:
                at = d_place + 2 * pixel.to(tl.int64)
                tl.atomic_add(at, d_px, mask=live, sem='relaxed')
                tl.atomic_add(at + 1, d_py, mask=live, sem='relaxed')
    out = parameters + tl.program_id(0).to(tl.int64) * TOTAL
    taps, middle = tl.arange(0, T), tl.arange(0, H)
    tl.store(out + CENTRE + taps, d_s1, mask=taps < TAP)
    tl.store(out + INPUTS + CENTRE + taps, d_t1, mask=taps < TAP)
    at, mask = _matrix(out + 2 * INPUTS + CENTRE * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
    tl.store(at, d_w1, mask=mask)
    tl.store(out + (2 + HIDDEN) * INPUTS + middle, d_t2, mask=middle < HIDDEN)
    if value is not None:
        at, mask = _matrix(out + (2 + HIDDEN) * INPUTS + HIDDEN, CHANNELS, HIDDEN, CHANNELS, H, C)
        tl.store(at, d_w2, mask=mask)
    if CENTRE:
        centre = tl.arange(0, R)
        tl.store(out + centre, d_sq, mask=centre < REL)
        tl.store(out + INPUTS + centre, d_tq, mask=centre < REL)
        at, mask = _matrix(out + 2 * INPUTS, HIDDEN, REL, HIDDEN, R, H)
        tl.store(at, d_wq, mask=mask)
    if POSITION != NO_POSITION:
        both = tl.arange(0, 4)
        tl.store(out + both // 2 * INPUTS + LAST + both % 2, tl.sum(d_p1, 0))
        at = out + 2 * INPUTS + LAST * HIDDEN + middle
        tl.store(at, d_wx, mask=middle < HIDDEN)
        tl.store(at + HIDDEN, d_wy, mask=middle < HIDDEN)


@triton.jit
def _patch_hidden(
        query, key, scale1, shift1, weight1, shift2, pixel, image, row, column, height, width, K: tl.constexpr,
        DILATION: tl.constexpr, REL: tl.constexpr, HIDDEN: tl.constexpr, QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr,
        FORM: tl.constexpr, RELATION: tl.constexpr, CENTRE: tl.constexpr, TAP: tl.constexpr, PRECISION: tl.constexpr,
        R: tl.constexpr, T: tl.constexpr, H: tl.constexpr, M: tl.constexpr):
    """The hidden vector u of a patch (with shift2 where it is given): (M, H)."""
    KIND: tl.constexpr = key.dtype.element_ty
    q = _read(query, pixel, QUERY_ROW, REL, R)
    u = tl.zeros((M, H), tl.float32)
    if shift2 is not None:
        u += _read_vector(shift2, HIDDEN, H)[None, :]
    u, _ = _add_centre(u, q, scale1, shift1, weight1, REL, HIDDEN, R, H, CENTRE, KIND, PRECISION)
    for tap in range(K * K):
        first = CENTRE + tap * TAP
        there = _neighbour(tap, row, column, height, width, K, DILATION)
        x = _relate(q, _read(key, image + there, KEY_ROW, REL, R), FORM, RELATION)
        e = _relu(x * _read_vector(scale1 + first, TAP, T)[None, :] + _read_vector(shift1 + first, TAP, T)[None, :])
        u += _product(e, _read_matrix(weight1 + first * HIDDEN, HIDDEN, TAP, HIDDEN, T, H), KIND, PRECISION)
    return u


@triton.jit(do_not_specialize=IMAGE_SIZES)
def attend_patchwise(
        query, key, value, scale1, shift1, weight1, shift2, weight2, bias2, shift, output, pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, REL: tl.constexpr,
        CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, SHARES: tl.constexpr,
        QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, PRECISION: tl.constexpr,
        R: tl.constexpr, T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, S: tl.constexpr, M: tl.constexpr):
    """The output; relu(output + shift) where shift is given."""
    KIND: tl.constexpr = key.dtype.element_ty
    AREA: tl.constexpr = K * K
    pixel, live, row, column = _pixel_block(tl.program_id(0), pixels, height, width, M)
    image = pixel // (height * width) * (height * width)
    h = _relu(_patch_hidden(query, key, scale1, shift1, weight1, shift2, pixel, image, row, column, height, width, K,
                            DILATION, REL, HIDDEN, QUERY_ROW, KEY_ROW, FORM, RELATION, CENTRE, TAP, PRECISION, R, T, H,
                            M))
    y = tl.zeros((M, S, C), tl.float32)
    for tap in range(AREA):
        there = _neighbour(tap, row, column, height, width, K, DILATION)
        w2 = _read_matrix(weight2 + tap * CHANNELS, AREA * CHANNELS, HIDDEN, CHANNELS, H, C)
        w = _product(h, w2, KIND, PRECISION) + _read_vector(bias2 + tap * CHANNELS, CHANNELS, C)[None, :]
        y += w[:, None, :] * _read_shares(value, image + there, VALUE_ROW, CHANNELS, SHARES, S, C)
    if shift is not None:
        channel = tl.arange(0, S)[:, None] * CHANNELS + tl.arange(0, C)[None, :]
        used = _share_mask(tl.full((1,), 1, tl.int1), CHANNELS, SHARES, S, C)
        y = _relu(y + tl.load(shift + channel[None, :, :], mask=used, other=0.))
    tl.store(_share_pointers(output, pixel, CHANNELS * SHARES, CHANNELS, S, C), y,
             mask=_share_mask(live, CHANNELS, SHARES, S, C))


@triton.jit(do_not_specialize=IMAGE_SIZES)
def patchwise_sums(
        query, key, scale1, shift1, weight1, sums, pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, REL: tl.constexpr,
        CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr,
        PRECISION: tl.constexpr, R: tl.constexpr, T: tl.constexpr, H: tl.constexpr, M: tl.constexpr):
    """As `pairwise_sums`."""
    total = tl.zeros((H,), tl.float64)
    squares = tl.zeros((H,), tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(pixels, M), tl.num_programs(0)):
        pixel, live, row, column = _pixel_block(block, pixels, height, width, M)
        image = pixel // (height * width) * (height * width)
        u = _patch_hidden(query, key, scale1, shift1, weight1, None, pixel, image, row, column, height, width, K,
                          DILATION, REL, HIDDEN, QUERY_ROW, KEY_ROW, FORM, RELATION, CENTRE, TAP, PRECISION, R, T, H, M)
        total, squares = _add_sums(total, squares, u, live, M)
    at = sums + tl.program_id(0) * 2 * HIDDEN + tl.arange(0, H)
    tl.store(at, total, mask=tl.arange(0, H) < HIDDEN)
    tl.store(at + HIDDEN, squares, mask=tl.arange(0, H) < HIDDEN)


@triton.jit(do_not_specialize=IMAGE_SIZES)
def patchwise_hidden_backward(
        query, key, value, scale1, shift1, weight1, shift2, weight2, gradient, slopes, hidden, d_hidden, pixels,
        height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, REL: tl.constexpr,
        CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, SHARES: tl.constexpr,
        QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, PRECISION: tl.constexpr,
        R: tl.constexpr, T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """h and the gradient of u of every pixel; with `slopes` only the latter, as in `attend_pairwise_backward`."""
    KIND: tl.constexpr = key.dtype.element_ty
    AREA: tl.constexpr = K * K
    pixel, live, row, column = _pixel_block(tl.program_id(0), pixels, height, width, M)
    image = pixel // (height * width) * (height * width)
    u = _patch_hidden(query, key, scale1, shift1, weight1, shift2, pixel, image, row, column, height, width, K,
                      DILATION, REL, HIDDEN, QUERY_ROW, KEY_ROW, FORM, RELATION, CENTRE, TAP, PRECISION, R, T, H, M)
    mask = live[:, None] & (tl.arange(0, H)[None, :] < HIDDEN)
    if value is not None:
        d_h = tl.zeros((M, H), tl.float32)
        for tap in range(AREA):
            there = _neighbour(tap, row, column, height, width, K, DILATION)
            w2 = _read_matrix(weight2 + tap * CHANNELS, AREA * CHANNELS, HIDDEN, CHANNELS, H, C)
            d_w = _weights_backward(gradient, value, None, None, pixel, image + there, live, CHANNELS, SHARES,
                                    VALUE_ROW, B, C, M)
            d_h += _product(d_w, tl.trans(w2), KIND, PRECISION)
        h = _relu(u)
        d_u = tl.where(h <= 0, 0., d_h)
        tl.store(_channel_pointers(hidden, pixel, HIDDEN, H), h, mask=mask)
    else:
        d_u = _read_vector(slopes, HIDDEN, H)[None, :] + _read_vector(slopes + HIDDEN, HIDDEN, H)[None, :] * u
    tl.store(_channel_pointers(d_hidden, pixel, HIDDEN, H), d_u, mask=mask)


@triton.jit(do_not_specialize=IMAGE_SIZES)
def attend_patchwise_backward(
        query, key, value, scale1, shift1, weight1, weight2, bias2, gradient, hidden, d_hidden, d_query, d_key, d_value,
        parameters, pixels, height, width,
        FORM: tl.constexpr, RELATION: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, REL: tl.constexpr,
        CENTRE: tl.constexpr, TAP: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, SHARES: tl.constexpr,
        QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, INPUTS: tl.constexpr,
        TOTAL: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
        C: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """Gradients of the maps, and of gamma in parameters[slot]: scale1, shift1, weight1, weight2, bias2.

    A program has one tap (its number on the first axis; where there are CENTRE channels, the last is phi(x_i)) and
    every n-th block, from `slot`, its number on the second axis. Gradients of maps are added atomically. `value` None:
    those of `patchwise_sums`.
    """
    KIND: tl.constexpr = key.dtype.element_ty
    AREA: tl.constexpr = K * K
    tap = tl.program_id(0)
    slot = tl.program_id(1)
    is_centre = tap == AREA
    first = tl.where(is_centre, 0, CENTRE + tap * TAP)
    s1 = _read_vector(scale1 + first, TAP, T)
    t1 = _read_vector(shift1 + first, TAP, T)
    w1 = _read_matrix(weight1 + first * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
    d_w1 = tl.zeros((T, H), tl.float32)
    d_s1 = tl.zeros((T,), tl.float32)
    d_t1 = tl.zeros((T,), tl.float32)
    tap = tl.where(is_centre, 0, tap)
    if value is not None:
        w2 = _read_matrix(weight2 + tap * CHANNELS, AREA * CHANNELS, HIDDEN, CHANNELS, H, C)
        b2 = _read_vector(bias2 + tap * CHANNELS, CHANNELS, C)
        d_w2 = tl.zeros((H, C), tl.float32)
        d_b2 = tl.zeros((C,), tl.float32)
    for block in range(slot, tl.cdiv(pixels, M), tl.num_programs(1)):
        pixel, live, row, column = _pixel_block(block, pixels, height, width, M)
        image = pixel // (height * width) * (height * width)
        there = image + _neighbour(tap, row, column, height, width, K, DILATION)
        d_u = tl.where(live[:, None], _read(d_hidden, pixel, HIDDEN, HIDDEN, H), 0.)
        q = _read(query, pixel, QUERY_ROW, REL, R)
        if is_centre:
            k = q
        else:
            k = _read(key, there, KEY_ROW, REL, R)
        x = _relate(q, k, FORM, RELATION)
        e = _relu(x * s1[None, :] + t1[None, :])
        d_w1 += _product(tl.trans(e), d_u, KIND, PRECISION)
        d_a = tl.where(e <= 0, 0., _product(d_u, tl.trans(w1), KIND, PRECISION))
        d_s1 += tl.sum(d_a * x, 0)
        d_t1 += tl.sum(d_a, 0)
        d_q, d_k = _relate_backward(d_a * s1[None, :], q, k, tl.zeros((M, R), tl.float32), FORM, RELATION)
        if not CENTRE:
            _scatter(d_query, d_q, pixel, live, REL, R)
        if is_centre:
            _scatter(d_query, d_k, pixel, live, REL, R)
        else:
            _scatter(d_key, d_k, there, live, REL, R)
        if value is not None:
            if not is_centre:
                h = _read(hidden, pixel, HIDDEN, HIDDEN, H)
                w = _product(h, w2, KIND, PRECISION) + b2[None, :]
                d_w = _weights_backward(gradient, value, d_value, w, pixel, there, live, CHANNELS, SHARES, VALUE_ROW, B,
                                        C, M)
                d_w2 += _product(tl.trans(h), d_w, KIND, PRECISION)
                d_b2 += tl.sum(d_w, 0)
    out = parameters + slot.to(tl.int64) * TOTAL
    taps = tl.arange(0, T)
    tl.store(out + first + taps, d_s1, mask=taps < TAP)
    tl.store(out + INPUTS + first + taps, d_t1, mask=taps < TAP)
    at, mask = _matrix(out + 2 * INPUTS + first * HIDDEN, HIDDEN, TAP, HIDDEN, T, H)
    tl.store(at, d_w1, mask=mask)
    if value is not None:
        if not is_centre:
            out += (2 + HIDDEN) * INPUTS + tap * CHANNELS
            at_w2, mask_w2 = _matrix(out, AREA * CHANNELS, HIDDEN, CHANNELS, H, C)
            tl.store(at_w2, d_w2, mask=mask_w2)
            channel = tl.arange(0, C)
            tl.store(out + HIDDEN * AREA * CHANNELS + channel, d_b2, mask=channel < CHANNELS)
