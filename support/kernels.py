"""The chunked form of linear attention on a GPU, in Triton: the same numbers as `chunked` of model.py, faster. And the
recurrent form for one token, for decoding.

Plain PyTorch writes every intermediate of a chunk to memory: scores, decays, and all of it again for the gradients.
Here they live and die in registers. What is still written is one state per chunk, in the dtype of the matrix products
(bf16 inputs: bf16, to which a product would round it anyway). Sums over time stay in fp32.

The letters are those of model.py, with the matrices of a chunk, a row per token, as capitals: Q, K, V and U. (In code,
K, V and C are sizes.) For a chunk of C tokens that starts from the state S_0:

    P   = Q K^T * decay                                 decay_ij = exp(G_i - G_j) for i >= j, else 0
    Y   = since_start Q S_0 + P U                       S_1  = kept S_0 + (until_end K)^T U
    U   = V                                             plain
    U   = X b (V - since_start K S_0)                   delta rule, with X = (I + A)^{-1}, A = tril(b K K^T * decay, -1)

    forward    delta_solve     X of every chunk                        (delta rule)
               scan            S_0 of every chunk, first to last       (delta rule: delta_scan)
               outputs         Y of every chunk
    backward   sum_back        dz, of every sum of weights             (normaliser)
               scan_back       dS_1 of every chunk, last to first      (delta rule: delta_scan_back)
               gradients       all others, of every chunk
    decoding   step            S_1 and Y of a single token, in place of all of these

The scans run in parallel over batch, heads and blocks of S; the others over chunks too. P is computed again in
backward: a product costs less than its bytes. The normaliser divides Y by the sum of weights, since_start Q Z_0 + P 1,
where Z is the state of the denominator, a vector beside S. Its Q and K may be others than those of Y, as rope turns the
numerator alone: NORM is "none", "own" (the same Q and K) or "other" (q_den and k_den).
"""
import types

import torch
import torch.nn.functional as F
from torch import library

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                                 # then available() is False
    triton = None
    tl = types.SimpleNamespace(constexpr=None)
    jit = lambda kernel: kernel


# ----------------------------------------------------------------------------------------------------------------------
# What the kernels share. A tensor (B,H,T,.) or (B,H,T) comes as a tuple of its pointer and its strides over B, H and T,
# so that transposed views need no copy; head() turns it into the same of one head, a pointer and a stride over T.
# Capitals are model.py's sizes, and flags, known when a kernel is compiled. BK and BV are widths of blocks of K and V.
# Trap: loops over such blocks are unrolled (static_range). As loops of three passes or more, products of bf16 summed to
# a y that was wrong by 18 % on an H100 (Triton 3.6, cause unknown; interpreted and in fp32 they are right).


@jit
def program(blocks, N):
    """Which block, chunk, and pair of batch and head this program computes. Blocks of one chunk run side by side."""
    i = tl.program_id(0)
    return i % blocks, i // blocks % N, (i // blocks // N).to(tl.int64)


@jit
def head(x, bh, H):
    return x[0] + (bh // H) * x[1] + (bh % H) * x[2], x[3]


@jit
def load(x, row, rows, col, cols, height, width):
    """The (height,width) tile of a head that starts at (row, col), with zeros from rows and from cols on."""
    i = tl.arange(0, height)[:, None]
    j = tl.arange(0, width)[None, :]
    start = x[0] + tl.cast(row, tl.int64) * x[1] + col
    return tl.load(start + (i * x[1] + j), mask=(row + i < rows) & (col + j < cols), other=0)


@jit
def store(x, tile, row, rows, col, cols, height, width):
    i = tl.arange(0, height)[:, None]
    j = tl.arange(0, width)[None, :]
    start = x[0] + tl.cast(row, tl.int64) * x[1] + col
    tl.store(start + (i * x[1] + j), tile, mask=(row + i < rows) & (col + j < cols))


@jit
def load_row(x, start, stop, width):
    """`width` elements of a head (T,) from start on, with zeros from stop on."""
    i = start + tl.arange(0, width)
    return tl.load(x[0] + i * x[1], mask=i < stop, other=0).to(tl.float32)


@jit
def store_row(x, row, start, stop, width):
    i = start + tl.arange(0, width)
    tl.store(x[0] + i * x[1], row, mask=i < stop)


@jit
def row_of(x, i):
    """Row i of a head (rows,T), as a head (T,)."""
    return x[0] + i * x[1], 1


@jit
def dot(a, b, PREC):
    """a @ b, summed in fp32; PREC is what its operands are rounded to."""
    if PREC == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PREC)


@jit
def decays(g, t, T, C, DECAY):
    """G, since_start, until_end and kept = exp(G_C) of the chunk at t. G is the sum of two vectors, so that differences
    keep their digits.

    exp(-128) is 0 in fp32, so smaller g count as -128: they are resets. Multiples of 1/1024 down to -128 C then add up
    without rounding, and what is left of each g is below 1/1024.
    """
    if DECAY:
        g_t = load_row(g, t, T, C)
        g_t = tl.where(g_t < -128, -128.0, g_t)
        coarse = tl.floor(g_t * 1024 + 0.5) / 1024
        fine = g_t - coarse
        G = (tl.cumsum(coarse, 0), tl.cumsum(fine, 0))
        G_C = (tl.sum(coarse, 0), tl.sum(fine, 0))
        until_end = tl.exp((G_C[0] - G[0]) + (G_C[1] - G[1]))
        return G, tl.exp(G[0] + G[1]), until_end, tl.exp(G_C[0] + G_C[1])
    else:
        one = tl.full((C,), 1.0, tl.float32)
        return (one, one), one, one, 1.0


