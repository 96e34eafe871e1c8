"""A linear-attention transformer language model: one operation in three forms, the mixers built on it, and the model.

Softmax attention compares each query with every earlier key, O(T^2) in time:

    y_t = sum_{j<=t} exp(q_t . k_j) v_j / sum_{j<=t} exp(q_t . k_j)

Replace exp(q . k) by a product of features, phi(q) . phi(k), and from here on write q and k for the features. Now the
query can be taken out of the sum. For the numerator (the denominator is the same with every v_j = 1):

    y_t = sum_{j<=t} (q_t . k_j) v_j = S_t^T q_t      with      S_t = sum_{j<=t} k_j v_j^T = S_{t-1} + k_t v_t^T

S is one matrix per head, however long the text: generating a million tokens takes no more memory than generating one.
The softmax's 1 / sqrt(d), left out above, is left to phi: a constant factor of all weights cancels in the division.
A decay forgets: S_t = exp(g_t) S_{t-1} + k_t v_t^T, so at token t, what token j wrote has the weight
exp(g_{j+1} + ... + g_t).

Three forms give the same numbers:

    quadratic    the sum over j, for all pairs at once           O(T^2 (K + V))          the definition
    recurrent    S, token by token                               O(T K V), sequential    how text is generated
    chunked      quadratic in chunks of C tokens, S in between   O(T (C (K + V) + K V))  how the model trains

The letters, and what the papers call them:

    B, T, H     batch, time, heads                      N, C    chunks, and tokens in a chunk (T = N C)
    K, V        width per head of q and k, and of v     D       width of the model
    q, k, v     phi(Q_i), phi(K_i), V_i in [1, Eq. 4]
    S           the state (B,H,K,V); S_i in [1, Eq. 18], transposed in [5, 6]
    g           log decay (B,H,T), at most 0; log gamma in [3, Eq. 6], log alpha_t in [6]
    G           running sum of g, from the start of the text or of the chunk
    b           write strength of the delta rule (B,H,T), beta_t in [4, 5, 6]
    u           what the delta rule writes in place of v [5, Eq. 5]

[1] Katharopoulos et al. 2020, Transformers are RNNs, arXiv 2006.16236
[2] Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, 2402.18668
[3] Sun et al. 2023, Retentive network, 2307.08621
[4] Schlag et al. 2021, Linear transformers are secretly fast weight programmers, 2102.11174
[5] Yang et al. 2024, Parallelizing linear transformers with the delta rule over sequence length, 2406.06484
[6] Yang et al. 2025, Gated delta networks, 2412.06464
[7] Su et al. 2021, RoFormer, 2104.09864
[8] Dao, Gu 2024, Transformers are SSMs (Mamba-2), 2405.21060
[9] Grazzi et al. 2024, Unlocking state-tracking in linear RNNs through negative eigenvalues, 2411.12537
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Optional fast versions of the code below. Imported before torch, since support sets torch's threads.
from support import kernels, speedups
from support.checks import check_config, check_shapes, require

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

try:
    from huggingface_hub import PyTorchModelHubMixin as HubMixin  # from_pretrained, save_pretrained, push_to_hub
except ImportError:
    HubMixin = object


# ----------------------------------------------------------------------------------------------------------------------
# Plain linear attention, three times. Decay enters as three factors, with G_i = g_1 + ... + g_i over the text or chunk:
#
#     decay[i, j]       exp(G_i - G_j)    the fraction of what token j wrote that is left at token i >= j; 0 for j > i
#     since_start[i]    exp(G_i)          the fraction of the state before the first token that is left at token i
#     until_end[j]      decay[last, j]    the fraction of what token j wrote that is left at the last token
#
# Without decay all of these are 1, except that decay[i, j] = 0 for j > i. `decays`, below the forms, computes them.


def quadratic(q, k, v, g, S):
    """All pairs of tokens: y = (q k^T * decay) v, plus what each query still reads of the state S before them."""
    decay, since_start, until_end = decays(g)
    y = ((q @ k.mT) * decay) @ v + (q * since_start) @ S
    S = since_start[:, :, -1:] * S + (k * until_end).mT @ v
    return y, S


def recurrent(q, k, v, g, S):
    """The recurrence, token by token: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t."""
    ys = []
    for q_t, k_t, v_t, g_t in zip(*unbind(q, k, v, g)):
        S = g_t.exp()[..., None, None] * S + outer(k_t, v_t)
        ys.append(read(S, q_t))
    return torch.stack(ys, dim=2), S


def chunked(q, k, v, g, S, chunk_size):
    """Quadratic inside chunks, recurrent between them. T is a multiple of chunk_size.

    q, k and v may be bf16, in which case the products within a chunk are too. g, summed within a chunk, and S, summed
    over chunks, are fp32 or wider.
    """
    # 1. Cut time into N chunks: (B,H,T,.) becomes (B,H,N,C,.).
    q, k, v, g = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v, g))
    decay, since_start, until_end = decays(g)
    kept = since_start[..., -1:, :]                                   # (B,H,N,1,1), of S, which stays fp32
    decay, since_start, until_end = (x.to(q.dtype) for x in (decay, since_start, until_end))

    # 2. In each chunk: what its queries read from its own tokens, and what it adds to the state.
    inside = ((q @ k.mT) * decay) @ v                                 # (B,H,N,C,V)
    added = ((k * until_end).mT @ v).to(S.dtype)                      # (B,H,N,K,V)

    # 3. From chunk to chunk: the recurrence.
    starts = []
    for kept_n, added_n in zip(*unbind(kept, added)):
        starts.append(S)
        S = kept_n * S + added_n

    # 4. Each query also reads the state that its chunk started from.
    y = inside + (q * since_start) @ torch.stack(starts, dim=2).to(q.dtype)
    return y.flatten(2, 3), S


def decays(g):
    """The three factors above, of the L tokens of g (...,L): (...,L,L), (...,L,1), (...,L,1)."""
    # Where exp(g) is 0, or so small that it loses digits, the state is reset. Such a g is left out of the sums: added
    # in, it would swamp all later terms, or give inf - inf. Instead, tokens before a reset are masked, as future ones
    # are. The token of the reset itself writes after it, and stays.
    is_reset = g < math.log(torch.finfo(g.dtype).smallest_normal)
    # In float64: in fp32, large terms would cost small ones their digits.
    G = float64(g.masked_fill(is_reset, 0)).cumsum(-1)
    token = torch.arange(g.shape[-1], device=g.device)
    last_reset = torch.where(is_reset, token, -1).cummax(-1).values   # (...,L), -1 before the first
    i = token[:, None]
    j = token
    masked = (j > i) | (j < last_reset[..., None])
    # One exp of the difference: in exp(G_i) * exp(-G_j) the second factor overflows.
    log_decay = (G[..., :, None] - G[..., None, :]).to(g.dtype)
    # Mask before exp, which can overflow above the diagonal: inf * 0 is NaN.
    decay = log_decay.masked_fill(masked, -math.inf).exp()
    since_start = G.to(g.dtype).exp().masked_fill(last_reset >= 0, 0)
    until_end = decay[..., -1, :]
    return decay, since_start[..., None], until_end[..., None]


def outer(k, v):
    """k v^T: (...,K) and (...,V) -> (...,K,V)."""
    return k[..., :, None] * v[..., None, :]


def read(S, q):
    """S^T q: (...,K,V) and (...,K) -> (...,V)."""
    return (q[..., None, :] @ S)[..., 0, :]


def float64(x):
    """x in float64; in fp32 on a Mac's GPU, which has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def unbind(*xs):
    """Slices of each of xs along time or chunks, dim 2. (Each x[:, :, n] would have a gradient as large as x.)"""
    return (x.unbind(2) for x in xs)


