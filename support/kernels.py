"""The chunked form on a GPU, in Triton: the same numbers as plain PyTorch. Used where both are there, never required.

Plain PyTorch writes every intermediate of the chunked form to memory: scores, decays, a state per chunk, and all of it
again for the gradients. Here a chunk's scores live and die in registers. What is still written is one state per chunk,
in the dtype of the matrix products (bf16 inputs: bf16; a product would round it anyway; sums over time stay in fp32).

With c the running sum of g in a chunk of C tokens, D_ij = exp(c_i - c_j) for i >= j else 0, P = (Q K^T) D and, for the
delta rule, X = (I + tril(b K K^T D, -1))^{-1}:

    U  = V                            or, delta rule,    U = X b R,   R = V - exp(c) K S_0
    Y  = exp(c) Q S_0 + P U                              S_1 = exp(c_C) S_0 + K^T exp(c_C - c) U

  forward    invert          X of every chunk                                         (delta rule only)
             scan_forward    S_0 of every chunk, one after the other
             outputs         Y of every chunk
  backward   row_dots        gradient of the normaliser z                             (normaliser only)
             scan_backward   dS_1 of every chunk, last to first
             gradients       dq, dk, dv, dg, db of every chunk

Scans run in parallel over batch, head and blocks of V; the others over chunks too. Nothing else is kept for backward: P
and U are recomputed, a product being cheaper than its bytes. Sum normaliser: y = Y / z with z = exp(c) Q Z_0 + P 1,
where Z is the state's ones column, kept as a vector beside S. The Q and K of z may be others than those of Y (rope
turns the numerator alone): NORM is "none", "own" (the same Q and K) or "other" (qz and kz).
"""
import types

import torch
import torch.nn.functional as F
from torch import library

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                                               # then available() is False
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda kernel: kernel


# ----------------------------------------------------------------------------------------------------------------------
# What the kernels share. A tensor (B,H,T,D) comes as a tuple of its pointer and its strides over B, H and T, so that
# transposed views need no copy. bh numbers the pairs of batch and head.


@jit
def load(x, bh, H, row, rows, col, cols, R: tl.constexpr, C: tl.constexpr):
    """The (R,C) tile of x[b, h] that starts at (row, col); zeros from rows and from cols on."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    start = x[0] + (bh // H) * x[1] + (bh % H) * x[2] + tl.cast(row, tl.int64) * x[3] + col
    return tl.load(start + (i * x[3] + j), mask=(row + i < rows) & (col + j < cols), other=0)


@jit
def store(x, tile, bh, H, row, rows, col, cols, R: tl.constexpr, C: tl.constexpr):
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    start = x[0] + (bh // H) * x[1] + (bh % H) * x[2] + tl.cast(row, tl.int64) * x[3] + col
    tl.store(start + (i * x[3] + j), tile, mask=(row + i < rows) & (col + j < cols))


@jit
def load_row(x, start, n, fill, C: tl.constexpr):
    """x[start : start + C] of a contiguous x, with fill from start + n on."""
    i = tl.arange(0, C)
    return tl.load(x + start + i, mask=i < n, other=fill).to(tl.float32)


@jit
def store_row(x, row, start, n, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(x + start + i, row, mask=i < n)


@jit
def dot(a, b, PREC: tl.constexpr):
    """a @ b, summed in fp32; PREC is what its operands are rounded to."""
    if PREC == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PREC)


@jit
def decays(g, start, n, C: tl.constexpr, DECAY: tl.constexpr):
    """c, and the factors exp(c) from the chunk's start, exp(c_C - c) to its end, exp(c_C) through it."""
    if DECAY:
        c = tl.cumsum(load_row(g, start, n, 0.0, C), 0)
        end = tl.sum(tl.where(tl.arange(0, C) == C - 1, c, 0.0), 0)
        return c, tl.exp(c), tl.exp(end - c), tl.exp(end)
    else:
        one = tl.full((C,), 1.0, tl.float32)
        return one, one, one, 1.0