@jit
def decay_matrix(G, C, DECAY):
    """decay (C,C). Masked before exp, which overflows above the diagonal; exp(G_i) exp(-G_j) would overflow as well."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if DECAY:
        between = (G[0][:, None] - G[0][None, :]) + (G[1][:, None] - G[1][None, :])
        return tl.exp(tl.where(i >= j, between, float("-inf")))
    else:
        return tl.where(i >= j, 1.0, 0.0)


@jit
def scores(q, k, t, T, K, C, BK, PREC):
    """Q K^T of the chunk at t."""
    QK = tl.zeros((C, C), tl.float32)
    for col in tl.static_range(0, K, BK):
        queries = load(q, t, T, col, K, C, BK)
        keys = load(k, t, T, col, K, C, BK)
        QK += dot(queries, tl.trans(keys), PREC)
    return QK


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@jit
def scan(
    k, v, k_den, g, state,
    starts, sum_starts, final,                                      # what it writes stands on a line of its own
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):
    """S_1 = kept S_0 + (until_end K)^T V, chunk after chunk, for one block of S; writes every S_0.

    The last programs of a head do the same for Z.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    states: tl.constexpr = key_blocks * ((V + BV - 1) // BV)
    sums: tl.constexpr = key_blocks if NORM != "none" else 0
    block, n, bh = program(states + sums, 1)
    row = block % key_blocks * BK
    col = block // key_blocks * BV
    k = head(k, bh, H)
    v = head(v, bh, H)
    k_den = head(k_den, bh, H)
    g = head(g, bh, H)
    state = head(state, bh, H)
    starts = head(starts, bh, H)
    sum_starts = head(sum_starts, bh, H)
    final = head(final, bh, H)
    if block < states:
        scan_states(k, v, g, state, starts, final, row, col, T, K, V, C, BK, BV, DECAY, PREC)
    if NORM != "none":
        if block >= states:
            scan_sums(k_den, g, state, sum_starts, final, row, T, K, V, C, BK, DECAY)


@jit
def scan_states(k, v, g, state, starts, final, row, col, T, K, V, C, BK, BV, DECAY, PREC):
    S = load(state, row, K, col, V, BK, BV)
    for n in range(tl.cdiv(T, C)):
        t = n * C
        store(starts, S, n * K + row, n * K + K, col, V, BK, BV)
        keys = load(k, t, T, row, K, C, BK)
        values = load(v, t, T, col, V, C, BV)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        S = kept * S + dot(tl.trans(keys), values * until_end[:, None], PREC)
    store(final, S, row, K, col, V, BK, BV)


@jit
def scan_sums(k, g, state, sum_starts, final, row, T, K, V, C, BK, DECAY):
    Z = tl.sum(load(state, row, K, V, V + 1, BK, 1), 1)
    for n in tl.range(tl.cdiv(T, C), num_stages=3):         # loads ahead, also without a product
        t = n * C
        store_row(sum_starts, Z, n * K + row, n * K + K, BK)
        keys = load(k, t, T, row, K, C, BK)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        Z = kept * Z + tl.sum(keys * until_end[:, None], 0)
    store(final, Z[:, None], row, K, V, V + 1, BK, 1)


@jit
def delta_solve(
    k, g, b,
    x,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, LOG_C: tl.constexpr,
    DECAY: tl.constexpr, PREC: tl.constexpr,
):
    """X = (I + A)^{-1} with A = tril(b K K^T * decay, -1), for one chunk.

    Two neighbouring diagonal blocks of n tokens, with inverses X_1 and X_2, make one of 2n, with a part M of A below
    the first. Its inverse is [[X_1, 0], [-X_2 M X_1, X_2]]. On the whole matrix, where M holds such a part for every
    pair, that is X - X M X. LOG_C doublings, from X = I.
    """
    block, n, bh = program(1, tl.cdiv(T, C))
    t = n * C
    k = head(k, bh, H)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    G, since_start, until_end, kept = decays(head(g, bh, H), t, T, C, DECAY)
    beta = load_row(head(b, bh, H), t, T, C)
    A = beta[:, None] * scores(k, k, t, T, K, C, BK, PREC) * decay_matrix(G, C, DECAY)
    A = tl.where(i > j, A, 0.0)

    inner: tl.constexpr = "tf32" if PREC == "bf16" else PREC
    X = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, A, 0.0)
    for level in tl.static_range(1, LOG_C):
        together = i >> (level + 1) == j >> (level + 1)
        M = tl.where(together & (i >> level > j >> level), A, 0.0)
        X -= dot(X, dot(M, X, inner), inner)
    store(head(x, bh, H), X, t, t + C, 0, C, C, C)