# ----------------------------------------------------------------------------------------------------------------------
# The delta rule writes b (v - what S already returns for k): it corrects the state instead of adding to it. That is
#
#     S_t = (I - b k k^T) S' + b k v^T      with      S' = exp(g_t) S_{t-1}
#
# so along k the old content is scaled by 1 - b |k|^2. With |k| = 1, b = 1 replaces it, b = 0 keeps it, and b = 2 flips
# its sign; outside [0, 2] the state can diverge.


def delta_recurrent(q, k, v, g, b, S):
    """S_t = S' + k_t (b_t (v_t - S'^T k_t))^T, token by token [4, Eq. 24], with g [6, Eq. 10]."""
    ys = []
    for q_t, k_t, v_t, g_t, b_t in zip(*unbind(q, k, v, g, b)):
        S = g_t.exp()[..., None, None] * S
        error = v_t - read(S, k_t)
        S = S + outer(k_t, b_t[..., None] * error)
        ys.append(read(S, q_t))
    return torch.stack(ys, dim=2), S


def delta_chunked(q, k, v, g, b, S, chunk_size):
    """Like `chunked`, with u, what is actually written, in place of v. Token i of a chunk that starts from S writes

        u_i = b_i (v_i - exp(G_i) S^T k_i - sum_{j<i} decay_ij (k_i . k_j) u_j)

    since S' holds what is left of S and of the earlier writes. With the tokens of a chunk as rows, and
    A_ij = b_i decay_ij (k_i . k_j) for j < i, this is one triangular system, (I + A) u = b v - b exp(G) (k S). S is
    known only inside the loop over chunks, but u is affine in it, u = own - seen S, and both parts are solved before:

        own = (I + A)^-1 (b v)      and      seen = (I + A)^-1 (b exp(G) k)      [5, Eq. 8 to 10]
    """
    q, k, v, g, b = (x.unflatten(2, (-1, chunk_size)) for x in (q, k, v, g, b))
    decay, since_start, until_end = decays(g)
    b = b[..., None]                                                  # (B,H,N,C,1)

    A = (b * (k @ k.mT) * decay).tril(-1)                             # (B,H,N,C,C)
    right_sides = torch.cat([b * v, b * since_start * k], dim=-1)
    # unitriangular=True reads A as I + A.
    solved = torch.linalg.solve_triangular(A, right_sides, upper=False, unitriangular=True)
    own, seen = solved.split([v.shape[-1], k.shape[-1]], dim=-1)      # (B,H,N,C,V) and (B,H,N,C,K)

    k_end = (k * until_end).mT                                        # (B,H,N,K,C)
    kept = since_start[..., -1:, :]                                   # (B,H,N,1,1)
    starts = []
    writes = []
    for own_n, seen_n, k_end_n, kept_n in zip(*unbind(own, seen, k_end, kept)):
        u = own_n - seen_n @ S
        starts.append(S)
        writes.append(u)
        S = kept_n * S + k_end_n @ u

    inside = ((q @ k.mT) * decay) @ torch.stack(writes, dim=2)
    y = inside + (q * since_start) @ torch.stack(starts, dim=2)
    return y.flatten(2, 3), S