@jit
def decayed(scores, c, C: tl.constexpr, DECAY: tl.constexpr, DIAGONAL: tl.constexpr):
    """scores * D, without the diagonal if so asked. Masked before exp, never exp(c_i) exp(-c_j): both can overflow."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    seen = (i >= j) if DIAGONAL else (i > j)
    if DECAY:
        return scores * tl.exp(tl.where(seen, c[:, None] - c[None, :], float("-inf")))
    else:
        return tl.where(seen, scores, 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@jit
def invert(k, g, b, x, H, T, K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
           DECAY: tl.constexpr, PREC: tl.constexpr):
    """X = (I + L)^{-1} with L = tril(b K K^T D, -1), for one chunk.

    Inverses of the diagonal blocks of n tokens give those of 2n: of [[A, 0], [M, B]] it is [[A', 0], [-B' M A', B']],
    which on the whole matrix is X - X M X, M holding the lower left quarters. LOG_C doublings, from X = I.
    """
    bh, t = tl.program_id(1).to(tl.int64), tl.program_id(0) * C
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keys = load(k, bh, H, t, T, 0, K, C, BK)
    c, _, _, _ = decays(g, bh * T + t, T - t, C, DECAY)
    beta = load_row(b, bh * T + t, T - t, 0.0, C)
    L = beta[:, None] * decayed(dot(keys, tl.trans(keys), PREC), c, C, DECAY, False)
    X = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, L, 0.0)
    for level in tl.static_range(1, LOG_C):
        M = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level > j >> level), L, 0.0)
        X -= dot(X, dot(M, X, "tf32" if PREC == "bf16" else PREC), "tf32" if PREC == "bf16" else PREC)
    store(x, X, bh, H, t, t + C, 0, C, C, C)


@jit
def scan_forward(k, v, kz, x, g, b, state, starts, zs, u, final, H, T, N, K: tl.constexpr, V: tl.constexpr,
                 C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
                 NORM: tl.constexpr, PREC: tl.constexpr):
    """S_1 = exp(c_C) S_0 + K^T exp(c_C - c) U, chunk after chunk, for BV columns; writes each S_0 (and Z_0, and U)."""
    bh, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BV
    S = load(state, bh, H, 0, K, first, V, BK, BV)
    if NORM != "none":
        Z = tl.sum(load(state, bh, H, 0, K, V, V + 1, BK, 1), 1)
    for n in range(N):
        t = n * C
        store(starts, S, bh, H, n * K, n * K + K, first, V, BK, BV)
        keys = load(k, bh, H, t, T, 0, K, C, BK)
        values = load(v, bh, H, t, T, first, V, C, BV)
        _, from_start, to_end, through = decays(g, bh * T + t, T - t, C, DECAY)
        if NORM != "none":
            if first == 0:
                store_row(zs, Z, (bh * N + n) * K, K, BK)
            z_keys = keys if NORM == "own" else load(kz, bh, H, t, T * (first == 0), 0, K, C, BK)
            Z = through * Z + tl.sum(z_keys * to_end[:, None], 0)
        if DELTA:
            beta = load_row(b, bh * T + t, T - t, 0.0, C)
            residual = values - from_start[:, None] * dot(keys, S, PREC)
            values = dot(load(x, bh, H, t, t + C, 0, C, C, C), beta[:, None] * residual, PREC)
            store(u, values, bh, H, t, T, first, V, C, BV)
        S = through * S + dot(tl.trans(keys), values * to_end[:, None], PREC)
    store(final, S, bh, H, 0, K, first, V, BK, BV)
    if NORM != "none":
        if first == 0:
            store(final, Z[:, None], bh, H, 0, K, V, V + 1, BK, 1)


@jit
def outputs(q, k, u, qz, kz, g, starts, zs, z, y, H, T, N, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
            BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr):
    """Y = exp(c) Q S_0 + P U for BV columns of one chunk, divided by z, which it writes."""
    n, bh, first = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    t = n * C
    queries, keys = load(q, bh, H, t, T, 0, K, C, BK), load(k, bh, H, t, T, 0, K, C, BK)
    c, from_start, _, _ = decays(g, bh * T + t, T - t, C, DECAY)
    P = decayed(dot(queries, tl.trans(keys), PREC), c, C, DECAY, True)
    Y = from_start[:, None] * dot(queries, load(starts, bh, H, n * K, n * K + K, first, V, BK, BV), PREC)
    Y += dot(P, load(u, bh, H, t, T, first, V, C, BV), PREC)
    if NORM != "none":
        if NORM == "other":
            queries = load(qz, bh, H, t, T, 0, K, C, BK)
            P = decayed(dot(queries, tl.trans(load(kz, bh, H, t, T, 0, K, C, BK)), PREC), c, C, DECAY, True)
        Z = load_row(zs, (bh * N + n) * K, K, 0.0, BK)
        weights = from_start * tl.sum(queries * Z[None, :], 1) + tl.sum(P, 1) + 1e-6
        Y /= weights[:, None]
        if first == 0:
            store_row(z, weights, bh * T + t, T - t, C)
    store(y, Y, bh, H, t, T, first, V, C, BV)


# ----------------------------------------------------------------------------------------------------------------------
# Backward. d in front of a name: the gradient with respect to it.


@jit
def row_dots(y, dy, z, dz, H, T, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """dz = -sum(dy y) / z, for C tokens."""
    bh, t = tl.program_id(1).to(tl.int64), tl.program_id(0) * C
    product = load(y, bh, H, t, T, 0, V, C, BV).to(tl.float32) * load(dy, bh, H, t, T, 0, V, C, BV)
    store_row(dz, -tl.sum(product, 1) / load_row(z, bh * T + t, T - t, 1.0, C), bh * T + t, T - t, C)


@jit
def scan_backward(q, k, qz, x, g, b, z, dz, dy, dfinal, dends, dzs, dr, dstate, H, T, N, K: tl.constexpr,
                  V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
                  DELTA: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr):
    """dS_0 = exp(c_C) dS_1 + Q^T exp(c) dY - K^T exp(c) b dX, last chunk first; writes each dS_1 (and dZ_1).

    The last term is the delta rule's: dX = X^T (P^T dY + exp(c_C - c) K dS_1), the gradient of b R, left where dv goes.
    """
    bh, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BV
    dS = load(dfinal, bh, H, 0, K, first, V, BK, BV)
    if NORM != "none":
        dZ = tl.sum(load(dfinal, bh, H, 0, K, V, V + 1, BK, 1), 1)
    for step in range(N):
        n = N - 1 - step
        t = n * C
        store(dends, dS, bh, H, n * K, n * K + K, first, V, BK, BV)
        queries = load(q, bh, H, t, T, 0, K, C, BK)
        dY = load(dy, bh, H, t, T, first, V, C, BV)
        c, from_start, to_end, through = decays(g, bh * T + t, T - t, C, DECAY)
        if NORM != "none":
            if first == 0:
                store_row(dzs, dZ, (bh * N + n) * K, K, BK)
            dz_t = load_row(dz, bh * T + t, T - t, 0.0, C)
            z_queries = queries if NORM == "own" else load(qz, bh, H, t, T * (first == 0), 0, K, C, BK)
            dZ = through * dZ + tl.sum(z_queries * (from_start * dz_t)[:, None], 0)
            from_start /= load_row(z, bh * T + t, T - t, 1.0, C)
        dS_0 = through * dS + dot(tl.trans(queries), dY * from_start[:, None], PREC)
        if DELTA:
            keys = load(k, bh, H, t, T, 0, K, C, BK)
            beta = load_row(b, bh * T + t, T - t, 0.0, C)
            P = decayed(dot(queries, tl.trans(keys), PREC), c, C, DECAY, True)
            dU = dot(tl.trans(P), dY, PREC) + to_end[:, None] * dot(keys, dS, PREC)
            dX = dot(tl.trans(load(x, bh, H, t, t + C, 0, C, C, C)), dU, PREC)
            store(dr, dX, bh, H, t, T, first, V, C, BV)
            dS_0 -= dot(tl.trans(keys), (beta * from_start)[:, None] * dX, PREC)
        dS = dS_0
    store(dstate, dS, bh, H, 0, K, first, V, BK, BV)
    if NORM != "none":
        if first == 0:
            store(dstate, dZ[:, None], bh, H, 0, K, V, V + 1, BK, 1)


@jit
def gradients(q, k, v, qz, kz, x, g, b, z, dz, starts, zs, dy, dends, dzs, dq, dk, dv, dqz, dkz, dg, db, H, T, N,
              K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
              DECAY: tl.constexpr, DELTA: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr):
    """All gradients of one chunk, given S_0 and dS_1. With dP = tril(dY U^T) D and e the exponentials of decays():

        dQ = e dY S_0^T + dP K         dV = P^T dY + e K dS_1                               (delta rule: dV = b dX)
        dK = e U dS_1^T + dP^T Q       - b e dX S_0^T + (G + G^T) K,   G = -b tril(dX U^T, -1) D      (delta rule)
        db = dX . R - rows of tril(dX U^T, -1) D (K K^T)
        dg_t = what passes over step t: every product of a later and an earlier token (or state), times its gradient
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = n * C
    keys = load(k, bh, H, t, T, 0, K, C, BK)
    c, from_start, to_end, through = decays(g, bh * T + t, T - t, C, DECAY)
    dK = tl.zeros((C, BK), tl.float32)
    dc = tl.zeros((C,), tl.float32)                                               # of c_i where it is added
    passed = tl.zeros((C,), tl.float32)                                           # of c_C - c_j
    whole = 0.0                                                                   # of c_C alone

    if DELTA:                                                                     # 1. through U = X b R
        X = load(x, bh, H, t, t + C, 0, C, C, C)
        beta = load_row(b, bh * T + t, T - t, 0.0, C)
        dL = tl.zeros((C, C), tl.float32)
        dbeta = tl.zeros((C,), tl.float32)
        for first in range(0, V, BV):
            S = load(starts, bh, H, n * K, n * K + K, first, V, BK, BV)
            dX = load(dv, bh, H, t, T, first, V, C, BV).to(tl.float32)            # scan_backward left it there
            R = load(v, bh, H, t, T, first, V, C, BV) - from_start[:, None] * dot(keys, S, PREC)
            dbeta += tl.sum(dX * R, 1)
            dL -= dot(dX, tl.trans(dot(X, beta[:, None] * R, PREC)), PREC)
            dKS = (beta * from_start)[:, None] * dot(dX, tl.trans(S), PREC)
            dK -= dKS
            if DECAY:
                dc -= tl.sum(keys * dKS, 1)
        dL = decayed(dL, c, C, DECAY, False)
        pairs = dL * dot(keys, tl.trans(keys), PREC)
        dbeta += tl.sum(pairs, 1)
        store_row(db, dbeta, bh * T + t, T - t, C)
        if DECAY:
            pairs = beta[:, None] * pairs
            dc += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        G = beta[:, None] * dL
        dK += dot(G + tl.trans(G), keys, PREC)

    queries = load(q, bh, H, t, T, 0, K, C, BK)                                   # 2. through Y and S_1
    P = decayed(dot(queries, tl.trans(keys), PREC), c, C, DECAY, True)
    if NORM == "none":
        over_z = tl.full((C,), 1.0, tl.float32)
    else:
        over_z = 1 / load_row(z, bh * T + t, T - t, 1.0, C)
    dP = tl.zeros((C, C), tl.float32)
    dQ = tl.zeros((C, BK), tl.float32)
    for first in range(0, V, BV):
        S = load(starts, bh, H, n * K, n * K + K, first, V, BK, BV)
        dS = load(dends, bh, H, n * K, n * K + K, first, V, BK, BV)
        dY = load(dy, bh, H, t, T, first, V, C, BV)
        U = load(v, bh, H, t, T, first, V, C, BV)
        if DELTA:
            R = U - from_start[:, None] * dot(keys, S, PREC)
            U = dot(X, beta[:, None] * R, PREC)
            dV = beta[:, None] * load(dv, bh, H, t, T, first, V, C, BV)
        else:
            dV = dot(tl.trans(over_z[:, None] * P), dY, PREC) + to_end[:, None] * dot(keys, dS, PREC)
        store(dv, dV, bh, H, t, T, first, V, C, BV)
        dP += dot(dY, tl.trans(U), PREC)
        dQ += dot(dY, tl.trans(S), PREC)
        late = to_end[:, None] * dot(U, tl.trans(dS), PREC)
        dK += late
        if DECAY:
            passed += tl.sum(keys * late, 1)
            whole += tl.sum(tl.sum(S.to(tl.float32) * dS, 1), 0)
    dP, dQ = over_z[:, None] * dP, (over_z * from_start)[:, None] * dQ
    if NORM != "none":                                                            # 3. through z = exp(c) Q Z_0 + P 1
        dz_t = load_row(dz, bh * T + t, T - t, 0.0, C)
        Z, dZ = load_row(zs, (bh * N + n) * K, K, 0.0, BK), load_row(dzs, (bh * N + n) * K, K, 0.0, BK)
        early, late = (from_start * dz_t)[:, None] * Z[None, :], to_end[:, None] * dZ[None, :]
        z_keys = keys
        if NORM == "own":
            dP += dz_t[:, None]
            dQ += early
            dK += late
        else:
            z_queries, z_keys = load(qz, bh, H, t, T, 0, K, C, BK), load(kz, bh, H, t, T, 0, K, C, BK)
            if DECAY:
                pairs = dz_t[:, None] * decayed(dot(z_queries, tl.trans(z_keys), PREC), c, C, DECAY, True)
                dc += tl.sum(z_queries * early, 1) + tl.sum(pairs, 1) - tl.sum(pairs, 0)
            D = decayed(tl.zeros((C, C), tl.float32) + dz_t[:, None], c, C, DECAY, True)
            store(dqz, early + dot(D, z_keys, PREC), bh, H, t, T, 0, K, C, BK)
            store(dkz, late + dot(tl.trans(D), z_queries, PREC), bh, H, t, T, 0, K, C, BK)
        if DECAY:
            passed += tl.sum(z_keys * late, 1)
            whole += tl.sum(Z * dZ, 0)
    if DECAY:
        pairs = P * dP
        dc += tl.sum(queries * dQ, 1) + tl.sum(pairs, 1) - tl.sum(pairs, 0)
    dP = decayed(dP, c, C, DECAY, True)
    dQ += dot(dP, keys, PREC)
    dK += dot(tl.trans(dP), queries, PREC)
    store(dq, dQ, bh, H, t, T, 0, K, C, BK)
    store(dk, dK, bh, H, t, T, 0, K, C, BK)
    if DECAY:
        dg_t = tl.cumsum(dc, 0, reverse=True) + tl.cumsum(passed, 0) - passed + through * whole
        store_row(dg, dg_t, bh * T + t, T - t, C)