@jit
def delta_scan(
    k, v, x, g, b, state,
    u, starts, final,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PREC: tl.constexpr,
):
    """scan with U = X b (V - since_start K S_0), which it writes, for BV columns of S. Here BK covers all of K."""
    block, n, bh = program((V + BV - 1) // BV, 1)
    col = block * BV
    k = head(k, bh, H)
    v = head(v, bh, H)
    x = head(x, bh, H)
    g = head(g, bh, H)
    b = head(b, bh, H)
    u = head(u, bh, H)
    starts = head(starts, bh, H)
    S = load(head(state, bh, H), 0, K, col, V, BK, BV)
    for n in range(tl.cdiv(T, C)):
        t = n * C
        store(starts, S, n * K, n * K + K, col, V, BK, BV)
        keys = load(k, t, T, 0, K, C, BK)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        beta = load_row(b, t, T, C)
        error = load(v, t, T, col, V, C, BV) - since_start[:, None] * dot(keys, S, PREC)
        U = dot(load(x, t, t + C, 0, C, C, C), beta[:, None] * error, PREC)
        store(u, U, t, T, col, V, C, BV)
        S = kept * S + dot(tl.trans(keys), U * until_end[:, None], PREC)
    store(head(final, bh, H), S, 0, K, col, V, BK, BV)


@jit
def outputs(
    q, k, u, q_den, k_den, g, starts, sum_starts,
    y, scale,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):
    """Y = since_start Q S_0 + P U for BV columns of one chunk, times scale = 1 / sum of weights, which it writes."""
    block, n, bh = program((V + BV - 1) // BV, tl.cdiv(T, C))
    col = block * BV
    t = n * C
    q = head(q, bh, H)
    k = head(k, bh, H)
    starts = head(starts, bh, H)
    G, since_start, until_end, kept = decays(head(g, bh, H), t, T, C, DECAY)
    decay = decay_matrix(G, C, DECAY)
    P = scores(q, k, t, T, K, C, BK, PREC) * decay
    read = tl.zeros((C, BV), tl.float32)
    for row in tl.static_range(0, K, BK):
        queries = load(q, t, T, row, K, C, BK)
        S = load(starts, n * K + row, n * K + K, col, V, BK, BV)
        read += dot(queries, S, PREC)
    U = load(head(u, bh, H), t, T, col, V, C, BV)
    Y = since_start[:, None] * read + dot(P, U, PREC)

    if NORM != "none":
        if NORM == "other":
            q = head(q_den, bh, H)
            k = head(k_den, bh, H)
            P = scores(q, k, t, T, K, C, BK, PREC) * decay
        sum_starts = head(sum_starts, bh, H)
        weights = tl.sum(P, 1)
        for row in tl.static_range(0, K, BK):
            queries = load(q, t, T, row, K, C, BK)
            Z = load_row(sum_starts, n * K + row, n * K + K, BK)
            weights += since_start * tl.sum(queries * Z[None, :], 1)
        scale_t = 1 / (weights + 1e-6)
        Y *= scale_t[:, None]
        if col == 0:
            store_row(head(scale, bh, H), scale_t, t, T, C)
    store(head(y, bh, H), Y, t, T, col, V, C, BV)


@jit
def step(
    q, k, v, q_den, k_den, g, b,
    state, y,                                                       # state is read, and written in place
    H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, NORM: tl.constexpr,
):
    """One token of one head: S_1 = kept S_0 + K^T U and Y = Q S_1, where Q, K and U are rows. BK and BV cover S.

    It reads and writes S once, which takes longer than all else.
    """
    bh = tl.program_id(0).to(tl.int64)
    queries = load_row(row_of(head(q, bh, H), 0), 0, K, BK)
    keys = load_row(row_of(head(k, bh, H), 0), 0, K, BK)
    U = load_row(row_of(head(v, bh, H), 0), 0, V, BV)
    state = head(state, bh, H)
    kept = 1.0
    if DECAY:
        kept = tl.exp(tl.load(head(g, bh, H)[0]))
    S = kept * load(state, 0, K, 0, V, BK, BV)
    if DELTA:
        U = tl.load(head(b, bh, H)[0]) * (U - tl.sum(keys[:, None] * S, 0))
    S += keys[:, None] * U[None, :]
    store(state, S, 0, K, 0, V, BK, BV)
    Y = tl.sum(queries[:, None] * S, 0)
    if NORM != "none":
        if NORM == "other":
            queries = load_row(row_of(head(q_den, bh, H), 0), 0, K, BK)
            keys = load_row(row_of(head(k_den, bh, H), 0), 0, K, BK)
        sums = state[0] + V, state[1]                               # the last column of the state
        Z = kept * load_row(sums, 0, K, BK) + keys
        Y /= tl.sum(queries * Z, 0) + 1e-6
        tl.debug_barrier()                                          # every warp has loaded all of Z
        store_row(sums, Z, 0, K, BK)
    store_row(row_of(head(y, bh, H), 0), Y, 0, V, BV)


# ----------------------------------------------------------------------------------------------------------------------
# Backward. d in front of a name: the gradient with respect to it. dS stands for dS_1, dz for that of a sum of weights.


@jit
def sum_back(
    y, dy, scale,
    dz,
    H, T,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
):
    """dz = -Y . dY / z, for C tokens."""
    block, n, bh = program(1, tl.cdiv(T, C))
    t = n * C
    Y = load(head(y, bh, H), t, T, 0, V, C, BV).to(tl.float32)
    dY = load(head(dy, bh, H), t, T, 0, V, C, BV)
    scale_t = load_row(head(scale, bh, H), t, T, C)
    store_row(head(dz, bh, H), -tl.sum(Y * dY, 1) * scale_t, t, T, C)


@jit
def scan_back(
    q, q_den, g, scale, dz, dy, dfinal,
    ends, sum_ends, dstate,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):
    """dS_0 = kept dS_1 + (since_start Q)^T dY, last chunk first, for one block of S; writes every dS_1.

    The last programs of a head do the same for Z.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    states: tl.constexpr = key_blocks * ((V + BV - 1) // BV)
    sums: tl.constexpr = key_blocks if NORM != "none" else 0
    block, n, bh = program(states + sums, 1)
    row = block % key_blocks * BK
    col = block // key_blocks * BV
    q = head(q, bh, H)
    q_den = head(q_den, bh, H)
    g = head(g, bh, H)
    scale = head(scale, bh, H)
    dz = head(dz, bh, H)
    dy = head(dy, bh, H)
    dfinal = head(dfinal, bh, H)
    ends = head(ends, bh, H)
    sum_ends = head(sum_ends, bh, H)
    dstate = head(dstate, bh, H)
    if block < states:
        scan_states_back(q, g, scale, dy, dfinal, ends, dstate, row, col, T, K, V, C, BK, BV, DECAY, NORM, PREC)
    if NORM != "none":
        if block >= states:
            scan_sums_back(q_den, g, dz, dfinal, sum_ends, dstate, row, T, K, V, C, BK, DECAY)


@jit
def scan_states_back(q, g, scale, dy, dfinal, ends, dstate, row, col, T, K, V, C, BK, BV, DECAY, NORM, PREC):
    dS = load(dfinal, row, K, col, V, BK, BV)
    N = tl.cdiv(T, C)
    for step in range(N):
        n = N - 1 - step
        t = n * C
        store(ends, dS, n * K + row, n * K + K, col, V, BK, BV)
        queries = load(q, t, T, row, K, C, BK)
        dY = load(dy, t, T, col, V, C, BV)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        if NORM != "none":
            since_start *= load_row(scale, t, T, C)
        dS = kept * dS + dot(tl.trans(queries), dY * since_start[:, None], PREC)
    store(dstate, dS, row, K, col, V, BK, BV)


@jit
def scan_sums_back(q, g, dz, dfinal, sum_ends, dstate, row, T, K, V, C, BK, DECAY):
    dZ = tl.sum(load(dfinal, row, K, V, V + 1, BK, 1), 1)
    N = tl.cdiv(T, C)
    for step in tl.range(N, num_stages=3):
        n = N - 1 - step
        t = n * C
        store_row(sum_ends, dZ, n * K + row, n * K + K, BK)
        dz_t = load_row(dz, t, T, C)
        queries = load(q, t, T, row, K, C, BK)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        dZ = kept * dZ + tl.sum(queries * (since_start * dz_t)[:, None], 0)
    store(dstate, dZ[:, None], row, K, V, V + 1, BK, 1)


@jit
def delta_scan_back(
    q, k, x, g, b, dy, dfinal,
    ends, derror, dstate,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PREC: tl.constexpr,
):
    """dS_0 = kept dS_1 + (since_start Q)^T dY - (since_start K)^T b dE, for BV columns of S; writes every dS_1 and dE.

    E = V - since_start K S_0 - tril(K K^T * decay, -1) U is the error that b scales: U = b E. What reaches b E is
    dE = X^T dU, with dU = P^T dY + until_end K dS_1.
    """
    block, n, bh = program((V + BV - 1) // BV, 1)
    col = block * BV
    q = head(q, bh, H)
    k = head(k, bh, H)
    x = head(x, bh, H)
    g = head(g, bh, H)
    b = head(b, bh, H)
    dy = head(dy, bh, H)
    derror = head(derror, bh, H)
    ends = head(ends, bh, H)
    dS = load(head(dfinal, bh, H), 0, K, col, V, BK, BV)
    N = tl.cdiv(T, C)
    for step in range(N):
        n = N - 1 - step
        t = n * C
        store(ends, dS, n * K, n * K + K, col, V, BK, BV)
        queries = load(q, t, T, 0, K, C, BK)
        keys = load(k, t, T, 0, K, C, BK)
        dY = load(dy, t, T, col, V, C, BV)
        G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
        P = dot(queries, tl.trans(keys), PREC) * decay_matrix(G, C, DECAY)
        dU = dot(tl.trans(P), dY, PREC) + until_end[:, None] * dot(keys, dS, PREC)
        X = load(x, t, t + C, 0, C, C, C)
        dE = dot(tl.trans(X), dU, PREC)
        store(derror, dE, t, T, col, V, C, BV)
        beta = load_row(b, t, T, C)
        dS = kept * dS + dot(tl.trans(queries), dY * since_start[:, None], PREC)
        dS -= dot(tl.trans(keys), (beta * since_start)[:, None] * dE, PREC)
    store(head(dstate, bh, H), dS, 0, K, col, V, BK, BV)


@jit
def gradients(
    q, k, v, u, q_den, k_den, g, b, scale, dz, starts, sum_starts, dy, ends, sum_ends, derror,
    dq, dk, dv, dq_den, dk_den, dg, db,
    H, T,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):
    """The gradients of one chunk, given S_0 and dS_1: of a block of Q and K, or of q_den and k_den, or of V.

    dg and db (B,H,programs,T) are sums over the programs of a chunk: each writes a row.
    """
    key_blocks: tl.constexpr = (K + BK - 1) // BK
    sums: tl.constexpr = key_blocks if NORM == "other" else 0
    values: tl.constexpr = (V + BV - 1) // BV
    block, n, bh = program(key_blocks + sums + values, tl.cdiv(T, C))
    q = head(q, bh, H)
    k = head(k, bh, H)
    v = head(v, bh, H)
    u = head(u, bh, H)
    q_den = head(q_den, bh, H)
    k_den = head(k_den, bh, H)
    g = head(g, bh, H)
    b = head(b, bh, H)
    scale = head(scale, bh, H)
    dz = head(dz, bh, H)
    starts = head(starts, bh, H)
    sum_starts = head(sum_starts, bh, H)
    dy = head(dy, bh, H)
    ends = head(ends, bh, H)
    sum_ends = head(sum_ends, bh, H)
    derror = head(derror, bh, H)
    dq = head(dq, bh, H)
    dk = head(dk, bh, H)
    dv = head(dv, bh, H)
    dq_den = head(dq_den, bh, H)
    dk_den = head(dk_den, bh, H)
    dg = row_of(head(dg, bh, H), block)
    db = row_of(head(db, bh, H), block)

    if block < key_blocks:
        key_gradients(q, k, u, g, b, scale, dz, starts, sum_starts, dy, ends, sum_ends, derror, dq, dk, dg, db,
                      n, block * BK, T, K, V, C, BK, BV, DECAY, DELTA, NORM, PREC)
    if NORM == "other":
        if (block >= key_blocks) & (block < key_blocks + sums):
            sum_gradients(q_den, k_den, g, dz, sum_starts, sum_ends, dq_den, dk_den, dg,
                          n, (block - key_blocks) * BK, T, K, C, BK, DECAY, PREC)
    if block >= key_blocks + sums:
        col = (block - key_blocks - sums) * BV
        if DELTA:
            delta_value_gradients(v, b, derror, dv, db, n, col, T, V, C, BV)
        else:
            value_gradients(q, k, g, scale, dy, ends, dv, n, col, T, K, V, C, BK, BV, DECAY, NORM, PREC)


@jit
def value_gradients(q, k, g, scale, dy, ends, dv, n, col, T, K, V, C, BK, BV, DECAY, NORM, PREC):
    """dV = P^T dY + until_end K dS_1"""
    t = n * C
    G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
    P = scores(q, k, t, T, K, C, BK, PREC) * decay_matrix(G, C, DECAY)
    if NORM != "none":
        P *= load_row(scale, t, T, C)[:, None]
    late = tl.zeros((C, BV), tl.float32)
    for row in tl.static_range(0, K, BK):
        keys = load(k, t, T, row, K, C, BK)
        dS = load(ends, n * K + row, n * K + K, col, V, BK, BV)
        late += dot(keys, dS, PREC)
    dY = load(dy, t, T, col, V, C, BV)
    dV = dot(tl.trans(P), dY, PREC) + until_end[:, None] * late
    store(dv, dV, t, T, col, V, C, BV)


@jit
def key_gradients(q, k, u, g, b, scale, dz, starts, sum_starts, dy, ends, sum_ends, derror, dq, dk, dg, db,
                  n, row, T, K, V, C, BK, BV, DECAY, DELTA, NORM, PREC):
    """dQ = since_start dY S_0^T + dP K and dK = until_end U dS_1^T + dP^T Q, with dP = (dY U^T) * decay"""
    t = n * C
    dK_read = tl.zeros((C, BK), tl.float32)
    dG = tl.zeros((C,), tl.float32)
    if DELTA:
        dK_read, dG = delta_key_gradients(k, u, g, b, starts, derror, db, n, row, T, K, V, C, BK, BV, DECAY, PREC)
    dP = tl.zeros((C, C), tl.float32)
    dQ = tl.zeros((C, BK), tl.float32)
    dK = tl.zeros((C, BK), tl.float32)
    dkept = 0.0
    for col in tl.static_range(0, V, BV):
        dY = load(dy, t, T, col, V, C, BV)
        U = load(u, t, T, col, V, C, BV)
        S = load(starts, n * K + row, n * K + K, col, V, BK, BV)
        dS = load(ends, n * K + row, n * K + K, col, V, BK, BV)
        dP += dot(dY, tl.trans(U), PREC)
        dQ += dot(dY, tl.trans(S), PREC)
        dK += dot(U, tl.trans(dS), PREC)
        if DECAY:
            dkept += tl.sum(S.to(tl.float32) * dS)
    if NORM != "none":
        scale_t = load_row(scale, t, T, C)[:, None]
        dP *= scale_t
        dQ *= scale_t
    if NORM == "own":
        dz_t = load_row(dz, t, T, C)[:, None]
        Z = load_row(sum_starts, n * K + row, n * K + K, BK)[None, :]
        dZ = load_row(sum_ends, n * K + row, n * K + K, BK)[None, :]
        dP += dz_t
        dQ += dz_t * Z
        dK += dZ
        dkept += tl.sum(Z * dZ)
    finish(q, k, g, dP, dQ, dK, dkept, dK_read, dG, dq, dk, dg, t, row, T, K, C, BK, DECAY, PREC)


@jit
def sum_gradients(q, k, g, dz, sum_starts, sum_ends, dq, dk, dg, n, row, T, K, C, BK, DECAY, PREC):
    """dQ and dK of the sum of weights: as in key_gradients, with 1 for U, Z for S and dz for dY."""
    t = n * C
    dz_t = load_row(dz, t, T, C)[:, None]
    Z = load_row(sum_starts, n * K + row, n * K + K, BK)[None, :]
    dZ = load_row(sum_ends, n * K + row, n * K + K, BK)[None, :]
    dP = dz_t + tl.zeros((C, C), tl.float32)
    dK = dZ + tl.zeros((C, BK), tl.float32)
    none = tl.zeros((C, BK), tl.float32)
    dG = tl.zeros((C,), tl.float32)
    finish(q, k, g, dP, dz_t * Z, dK, tl.sum(Z * dZ), none, dG, dq, dk, dg, t, row, T, K, C, BK, DECAY, PREC)


@jit
def finish(q, k, g, dP, dQ, dK, dkept, dK_read, dG, dq, dk, dg, t, row, T, K, C, BK, DECAY, PREC):
    """Writes dQ, dK and dg, from dP, dQ and dK as they are without decay and without P.

    What query i reads holds exp(G_i), and what key j writes exp(-G_j): so dG_i = Q_i . dQ_i - K_i . dK_i. And S_1,
    which holds exp(G_C), adds S_1 . dS_1 to the last. g_t is in every G from t on.
    """
    queries = load(q, t, T, row, K, C, BK)
    keys = load(k, t, T, row, K, C, BK)
    G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
    dP *= decay_matrix(G, C, DECAY)
    late = dK * until_end[:, None]
    dQ = dQ * since_start[:, None] + dot(dP, keys, PREC)
    dK = late + dot(tl.trans(dP), queries, PREC)
    store(dq, dQ, t, T, row, K, C, BK)
    store(dk, dK + dK_read, t, T, row, K, C, BK)
    if DECAY:
        dG += tl.sum(queries * dQ - keys * dK, 1)
        dG_C = tl.sum(keys * late) + kept * dkept
        dg_t = tl.cumsum(dG, 0, reverse=True) + dG_C
        reset = load_row(g, t, T, C) < -128
        store_row(dg, tl.where(reset, 0.0, dg_t), t, T, C)


@jit
def delta_key_gradients(k, u, g, b, starts, derror, db, n, row, T, K, V, C, BK, BV, DECAY, PREC):
    """The gradient of K as far as it reads, in E as Q does in Y, with -b dE for dY; and its part of dG.

    Writes db = E . dE, but for V . dE.
    """
    t = n * C
    dP = tl.zeros((C, C), tl.float32)
    dE_K = tl.zeros((C, BK), tl.float32)
    for col in tl.static_range(0, V, BV):
        dE = load(derror, t, T, col, V, C, BV)
        U = load(u, t, T, col, V, C, BV)
        S = load(starts, n * K + row, n * K + K, col, V, BK, BV)
        dP -= dot(dE, tl.trans(U), PREC)
        dE_K -= dot(dE, tl.trans(S), PREC)
    keys = load(k, t, T, row, K, C, BK)
    beta = load_row(b, t, T, C)[:, None]
    G, since_start, until_end, kept = decays(g, t, T, C, DECAY)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    dP = tl.where(i > j, dP * decay_matrix(G, C, DECAY), 0.0)
    dE_K = dE_K * since_start[:, None] + dot(dP, keys, PREC)
    store_row(db, tl.sum(keys * dE_K, 1), t, T, C)
    written = dot(tl.trans(beta * dP), keys, PREC)
    read = beta * dE_K
    return read + written, tl.sum(keys * (read - written), 1)


@jit
def delta_value_gradients(v, b, derror, dv, db, n, col, T, V, C, BV):
    """dV = b dE, and V . dE, the part of db that V has."""
    t = n * C
    dE = load(derror, t, T, col, V, C, BV)
    beta = load_row(b, t, T, C)[:, None]
    store(dv, beta * dE, t, T, col, V, C, BV)
    values = load(v, t, T, col, V, C, BV)
    store_row(db, tl.sum(values * dE, 1), t, T, C)


# ----------------------------------------------------------------------------------------------------------------------
# The launches, as operators that PyTorch knows by name: torch.compile takes them as they are. The functions that
# allocate their results double as their shape rules.


def power(n):
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def blocks(width, block):
    return -(-width // block)


def sizes(q, v, b, chunk_size):
    """The constants of all kernels: chunks of up to 64 tokens; 32 where wide tiles of fp32 need the room.

    Trap: with K = 256 in bf16, the delta rule's gradient of k was wrong by 3 % on an H100, cause unknown (in fp32 it is
    right): above 128 the delta rule multiplies in fp32.
    """
    K = q.shape[-1]
    precision = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}[q.dtype]
    if b is not None and K > 128:
        precision = "tf32x3"
    most = 64 if precision == "bf16" or K <= 64 else 32
    C = max(16, min(power(chunk_size), most))
    return dict(K=K, V=v.shape[-1], C=C, PREC=precision)


def views(*tensors):
    """Tensors (B,H,T,.) or (B,H,T) as the kernels take them: pointer and strides. Rows that are not dense are copied.

    For one that is not there (None, or no elements) a kernel gets the first, and does not touch it.
    """
    return [view(tensors[0] if x is None or x.numel() == 0 else x) for x in tensors]


def view(x):
    if x.dim() == 4 and x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x, *x.stride()[:3]


def empty(x, dtype=None):
    """Like x (B,H,T,.), but laid out (B,T,H,.), as the projections around the operation want it."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def kind(norm, q_den):
    """NORM of the kernels."""
    if not norm:
        return "none"
    return "own" if q_den is None else "other"


def allocate(q, k, v, g, b, q_den, k_den, state, norm, chunk_size):
    """y, the final state, and what backward needs: starts, sum_starts, scale; x and u of the delta rule."""
    B, H, T, K = q.shape
    size = sizes(q, v, b, chunk_size)
    C = size["C"]
    N = blocks(T, C)
    stored = torch.bfloat16 if size["PREC"] == "bf16" else torch.float32
    starts = q.new_empty(B, H, N * K, v.shape[-1], dtype=stored)
    sum_starts, scale, x, u = (q.new_empty(0) for _ in range(4))    # not one tensor: results must not be aliases
    if norm:
        sum_starts = q.new_empty(B, H, N * K, dtype=torch.float32)
        scale = q.new_empty(B, H, T, dtype=torch.float32)
    if b is not None:
        x = q.new_empty(B, H, N * C, C, dtype=stored)
        u = empty(v, stored)
    return empty(v, q.dtype), torch.empty_like(state), starts, sum_starts, scale, x, u


def forward(q, k, v, g, b, q_den, k_den, state, norm, chunk_size):
    results = allocate(q, k, v, g, b, q_den, k_den, state, norm, chunk_size)
    B, H, T, K = q.shape
    V = v.shape[-1]
    constants = sizes(q, v, b, chunk_size) | dict(H=H, T=T, DECAY=g is not None)
    heads = B * H
    chunks = heads * blocks(T, constants["C"])
    NORM = kind(norm, q_den)
    y, final, starts, sum_starts, scale, x, u = views(*results)
    delta = b is not None
    q, k, v, g, b, q_den, k_den, state = views(q, k, v, g, b, q_den, k_den, state)
    with torch.cuda.device_of(results[0]):
        if not delta:
            programs = blocks(K, 64) * (blocks(V, 32) + norm)
            scan[heads * programs,](k, v, k if NORM == "own" else k_den, g, state, starts, sum_starts, final,
                                    **constants, BK=64, BV=32, NORM=NORM, num_stages=3)
            u = v
        else:
            delta_solve[chunks,](k, g, b, x, **constants, BK=64, LOG_C=constants["C"].bit_length() - 1, num_stages=1)
            BK = max(64, power(K))
            delta_scan[heads * blocks(V, 32),](k, v, x, g, b, state, u, starts, final, **constants, BK=BK, BV=32,
                                               num_stages={64: 3, 128: 2}.get(BK, 1))
        outputs[chunks * blocks(V, 64),](q, k, u, q_den, k_den, g, starts, sum_starts, y, scale, **constants,
                                         BK=64, BV=64, NORM=NORM, num_stages=1)
    return results


def allocate_backward(q, k, v, g, b, q_den, k_den, scale, y, starts, sum_starts, x, u, dy, dfinal, norm,
                      chunk_size):
    dg, db = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (g, b))
    dq_den, dk_den = (q.new_empty(0) if t is None else empty(t) for t in (q_den, k_den))
    return empty(q), empty(k), empty(v), dg, db, dq_den, dk_den, torch.empty_like(dfinal)