# ----------------------------------------------------------------------------------------------------------------------
# The public versions: optional arguments, checks, any T, sums in fp32


def linear_attention_quadratic(q, k, v, log_decay=None, beta=None, state=None):
    """Linear attention by its definition, all pairs of tokens: O(T^2). With beta, the delta rule as one chunk.

    Args:
      q, k: (B,H,T,K), after the feature map, any T >= 1.
      v: (B,H,T,V).
      log_decay: (B,H,T), at most 0; -inf resets the state.
      beta: (B,H,T), in [0, 2], for the delta rule, whose keys have length 1.
      state: (B,H,K,V), None for zeros.
    Returns: y (B,H,T,V) in q.dtype; the state after the last token (B,H,K,V), fp32 or wider. Pass it to the next call
      to continue the sequence: any split gives the same result.
    Raises: ValueError when shapes do not fit.
    """
    check_shapes(q, k, v, log_decay, beta, state)
    arguments = widened(q, k, v, log_decay, beta, state)
    with torch.autocast(q.device.type, enabled=False):
        if beta is None:
            y, S = quadratic(*arguments)
        else:
            y, S = delta_chunked(*arguments, chunk_size=q.shape[2])   # all pairs are one chunk of T tokens
    return y.to(q.dtype), S


def linear_attention_recurrent(q, k, v, log_decay=None, beta=None, state=None, *, overwrite=False):
    """Linear attention token by token: O(T), with a state of fixed size. A single token on a GPU runs in Triton.

    Arguments as for linear_attention_quadratic; overwrite allows that token to update the given state in place.
    """
    check_shapes(q, k, v, log_decay, beta, state)
    if kernels.takes_step(q, v):
        return kernels.linear_attention_step(q, k, v, log_decay, beta, state, overwrite)
    form = recurrent if beta is None else delta_recurrent
    with torch.autocast(q.device.type, enabled=False):
        y, S = form(*widened(q, k, v, log_decay, beta, state))
    return y.to(q.dtype), S


def linear_attention_chunked(q, k, v, log_decay=None, beta=None, state=None, *, chunk_size=64):
    """Linear attention in chunks of C = chunk_size tokens: O(T (C (K + V) + K V)), in Triton where that is available.

    Arguments as for linear_attention_quadratic.
    In Triton, products of bf16 inputs run in bf16, of fp16 inputs in tf32, which has their digits and more range, and
    of fp32 inputs as three tf32 products each (error 1e-6).
    """
    check_shapes(q, k, v, log_decay, beta, state, chunk_size)
    if kernels.available(q, v):
        return kernels.linear_attention(q, k, v, log_decay, beta, state, chunk_size)
    T = q.shape[2]
    chunk_size = min(chunk_size, T)
    *tokens, S = widened(q, k, v, log_decay, beta, state)
    if beta is None and speedups.multiplies_bf16(q):
        tokens[:3] = q, k, v                                          # as they are: `chunked` multiplies them in bf16
    tokens = [pad_time(x, -T % chunk_size) for x in tokens]
    with torch.autocast(q.device.type, enabled=False):
        if beta is None:
            y, S = chunked(*tokens, S, chunk_size)
        else:
            y, S = delta_chunked(*tokens, S, chunk_size)
    return y[:, :, :T].to(q.dtype), S


def linear_attention_bidirectional(q, k, v, log_decay=None, beta=None, state=None):
    """Every query reads the one sum over all keys, later ones too [1, Eq. 6]. Without an order there is no decay."""
    require(log_decay is None and beta is None, "without an order in time there is no decay and no delta rule")
    check_shapes(q, k, v, None, None, state)
    dtype = q.dtype
    q, k, v, _, S = widened(q, k, v, None, None, state)
    with torch.autocast(q.device.type, enabled=False):
        S = S + k.mT @ v
        y = q @ S
    return y.to(dtype), S


def widened(q, k, v, log_decay, beta, state):
    """[q, k, v, g, S], or with beta [q, k, v, g, b, S], in fp32 or wider: sums in bf16 stall at 256 + 1 = 256."""
    B, H, T, K = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if log_decay is None:
        log_decay = q.new_zeros(1, 1, T)                              # no decay: exp(0) = 1, broadcast over B and H
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1])
    tokens = [q, k, v, log_decay]
    if beta is not None:
        tokens.append(beta)
    return [x.to(wide) for x in (*tokens, state)]


def pad_time(x, count):
    """x (B,H,T) or (B,H,T,.) followed by `count` tokens of zeros: they write nothing, and nothing decays."""
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, count)) if count else x


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def rope_table(positions, width):
    """cos and sin, each (T,ceil(width/2)), of the angles positions * 10000^(-2i/width) [7, Eq. 15]."""
    even = float64(torch.arange(0, width, 2, device=positions.device))    # 2i
    frequency = 10000.0 ** (-even / width)
    angle = float64(positions)[:, None] * frequency                   # fp32: 0.06 rad off at 10^6
    return angle.cos(), angle.sin()