# ----------------------------------------------------------------------------------------------------------------------
# The launches, as two operators that PyTorch knows by name: torch.compile takes them as they are. The two functions
# that allocate their results double as their shape rules.


def _power(n):
    return 1 << (n - 1).bit_length()


def _sizes(q, v, chunk_size):
    """By rule: chunks of up to 64 tokens, whole rows of K and 64 columns of V; 32 where tiles of fp32 need the room.

    Traps: tiles narrower than 128 bytes beside wider ones make ptxas 12.8 take matrix descriptors from registers that
    it never wrote, and the GPU reads illegal addresses, sometimes: K and V are padded to tiles of at least that. And
    with K = 153 in bf16 the gradient of k was wrong by 20 %, cause unknown: above 128, bf16 goes the way of fp32.
    """
    K, V, BK = q.shape[-1], v.shape[-1], max(64, _power(q.shape[-1]))
    precision = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}[q.dtype]
    precision = "tf32x3" if BK > 128 else precision
    most = 64 if precision == "bf16" or BK == 64 else 32
    C = max(16, min(_power(chunk_size), most))
    warps = 4 if BK == 64 or precision == "bf16" else 8
    return dict(K=K, V=V, C=C, BK=BK, PREC=precision, num_warps=warps), -(-q.shape[2] // C), 32, most


def _view(x):
    """A tensor (B,H,T,D) as the kernels take it: its pointer and strides. Rows that are not dense are copied."""
    if x is None:
        return None
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, *x.stride()[:3]


def _empty(x, dtype=None):
    """Like x (B,H,T,D), but laid out (B,T,H,D), as the projections around the operation want it."""
    return torch.empty_like(x.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def _norm(norm, qz):
    return "none" if not norm else "own" if qz is None else "other"


def _allocate(q, k, v, g, b, qz, kz, state, norm, chunk_size):
    (B, H, T, K), V = q.shape, v.shape[-1]
    sizes, N, _, _ = _sizes(q, v, chunk_size)
    C, stored = sizes["C"], torch.bfloat16 if sizes["PREC"] == "bf16" else torch.float32
    starts = q.new_empty(B, H, N * K, V, dtype=stored)
    zs, z = (q.new_empty(shape if norm else 0, dtype=torch.float32) for shape in ((B, H, N, K), (B, H, T)))
    x = q.new_empty((B, H, N * C, C) if b is not None else 0, dtype=stored)
    return _empty(v, q.dtype), torch.empty_like(state), starts, zs, z, x


def _allocate_backward(q, k, v, g, b, qz, kz, z, y, starts, zs, x, dy, dfinal, norm, chunk_size):
    dqz, dkz = (q.new_empty(0) if o is None else _empty(o) for o in (qz, kz))
    dg, db = (q.new_empty(0 if o is None else o.shape, dtype=torch.float32) for o in (g, b))
    return _empty(q), _empty(k), _empty(v), dg, db, dqz, dkz, torch.empty_like(dfinal)


def _forward(q, k, v, g, b, qz, kz, state, norm, chunk_size):
    y, final, starts, zs, z, x = _allocate(q, k, v, g, b, qz, kz, state, norm, chunk_size)
    (B, H, T, K), V, delta = q.shape, v.shape[-1], b is not None
    sizes, N, scanned, columns = _sizes(q, v, chunk_size)
    flags = dict(DECAY=g is not None, NORM=_norm(norm, qz))
    q, k, v, qz, kz = map(_view, (q, k, v, qz, kz))
    u = _view(_empty(y, starts.dtype)) if delta else v
    with torch.cuda.device_of(y):
        if delta:
            invert[N, B * H](k, g, b, _view(x), H, T, LOG_C=sizes["C"].bit_length() - 1, DECAY=g is not None,
                             **{name: size for name, size in sizes.items() if name != "V"})
        scan_forward[-(-V // scanned), B * H](
            k, v, kz, _view(x) if delta else None, g, b, _view(state), _view(starts), zs, u, _view(final), H, T, N,
            BV=scanned, DELTA=delta, **sizes, **flags, num_stages=3 if sizes["BK"] == 64 else 2)
        outputs[N, B * H, -(-V // columns)](
            q, k, u, qz, kz, g, _view(starts), zs, z, _view(y), H, T, N, BV=columns, **sizes, **flags)
    return y, final, starts, zs, z, x


def _backward(q, k, v, g, b, qz, kz, z, y, starts, zs, x, dy, dfinal, norm, chunk_size):
    grads = _allocate_backward(q, k, v, g, b, qz, kz, z, y, starts, zs, x, dy, dfinal, norm, chunk_size)
    dq, dk, dv, dg, db, dqz, dkz, dstate = grads
    (B, H, T, K), V, delta = q.shape, v.shape[-1], b is not None
    sizes, N, scanned, columns = _sizes(q, v, chunk_size)
    flags = dict(DECAY=g is not None, DELTA=delta, NORM=_norm(norm, qz))
    dends, dzs, dz = torch.empty_like(starts), torch.empty_like(zs), torch.empty_like(z)
    dqz, dkz = (None if qz is None else _view(o) for o in (dqz, dkz))
    q, k, v, qz, kz, dy = map(_view, (q, k, v, qz, kz, dy))
    x, starts_, dends_ = _view(x) if delta else None, _view(starts), _view(dends)
    with torch.cuda.device_of(starts):
        if norm:
            row_dots[-(-T // 32), B * H](_view(y), dy, z, dz, H, T, V=V, C=32, BV=max(16, _power(V)))
        scan_backward[-(-V // scanned), B * H](
            q, k, qz, x, g, b, z, dz, dy, _view(dfinal), dends_, dzs, _view(dv), _view(dstate), H, T, N, BV=scanned,
            **sizes, **flags, num_stages=3 if sizes["BK"] == 64 else 2)
        gradients[N, B * H](
            q, k, v, qz, kz, x, g, b, z, dz, starts_, zs, dy, dends_, dzs, _view(dq), _view(dk), _view(dv), dqz, dkz,
            dg, db, H, T, N, BV=columns, **sizes | flags | dict(num_warps=4 if sizes["BK"] == 64 else 8), num_stages=1)
    return grads


def _save(ctx, inputs, output):
    q, k, v, g, b, qz, kz, state, ctx.norm, ctx.chunk_size = inputs
    y, final, starts, zs, z, x = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, b, qz, kz, z, y if ctx.norm else None, starts, zs, x, final)


library.define("lat::linear_attention", (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? b, Tensor? qz, Tensor? kz, Tensor state, bool norm, "
    "int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
library.define("lat::linear_attention_backward", (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? b, Tensor? qz, Tensor? kz, Tensor z, Tensor? y, Tensor starts, "
    "Tensor zs, Tensor x, Tensor dy, Tensor dfinal, bool norm, int chunk_size) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))


def _differentiate(ctx, dy, dfinal, *_, backward=torch.ops.lat.linear_attention_backward):
    *inputs, z, y, starts, zs, x, final = ctx.saved_tensors
    dy = torch.zeros_like(inputs[2]) if dy is None else dy
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal.contiguous()
    *grads, dstate = backward(*inputs, z, y, starts, zs, x, dy, dfinal, ctx.norm, ctx.chunk_size)
    return *(None if x is None else grad for x, grad in zip(inputs, grads)), dstate, None, None


library.impl("lat::linear_attention", "default", _forward)
library.impl("lat::linear_attention_backward", "default", _backward)
library.register_fake("lat::linear_attention", _allocate)
library.register_fake("lat::linear_attention_backward", _allocate_backward)
library.register_autograd("lat::linear_attention", _differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same without the operators' dispatch, which costs more time on the CPU than the kernels need on the GPU."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[2:])
        return output

    @staticmethod
    def backward(ctx, *grads):
        return _differentiate(ctx, *grads, backward=_backward)


# ----------------------------------------------------------------------------------------------------------------------
# The operation, as model.py calls it


def available(q, v):
    """Whether to run the kernels: Triton, an Nvidia GPU from Ampere on, 16 or 32 bits, widths where they are fast."""
    return (triton is not None and q.is_cuda and torch.version.hip is None
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and q.shape[-1] <= 128 and v.shape[-1] <= 256
            and q.dtype in (torch.bfloat16, torch.float16, torch.float32))


def linear_attention(q, k, v, log_decay=None, beta=None, state=None, chunk_size=64):
    """model.linear_attention_chunked, unchecked, in 3 to 6 kernels: O(T C) work, O(T) memory.

    Args: as there, with K and V up to 256; views that are not contiguous cost no copy if their last dimension is dense.
    Returns: y (B,H,T,V) in q.dtype, laid out (B,T,H,V); the state (B,H,K,V) in fp32.
    """
    return _run(q, k, v, log_decay, beta, None, None, state, v.shape[-1], False, chunk_size)


def normalised_linear_attention(q, k, v, q_sum, k_sum, log_decay=None, state=None, chunk_size=64):
    """model.normalised of the chunked form, unchecked, in one pass. The state (B,H,K,V+1) has the column of the sums."""
    own = q_sum is q and k_sum is k
    qz, kz = (None, None) if own else (q_sum, k_sum)
    return _run(q, k, v, log_decay, None, qz, kz, state, v.shape[-1] + 1, True, chunk_size)


def _run(q, k, v, log_decay, beta, qz, kz, state, columns, norm, chunk_size):
    B, H, _, K = q.shape
    pad = -K % 16                                                     # aligned rows load 16 bytes at once
    if pad:
        q, k, qz, kz = (x if x is None else F.pad(x, (0, pad)) for x in (q, k, qz, kz))
    g, b = (x if x is None else x.float().contiguous() for x in (log_decay, beta))
    if state is None:
        state = q.new_zeros(B, H, K + pad, columns, dtype=torch.float32)
    else:
        state = F.pad(state.float(), (0, 0, 0, pad)).contiguous()
    run = torch.ops.lat.linear_attention if torch.compiler.is_compiling() else _Eager.apply
    y, state, *_ = run(q, k, v, g, b, qz, kz, state, norm, chunk_size)
    return y, state[:, :, :K]