def backward(q, k, v, g, b, q_den, k_den, scale, y, starts, sum_starts, x, u, dy, dfinal, norm, chunk_size):
    results = allocate_backward(q, k, v, g, b, q_den, k_den, scale, y, starts, sum_starts, x, u, dy, dfinal, norm,
                                chunk_size)
    B, H, T, K = q.shape
    V = v.shape[-1]
    constants = sizes(q, v, b, chunk_size) | dict(H=H, T=T, DECAY=g is not None)
    heads = B * H
    chunks = heads * blocks(T, constants["C"])
    NORM = kind(norm, q_den)
    delta = b is not None
    ends, sum_ends, dz, derror = map(torch.empty_like, (starts, sum_starts, scale, u))
    reads = blocks(K, 64) * (2 if NORM == "other" else 1)
    programs = reads + blocks(V, 64)
    # With 128 registers four programs share a multiprocessor: base's 65,536 tokens take 0.34 ms on an H100, not 0.37.
    crowded = NORM == "other" and g is None and constants["PREC"] == "bf16"
    dg, db = results[3:5]
    dg_parts, db_parts = (None if t is None else t.new_empty(B, H, programs, T) for t in (g, b))

    dq, dk, dv, _, _, dq_den, dk_den, dstate = views(*results)
    starts, sum_starts, ends_, sum_ends, dz = views(starts, sum_starts, ends, sum_ends, dz)
    dg_, db_ = views(*[ends if x is None else x for x in (dg_parts, db_parts)])
    q, k, v, g, b, q_den, k_den, scale, y = views(q, k, v, g, b, q_den, k_den, scale, y)
    dy, dfinal, x, u, derror = views(dy, dfinal, x, u, derror)
    with torch.cuda.device_of(ends):
        if not delta:
            u = v
            if norm:
                sum_back[heads * blocks(T, 32),](y, dy, scale, dz, H, T, V=V, C=32, BV=max(16, power(V)))
            scans = blocks(K, 64) * (blocks(V, 32) + norm)
            scan_back[heads * scans,](q, q if NORM == "own" else q_den, g, scale, dz, dy, dfinal, ends_, sum_ends,
                                      dstate, **constants, BK=64, BV=32, NORM=NORM, num_stages=3)
        else:
            BK = max(64, power(K))
            delta_scan_back[heads * blocks(V, 32),](q, k, x, g, b, dy, dfinal, ends_, derror, dstate, **constants,
                                                    BK=BK, BV=32, num_stages={64: 3, 128: 2}.get(BK, 1))
        gradients[chunks * programs,](
            q, k, v, u, q_den, k_den, g, b, scale, dz, starts, sum_starts, dy, ends_, sum_ends, derror, dq, dk, dv,
            dq_den, dk_den, dg_, db_, **constants, BK=64, BV=64, DELTA=delta, NORM=NORM, num_stages=1,
            maxnreg=128 if crowded else None)
    if constants["DECAY"]:
        torch.sum(dg_parts[:, :, :reads], 2, out=dg)
    if delta:
        torch.sum(db_parts, 2, out=db)
    return results