def rotate(x, table):
    """Turns each pair of features of x (B,H,T,d) by the angles of its position; returns x itself without a table.

    Unlike in [7], pairs are (i, i + d/2), not neighbours: the same up to a permutation of features.
    """
    if table is None:
        return x
    if speedups.multiplies_bf16(x):
        return speedups.rotate(x, *table)                             # the same, in bf16
    cos, sin = (part.to(torch.promote_types(x.dtype, torch.float32)) for part in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Feature maps phi: what stands in for the exp of a softmax


@dataclass(frozen=True)
class FeatureMap:
    """A feature map phi and its properties, by which a configuration is checked. Your own is one more entry of
    FEATURE_MAPS, chosen by feature_map=NAME."""

    phi: Callable                # (...,d) -> (...,K)
    positive: bool = False       # phi(q) . phi(k) >= 0 for all q and k: the sum normaliser may divide by it
    can_vanish: bool = False     # phi(q) . phi(k) can be 0 for every k: refused with rope, which would divide by 0
    unit: bool = False           # |phi(k)| = 1, which keeps the delta rule bounded
    rotate_first: bool = False   # rope turns q and k before phi, as in a softmax; needed where K != d

    def pairs(self, q, k, rope):
        """phi and rope of q, k (B,H,T,d): q, k for the numerator and q_den, k_den for the denominator.

        Rope turns features as it turns the q and k of a softmax: positions enter their product only through t - j, and
        S simply stores rotated keys. Turned features can have negative products, so only the numerator is turned, where
        a negative weight does no harm. With rotate_first phi comes last: a positive phi stays positive, and both pairs
        are the same tensors.
        """
        if self.rotate_first:
            q = self.features(rotate(q, rope))
            k = self.features(rotate(k, rope))
            return q, k, q, k
        q_den = self.features(q)
        k_den = self.features(k)
        return rotate(q_den, rope), rotate(k_den, rope), q_den, k_den

    def features(self, x):
        """phi, cast back: autocast returns fp32 from exp and norms, and the kernels would then multiply in fp32."""
        return self.phi(x).to(x.dtype)


def elu(x):
    """ELU(x) + 1 [1, Eq. 7]: x + 1, and exp(x) below 0. In bf16, F.elu(x) + 1 would round to 0 below -6."""
    if x.dtype.itemsize > 2:
        return F.elu(x) + 1
    if x.is_cpu:
        return speedups.EluPlusOne.apply(x)                           # the same, with a faster gradient
    return F.relu(x) + x.clamp(max=0).exp()


def silu_l2(x):
    """SiLU, then unit length [6, Sec. 3.4]."""
    return F.normalize(F.silu(x), dim=-1)


def taylor(x):
    """Features of the second-order Taylor expansion of exp(q.k / sqrt(d)) [2]: 1, d linear, d (d + 1) / 2 quadratic.

    The quadratic ones are x_i^2 / sqrt(2), and x_i x_j for i < j, which stands for both orders: two features in [2],
    each with 1 / sqrt(2). So there are 153 instead of 273 at d = 16, with the same products.
    """
    d = x.shape[-1]
    x = x * d ** -0.25
    i, j = torch.triu_indices(d, d, device=x.device)
    weight = (0.5 + 0.5 * (i != j).to(x.dtype)).sqrt()
    # x_i is picked by a product with one-hot columns. The gradient of x[..., i] would be a scatter, far slower.
    one_hot = torch.eye(d, dtype=x.dtype, device=x.device)
    squares = (x @ one_hot[:, i]) * (x @ one_hot[:, j]) * weight
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)


FEATURE_MAPS = {
    "elu": FeatureMap(elu, positive=True),
    "relu": FeatureMap(F.relu, positive=True, can_vanish=True),
    "identity": FeatureMap(lambda x: x),                              # [3]
    "silu_l2": FeatureMap(silu_l2, unit=True),                        # [5, 6]
    "taylor": FeatureMap(taylor, positive=True, rotate_first=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# The sum normaliser


def normalised(form, q, k, v, q_den, k_den, log_decay=None, state=None, **options):
    """Linear attention divided by the sum of its weights, as a softmax is [1, Eq. 12]:

        y_t = sum_{j<=t} (q_t . k_j) v_j / sum_{j<=t} (q_den_t . k_den_j)

    The denominator is what the same form returns when every value is 1. q_den and k_den are q and k, except where rope
    turns features: then they are the features before rope, and their sum stays positive. The weights of the numerator
    can be negative then, and need not sum to the denominator [7, Eq. 19].

    Args:
      form: a linear_attention_*; options are its own.
      q_den, k_den: shaped as q and k.
      state: (B,H,K,V+1), which is S (B,H,K,V) and Z (B,H,K,1), the state of the denominator.
    Returns: y (B,H,T,V) in q.dtype; the state after the last token.
    """
    check_shapes(q, k, v, log_decay, None, state, columns=v.shape[-1] + 1)
    if form is linear_attention_chunked and kernels.available(q, v):
        return kernels.normalised_linear_attention(q, k, v, q_den, k_den, log_decay, state, **options)
    if form is linear_attention_recurrent and kernels.takes_step(q, v):
        return kernels.normalised_linear_attention_step(q, k, v, q_den, k_den, log_decay, state, **options)
    # A form returns y in the dtype of q. The denominator must not be rounded, so its arguments are fp32.
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    V = v.shape[-1]
    ones = torch.ones_like(v[..., :1], dtype=wide)
    if q is q_den and k is k_den:                                     # both sums in one pass
        v = torch.cat([v.to(wide), ones], dim=-1)
        y, state = form(q.to(wide), k.to(wide), v, log_decay, state=state, **options)
        y, denominator = y.split([V, 1], dim=-1)
    else:
        S = Z = None
        if state is not None:
            S, Z = state.split([V, 1], dim=-1)
        y, S = form(q, k, v, log_decay, state=S, **options)
        denominator, Z = form(q_den.to(wide), k_den.to(wide), ones, log_decay, state=Z, **options)
        state = torch.cat([S, Z], dim=-1)
    y = y / (denominator + 1e-6)                                      # relu can make all weights 0
    return y.to(dtype), state


# ----------------------------------------------------------------------------------------------------------------------
# The configuration. The defaults are the base model; config/ holds the presets.


@dataclass
class ModelConfig:
    # The model
    vocab_size: int = 50257        # size of the vocabulary; train.py takes it from the dataset
    dim: int = 512                 # width of the model
    depth: int = 6                 # number of blocks
    n_heads: int = 8               # heads H of every mixer but conv, each dim / n_heads wide
    seq_len: int = 1024            # tokens T per training sequence; later texts can be longer, except with pos=learned
    mixers: str | list[str] = "linear"  # linear, window, softmax, conv; several with spaces between repeat over depth
    causal: bool = True            # False: every token sees the whole text (encoders; linear and softmax mixers only)
    pos: Literal["none", "learned", "sinusoidal", "rope"] = "rope"  # position encoding
    feature_map: str = "elu"       # linear: elu, relu, identity, silu_l2, taylor, or your own in FEATURE_MAPS
    feature_dim: int = 0           # linear: width of q and k per head, before the feature map; 0: dim / n_heads
    expand_v: float = 1.0          # linear: width of v per head, in units of dim / n_heads
    decay: Literal["none", "fixed", "gated"] = "none"  # linear: decay none, fixed per head, or gated by the token
    delta: bool = False            # linear: use the delta rule: write v minus what the state already returns for k
    beta_max: float = 1.0          # linear: largest beta of the delta rule; above 1 a write can flip signs in the state
    normaliser: Literal["sum", "rms"] = "sum"  # linear: divide by the sum of weights, or apply RMSNorm per head (rms)
    short_conv: bool = False       # all but conv: add a causal depthwise convolution over 4 tokens on q, k and v
    output_gate: bool = False      # linear: multiply the output by SiLU of a projection of the input
    chunk_size: int = 64           # linear: tokens C per chunk; it changes the result by rounding only
    window: int = 64               # window: tokens that each token sees, itself included
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm before each mixer and MLP, and at the end
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"  # kind of MLP in each block
    mlp_ratio: float = 4.0         # width of the MLP in units of dim (swiglu takes 2/3 of it); 0: no MLP
    tied: bool = True              # use the embedding as the output projection too
    dropout: float = 0.0           # dropout on the embedding and on every residual branch
    tokenizer: str = ""            # tokenizer of the ids, as name:hash; train.py takes it from the dataset

    def __post_init__(self):
        if isinstance(self.mixers, str):
            self.mixers = self.mixers.replace(",", " ").split()
        check_config(self, MIXERS, FEATURE_MAPS)

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def key_dim(self):
        """Width of q and k per head of the linear mixer, before the feature map."""
        return self.feature_dim or self.head_dim

    @property
    def value_dim(self):
        """Width of v per head of the linear mixer."""
        return round(self.expand_v * self.head_dim)


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: what lets tokens see each other


class Projection(nn.Linear):
    """x W^T, without a bias. Given several widths, W stacks one matrix per width; the Muon optimizer updates each."""

    def __init__(self, width_in, *parts):
        super().__init__(width_in, sum(parts), bias=False)
        self.parts = parts

    def forward(self, x):
        return speedups.project(x, self.weight)                       # F.linear(x, W), faster for few rows on a CPU


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in the dtype of the weight, which stays fp32 when the model decodes in bf16."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def split_heads(x, n_heads, widths):
    """x (B,T,sum of widths) -> one (B,H,T,width / H) for each width."""
    return (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in x.split(widths, dim=-1))


def merge_heads(y):
    """(B,H,T,V) -> (B,T,H V)."""
    return y.transpose(1, 2).flatten(2)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: y_t = sum_i weight_i x_{t-i}. Its state is the last size-1 inputs."""

    def __init__(self, channels, size):
        super().__init__()
        bound = size ** -0.5
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-bound, bound))

    def forward(self, x, state):                                      # x (B,T,channels)
        T = x.shape[1]
        past = len(self.weight) - 1
        if state is None:
            x = F.pad(x, (0, 0, past, 0))                             # (B,past+T,channels)
        else:
            x = torch.cat([state, x], dim=1)
        if x.is_cpu and T > 1:
            y = speedups.causal_conv(x, self.weight)                  # the sum below, in one pass
        else:
            y = sum(x[:, past - i:past - i + T] * weight for i, weight in enumerate(self.weight))
        return y.to(x.dtype), x[:, T:].clone()                        # a view would keep all of x alive


class LinearAttention(nn.Module):
    """Linear attention with the sum normaliser [1, 2].

    Its state is (None, S): S (B,H,K,V+1), with the denominator as its last column; None for no convolution.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.map = FEATURE_MAPS[config.feature_map]
        self.widths = [config.n_heads * width for width in (config.key_dim, config.key_dim, config.value_dim)]
        self.qkv = Projection(config.dim, *self.widths)
        self.out = Projection(self.widths[2], config.dim)

    def forward(self, x, state, ropes):                               # x (B,T,D)
        _, S = state or (None, None)
        q, k, v = split_heads(self.qkv(x), self.config.n_heads, self.widths)  # q and k still before phi
        # = self.attend(q, k, v, S, rope), with its activations recomputed in the backward pass, to save memory.
        y, S = speedups.checkpointed(self.attend, q, k, v, S, ropes.get(q.shape[-1]))
        return self.out(merge_heads(y)), (None, S)

    def attend(self, q, k, v, S, rope, log_decay=None):               # ExtendedLinearAttention gives a decay
        q, k, q_den, k_den = self.map.pairs(q, k, rope)
        form, options = self.choose_form(q)
        return normalised(form, q, k, v, q_den, k_den, log_decay, S, **options)

    def choose_form(self, q):
        """The form that suits q (B,H,T,K), and its options."""
        if not self.config.causal:
            return linear_attention_bidirectional, {}
        if q.shape[2] == 1:
            return linear_attention_recurrent, {"overwrite": speedups.overwriting}
        return linear_attention_chunked, {"chunk_size": self.config.chunk_size}


class ExtendedLinearAttention(LinearAttention):
    """LinearAttention with the options of later papers, in any combination.

    [3]: feature_map=identity, decay=fixed, normaliser=rms, output_gate.
    [5]: feature_map=silu_l2, delta, normaliser=rms, short_conv. [6]: as [5], with decay=gated and output_gate.
    Its state is (the last inputs of the convolution, S): S (B,H,K,V), or (B,H,K,V+1) with normaliser=sum.
    """

    def __init__(self, config):
        super().__init__(config)
        H = config.n_heads
        if config.short_conv:
            self.conv = CausalConv(sum(self.widths), 4)
        if config.output_gate:
            self.gate = Projection(config.dim, self.widths[2])
        if config.delta:
            self.beta = Projection(config.dim, H)
        if config.normaliser == "rms":
            self.norm = RMSNorm(config.value_dim)
        if config.decay == "gated":
            self.decay = Projection(config.dim, H)
            step = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.decay_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(bias) = step
            self.log_A = nn.Parameter(torch.empty(H).uniform_(0.01, 16).log())

    def forward(self, x, state, ropes):
        config = self.config
        conv_state, S = state or (None, None)
        qkv = self.qkv(x)
        if config.short_conv:
            qkv, conv_state = self.conv(qkv, conv_state)
        q, k, v = split_heads(qkv, config.n_heads, self.widths)
        if config.short_conv:
            v = F.silu(v)                                             # q and k get their nonlinearity from phi
        rope = ropes.get(q.shape[-1])
        y, S = speedups.checkpointed(self.attend, q, k, v, S, rope, self.log_decay(x), self.strength(x))
        if config.normaliser == "rms":
            y = self.norm(y)
        y = merge_heads(y)
        if config.output_gate:
            y = y * F.silu(self.gate(x))
        return self.out(y), (conv_state, S)

    def attend(self, q, k, v, S, rope, log_decay, beta):
        if self.config.normaliser == "sum":
            return super().attend(q, k, v, S, rope, log_decay)
        q, k, _, _ = self.map.pairs(q, k, rope)                       # no sum to divide by, and beta may be given
        form, options = self.choose_form(q)
        return form(q, k, v, log_decay, beta, S, **options)

    def log_decay(self, x):
        """(B,T,D) -> (B,H,T), or None. In fp32 or wider, since it will be summed over a chunk."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.config.decay == "fixed":                              # gamma = 1 - 2^(-5-h) [3, Eq. 8]
            h = torch.arange(self.config.n_heads, device=x.device, dtype=wide)
            log_gamma = torch.log1p(-2.0 ** (-5 - h))
            return log_gamma[:, None].expand(x.shape[0], -1, x.shape[1])
        if self.config.decay == "gated":                              # g = -exp(log_A) softplus(x W + bias) [6, 8]
            step = F.softplus(self.decay(x).to(wide) + self.decay_bias)
            return -(self.log_A.to(wide).exp() * step).transpose(1, 2)
        return None

    def strength(self, x):
        """The delta rule's beta: (B,T,D) -> (B,H,T), or None. Above 1, writes can flip signs, as parity needs [9]."""
        if not self.config.delta:
            return None
        return self.config.beta_max * self.beta(x).sigmoid().transpose(1, 2)


def linear_mixer(config):
    """LinearAttention, or where the configuration asks for more, ExtendedLinearAttention."""
    plain = (config.normaliser == "sum" and config.decay == "none"
             and not (config.delta or config.short_conv or config.output_gate))
    return LinearAttention(config) if plain else ExtendedLinearAttention(config)


def naive_softmax_attention(q, k, v, causal=True, window=None):
    """Softmax attention of q (B,H,T,d), the last T tokens, over k and v (B,H,past+T,d): all, or the last `window`."""
    length = k.shape[2]
    token = torch.arange(length, device=q.device)
    age = token[-q.shape[2]:, None] - token                           # (T,past+T), of each key for each query
    masked = (causal & (age < 0)) | (age >= (window or length))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(masked, -math.inf).softmax(-1) @ v


def softmax_attention(q, k, v, causal=True, window=None):
    """The same, by the fastest available kernel. The model calls this one."""
    if window is not None and k.shape[2] > window:
        return speedups.window_attention(q, k, v, window)
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return speedups.cached_attention(q, k, v)


class SoftmaxAttention(nn.Module):
    """The baseline: attends to all tokens in O(T^2); its state, all keys and values, grows with the text.

    With a window it attends to the last w tokens, in O(T w); its state is the last w - 1 keys and values.
    Its state is (the last inputs of the convolution or None, (k, v)).
    """

    def __init__(self, config, window=None):
        super().__init__()
        self.config = config
        self.window = window
        self.qkv = Projection(config.dim, config.dim, config.dim, config.dim)
        self.out = Projection(config.dim, config.dim)
        if config.short_conv:
            self.conv = CausalConv(3 * config.dim, 4)

    def forward(self, x, state, ropes):
        conv_state, past = state or (None, None)
        qkv = self.qkv(x)
        if self.config.short_conv:
            qkv, conv_state = self.conv(qkv, conv_state)
        q, k, v = split_heads(qkv, self.config.n_heads, [self.config.dim] * 3)
        rope = ropes.get(q.shape[-1])
        q, k = rotate(q, rope), rotate(k, rope)
        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k, k], dim=2)                         # (B,H,past+T,d)
            v = torch.cat([past_v, v], dim=2)
        y = softmax_attention(q, k, v, self.config.causal, self.window)
        if self.window is not None:
            first = max(0, k.shape[2] - self.window + 1)
            k, v = k[:, :, first:].clone(), v[:, :, first:].clone()
        return self.out(merge_heads(y)), (conv_state, (k, v))