def allocate_step(q, k, v, g, b, q_den, k_den, state, norm):
    return empty(v, q.dtype)


def forward_step(q, k, v, g, b, q_den, k_den, state, norm):
    y = allocate_step(q, k, v, g, b, q_den, k_den, state, norm)
    B, H, _, K = q.shape
    V = v.shape[-1]
    size = dict(K=K, V=V, BK=power(K), BV=power(V), DECAY=g is not None, DELTA=b is not None, NORM=kind(norm, q_den))
    warps = min(16, max(1, size["BK"] * size["BV"] // 1024))        # 32 elements of S in a thread, until all are busy
    q, k, v, q_den, k_den, g, b, state, y_ = views(q, k, v, q_den, k_den, g, b, state, y)
    with torch.cuda.device_of(y):
        step[B * H,](q, k, v, q_den, k_den, g, b, state, y_, H, **size, num_warps=warps)
    return y


library.define("lat::step", (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? b, Tensor? q_den, Tensor? k_den, Tensor(a!) state, bool norm) "
    "-> Tensor"))
library.define("lat::linear_attention", (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? b, Tensor? q_den, Tensor? k_den, Tensor state, bool norm, "
    "int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
library.define("lat::linear_attention_backward", (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? b, Tensor? q_den, Tensor? k_den, Tensor scale, Tensor? y, "
    "Tensor starts, Tensor sum_starts, Tensor x, Tensor u, Tensor dy, Tensor dfinal, bool norm, "
    "int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))


def save(ctx, inputs, output):
    q, k, v, g, b, q_den, k_den, state, ctx.norm, ctx.chunk_size = inputs
    y, final, *rest = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, b, q_den, k_den, final, y if ctx.norm else None, *rest)


def differentiate(ctx, dy, dfinal, *_, backward=torch.ops.lat.linear_attention_backward):
    *inputs, final, y, starts, sum_starts, scale, x, u = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[2], dtype=inputs[0].dtype)
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal.contiguous()
    *grads, dstate = backward(*inputs, scale, y, starts, sum_starts, x, u, dy, dfinal, ctx.norm, ctx.chunk_size)
    grads = [None if x is None else grad for x, grad in zip(inputs, grads)]
    return *grads, dstate, None, None


library.impl("lat::step", "default", forward_step)
library.register_fake("lat::step", allocate_step)
library.impl("lat::linear_attention", "default", forward)
library.impl("lat::linear_attention_backward", "default", backward)
library.register_fake("lat::linear_attention", allocate)
library.register_fake("lat::linear_attention_backward", allocate_backward)
library.register_autograd("lat::linear_attention", differentiate, setup_context=save)


class Eager(torch.autograd.Function):
    """The same without the operators' dispatch, which costs more time on the CPU than the kernels need on the GPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[2:])
        return output

    @staticmethod
    def backward(ctx, *grads):
        return differentiate(ctx, *grads, backward=backward)


# ----------------------------------------------------------------------------------------------------------------------
# The operation, as model.py calls it


def runs_on(x):
    """Whether Triton is there and x on an Nvidia GPU from Ampere on, in 16 or 32 bits."""
    if triton is None or not x.is_cuda or torch.version.hip is not None:
        return False
    supported = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return supported and torch.cuda.get_device_capability(x.device) >= (8, 0)


def available(q, v):
    """Whether to run the kernels: where they can, for widths where they are fast."""
    widest = 256 if q.dtype == torch.bfloat16 else 128
    return runs_on(q) and q.shape[-1] <= widest and v.shape[-1] <= 256


def takes_step(q, v):
    """Whether to run the kernel of one token: where no gradient is asked for."""
    wide = max(q.shape[-1], v.shape[-1])
    return runs_on(q) and q.shape[2] == 1 and wide <= 256 and not torch.is_grad_enabled()


def linear_attention(q, k, v, log_decay=None, beta=None, state=None, chunk_size=64):
    """linear_attention_chunked of model.py in 2 or 3 kernels: O(T C) work, O(T) memory. With beta, the delta rule.

    Returns: y (B,H,T,V) in q.dtype, or autocast's, laid out (B,T,H,V); the state (B,H,K,V) in fp32.
    Differs: products round bf16 inputs to bf16, fp16 to tf32, fp32 to three tf32 (about 1e-6); nothing is float64.
    """
    return run(q, k, v, log_decay, beta, None, None, state, False, chunk_size)


def linear_attention_step(q, k, v, log_decay=None, beta=None, state=None, overwrite=False):
    """linear_attention_recurrent of model.py for one token, in one kernel, in fp32. overwrite: in place of state."""
    return run_step(q, k, v, log_decay, beta, None, None, state, False, overwrite)


def normalised_linear_attention(q, k, v, q_den, k_den, log_decay=None, state=None, chunk_size=64):
    """y divided by the sum of the weights that q_den and k_den make, plus 1e-6; the state (B,H,K,V+1), with that sum's.

    With q and k themselves for q_den and k_den, those sums cost next to nothing.
    """
    return run(q, k, v, log_decay, None, *others(q, k, q_den, k_den), state, True, chunk_size)


def normalised_linear_attention_step(q, k, v, q_den, k_den, log_decay=None, state=None, overwrite=False):
    """The same for one token, in one kernel."""
    return run_step(q, k, v, log_decay, None, *others(q, k, q_den, k_den), state, True, overwrite)


def others(q, k, q_den, k_den):
    """q_den and k_den, or None and None where they are q and k."""
    if q_den is q and k_den is k:
        return None, None
    return q_den, k_den


def run(q, k, v, log_decay, beta, q_den, k_den, state, norm, chunk_size):
    tensors = [q, k, v, q_den, k_den]
    if torch.is_autocast_enabled("cuda"):                           # what autocast makes fp32 would cost three products
        dtype = torch.get_autocast_dtype("cuda")
        tensors = [x if x is None else x.to(dtype) for x in tensors]
    q, k, v, q_den, k_den = tensors
    B, H, T, K = q.shape
    pad = -K % 16                                                   # aligned rows load 16 bytes at once
    if pad:
        q, k, q_den, k_den = (x if x is None else F.pad(x, (0, pad)) for x in (q, k, q_den, k_den))
    g, b = (x if x is None else x.float() for x in (log_decay, beta))
    if state is None:
        state = q.new_zeros(B, H, K + pad, v.shape[-1] + norm, dtype=torch.float32)
    else:
        state = F.pad(state.float(), (0, 0, 0, pad)).contiguous()
    operation = torch.ops.lat.linear_attention if torch.compiler.is_compiling() else Eager.apply
    y, state, *_ = operation(q, k, v, g, b, q_den, k_den, state, norm, chunk_size)
    return y, state[:, :, :K]


def run_step(q, k, v, log_decay, beta, q_den, k_den, state, norm, overwrite):
    B, H, _, K = q.shape
    g, b = (x if x is None else x.float() for x in (log_decay, beta))
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1] + norm, dtype=torch.float32)
    elif not overwrite:
        state = state.clone()
    state = state.float().contiguous()
    return torch.ops.lat.step(q, k, v, g, b, q_den, k_den, state, norm), state


# ----------------------------------------------------------------------------------------------------------------------
# The loss, as speedups.py calls it


@jit
def softmax_loss_row(
    logits, targets,
    losses,
    width, vocab,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):
    """log(sum_j exp(logits_j)) - logits_target of one row; and in its place the gradient, softmax - one_hot.

    The second pass goes from the end of the row, which the L2 cache still holds, to its start. 5,336 rows of 50,304 in
    bf16 take 0.55 ms on an H100; read once and written once, they would take 0.36.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row)
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    highest = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    N = tl.cdiv(width, BLOCK)
    for n in range(N):
        j = n * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + j, mask=j < vocab, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    log_z = highest + tl.log(tl.sum(total, 0))
    counted = target >= 0
    tl.store(losses + row, tl.where(counted, log_z - at_target, 0.0))
    if GRADIENT:
        for step in range(N):
            j = (N - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + j, mask=j < vocab, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - log_z) - tl.where(j == target, 1.0, 0.0)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(logits + j, gradient, mask=j < width, eviction_policy="evict_first")


def softmax_loss(logits, targets, vocab_size, with_grad):
    """SoftmaxLoss of speedups.py in one kernel. The gradient takes the place of the logits (rows,width)."""
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        softmax_loss_row[rows,](logits, targets, losses, width, vocab_size, GRADIENT=with_grad, BLOCK=4096, num_warps=8)
    return losses.sum(), logits if with_grad else None