class GatedConv(nn.Module):
    """Based's gated short convolution [2], (conv(x) + b) * (x W + c) + x, over 3 tokens. Its state is the last 2."""

    def __init__(self, config):
        super().__init__()
        self.conv = CausalConv(config.dim, 3)
        self.conv_bias = nn.Parameter(torch.empty(config.dim).uniform_(-3 ** -0.5, 3 ** -0.5))
        self.gate = nn.Linear(config.dim, config.dim)

    def forward(self, x, state, ropes):
        y, state = self.conv(x, state)
        return (y + self.conv_bias) * self.gate(x) + x, state


# A mixer is built as mixer(config) and called as mixer(x, state, ropes) -> (y, new state).
#   x, y: (B,T,D), any T >= 1. Any split of a text over calls must give what one call gives.
#   state: None at the start of a text, else what the last call returned: tensors on x.device with first dimension B, or
#     nested tuples, lists and dicts of them and None. On a GPU, decoding is recorded as a CUDA graph once the shapes
#     stay the same, so a mixer must not read numbers back from the device, as .item() does. A state with Python
#     numbers, which a graph would freeze, works as well, but is not recorded.
#   out: the name of its last projection, if it has one, which then starts with smaller weights, as in GPT-2.
#   ropes: {head width: rope_table}, empty unless pos=rope.
# Add yours here, or in a file of your own that every program which builds a model imports by --plugin=FILE:
# model.MIXERS["name"] = ...
MIXERS = {
    "linear": linear_mixer,
    "window": lambda config: SoftmaxAttention(config, config.window),
    "softmax": SoftmaxAttention,
    "conv": GatedConv,
}


# ----------------------------------------------------------------------------------------------------------------------
# Block and model


def swiglu(x):
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}
MLPS = {"gelu": F.gelu, "swiglu": swiglu, "relu2": lambda x: F.relu(x).square()}


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = MLPS[config.mlp]
        hidden = max(1, round(config.mlp_ratio * config.dim))
        inner = [hidden]
        if config.mlp == "swiglu":                                    # three matrices for the price of two
            hidden = max(8, round(hidden * 2 / 3 / 8) * 8)
            inner = [hidden, hidden]                                  # the gate, and what it multiplies
        self.up = Projection(config.dim, *inner)
        self.out = Projection(hidden, config.dim)

    def forward(self, x):
        return self.out(self.activation(self.up(x)))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, mixer):
        super().__init__()
        self.norm1 = NORMS[config.norm](config.dim)
        self.mixer = MIXERS[mixer](config)
        self.mlp = None
        if config.mlp_ratio:
            self.norm2 = NORMS[config.norm](config.dim)
            self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, state, ropes):
        y, state = self.mixer(self.norm1(x), state, ropes)
        x = x + F.dropout(y, self.dropout, self.training)
        if self.mlp is not None:
            y = self.mlp(self.norm2(x))
            x = x + F.dropout(y, self.dropout, self.training)
        return x, state


class LM(nn.Module, HubMixin):
    """The language model: embedding, blocks, a final norm, and the output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // 64) * 64                       # padded for the GPU's matrix units
        self.embed = nn.Embedding(rows, config.dim)
        if config.pos == "learned":
            self.embed_pos = nn.Embedding(config.seq_len, config.dim)
        pattern = (config.mixers * config.depth)[:config.depth]
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in pattern)
        self.norm = NORMS[config.norm](config.dim)
        self.unembed = Projection(config.dim, rows)
        self.softmax_loss = speedups.SoftmaxLoss()
        if config.tied:
            self.unembed.weight = self.embed.weight
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # As in GPT-2: smaller weights where 2 * depth layers add to the residual stream.
                std = 0.02 / (2 * config.depth) ** 0.5 if name.endswith(".out") else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, idx, targets=None, state=None):
        """Reads the tokens idx (B,T), each below vocab_size, after those that made state (None: a new text).

        Training, evaluation, prefill and single steps are this one call: any split of a text gives the same result.
        Args: targets (B,T), the token after each of idx; those below 0 do not count.
        Returns: without targets (logits (B,T,vocab_size), state); with them (loss, state), where loss is the mean
          cross-entropy in nats.
        Raises: ValueError for no tokens, targets of another shape, a state with causal=False, or a text longer than
          seq_len with pos=learned.
        """
        require(targets is None or targets.shape == idx.shape, "there must be one target for each token of idx")
        x, state = self.hidden(idx, state)
        if targets is None:
            return self.logits(x), state
        return self.loss(x, targets), state

    def hidden(self, idx, state=None):
        """The final norm's output, before the output projection: idx (B,T) -> (B,T,D), and the new state."""
        config = self.config
        T = idx.shape[1]
        require(T > 0, "there must be at least one token to read")
        require(state is None or config.causal, "causal=False needs the whole text at once: it cannot continue a state")
        if state is None:
            state = {"tokens": idx.new_zeros(()), "layers": [None] * config.depth}
        positions = state["tokens"] + torch.arange(T, device=idx.device)

        x = self.embed(idx)
        if config.pos in ("learned", "sinusoidal"):
            x = x + self.embed_positions(positions)
        x = F.dropout(x, config.dropout, self.training)
        ropes = {}
        if config.pos == "rope":
            ropes = {width: rope_table(positions, width) for width in {config.key_dim, config.head_dim}}
        layers = []
        for block, layer_state in zip(self.blocks, state["layers"]):
            x, layer_state = block(x, layer_state, ropes)
            layers.append(layer_state)
        return self.norm(x), {"tokens": state["tokens"] + T, "layers": layers}

    def embed_positions(self, positions):
        """What pos=learned and pos=sinusoidal add to the embedding: (T,) -> (T,D)."""
        config = self.config
        if config.pos == "learned":
            tokens = int(positions[-1]) + 1
            require(tokens <= config.seq_len, f"learned positions end at seq_len={config.seq_len}, and this text has "
                    f"{tokens} tokens: shorten it, or train with pos=rope or none")
            return self.embed_pos(positions)
        waves = torch.cat(rope_table(positions, config.dim), dim=-1)[:, :config.dim]
        return 0.02 * waves.to(self.embed.weight.dtype)               # the scale of a new embedding

    def logits(self, x):
        return self.unembed(x)[..., :self.config.vocab_size]

    def naive_loss(self, x, targets):
        """The definition: mean cross-entropy of hidden x (B,T,D) against targets (B,T). The model calls `loss`."""
        logits = self.logits(x).flatten(0, 1)
        targets = targets.flatten()
        return F.cross_entropy(logits.float(), targets.where(targets >= 0, -100))

    def loss(self, x, targets):
        """The same, without all (B T, vocab_size) logits in memory: they would be the largest tensor of a step."""
        return speedups.linear_cross_entropy(x.flatten(0, 1), self.unembed.weight, targets.flatten(),
                                             self.config.vocab_size, self.softmax_loss)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, state=None, piece=4096,
                 compiled=False):
        """Yields one token for each text of idx (B,T), max_new_tokens times. Memory grows only with softmax mixers.

        Linear mixers read the prompt, in pieces, by the chunked form, and each new token by the recurrent one.
        temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest; top_p < 1 the smallest set of the
        likeliest whose probabilities add up to top_p. compiled: use torch.compile for single tokens, which takes about
        a minute.
        Yields: (tokens (B,), the state before reading them). On a GPU the next step overwrites it: clone it to keep it.
        """
        def step(idx, state):
            logits, state = self.next_logits(idx, state)
            return choose(logits, temperature, top_k, top_p, generator), state

        if self.config.pos != "learned":                              # its length check reads a number from the device
            step = speedups.fast_step(step, generator, compiled)      # the same, compiled and as one CUDA graph
        *beginning, idx = idx.split(piece, dim=1)
        for part in beginning:
            _, state = self.hidden(part, state)
        for _ in range(max_new_tokens):
            token, state = step(idx, state)
            yield token, state
            idx = token[:, None]

    def next_logits(self, idx, state=None):
        """Reads idx (B,T) and predicts the next token alone: (logits (B,vocab_size), state)."""
        x, state = self.hidden(idx, state)
        return self.logits(x[:, -1]), state


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draws one token for each row of logits (B,vocab_size) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        likelier = p.cumsum(-1) - p                                   # the probability of all likelier tokens
        dropped = (likelier >= top_p) & (likelier > 0)                # the likeliest always stays
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    # With noise ~ Exp(1), argmax(p / noise) is each token with its probability p. That is how torch.multinomial draws a
    # token, but its checks wait for the GPU.
    p = logits.softmax(-1)
    noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise).argmax(-1)


def state_bytes(state):
    """Bytes of all tensors of a state."""
    return sum(x.nbytes for x in tree_leaves(state) if torch.is_tensor(x))
