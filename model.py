"""A linear-attention transformer language model: one operation in three forms, the mixers built on it, the model.

Attention without the softmax is a recurrence. Where softmax attention compares each query with every past key, linear
attention keeps one matrix S per head: a token adds k v^T to it, a query reads S^T q. Training costs O(T) instead of
O(T^2), and generating a million tokens costs the memory of generating one.

The letters, and what the papers call them. Sizes are capitals, and so are matrices and the vector G.
  B, T, H   batch, time, heads                           N, C   chunks, and tokens in a chunk (T = N C)
  d, K, V   width per head: of q and k before their feature map, of q and k after it, of v
  q, k, v   phi(Q_i), phi(K_i), V_i in [1, Eq. 4];  q_t, k_t, v_t in [3, 5, 6]
  S         the state, S_i in [1, Eq. 10], transposed in [5, 6];  its ones column is Z_i in [1, Eq. 11]
  b         write strength of the delta rule, beta_t in [4, 5, 6]
  g         log decay, log gamma in [3], log alpha_t in [6];  G its running sum inside a chunk
  D         what token i still sees of token j: exp(G_i - G_j) for i >= j, else 0 [3, Eq. 5]
  Y, Q, A, M  a chunk as a map of the state S it starts from: it reads Y + Q S, and leaves A S + M [5, Eq. 8, 9]

  [1] Katharopoulos et al. 2020, Transformers are RNNs, arXiv 2006.16236
  [2] Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, 2402.18668
  [3] Sun et al. 2023, Retentive network, 2307.08621
  [4] Schlag et al. 2021, Linear transformers are secretly fast weight programmers, 2102.11174
  [5] Yang et al. 2024, Parallelizing linear transformers with the delta rule over sequence length, 2406.06484
  [6] Yang et al. 2025, Gated delta networks, 2412.06464
  [7] Su et al. 2021, RoFormer, 2104.09864
  [8] Dao, Gu 2024, Transformers are SSMs (Mamba-2), 2405.21060
"""
import contextlib
import functools
import inspect
import math
from dataclasses import dataclass
from typing import Callable, Literal, NamedTuple, get_args, get_origin, get_type_hints

from support import kernels, speedups
from support.speedups import Projection, window_attention

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

try:
    from huggingface_hub import PyTorchModelHubMixin as Shared  # from_pretrained, save_pretrained, push_to_hub
except ImportError:
    Shared = object                                                               # the model without the sharing

# ----------------------------------------------------------------------------------------------------------------------
# Feature maps phi: what stands in for the softmax. Each works on the last dimension, any leading shape.


class FeatureMap(NamedTuple):
    phi: Callable                     # (..., d) -> (..., K)
    positive: bool = False            # phi(q).phi(k) >= 0 for all q, k: the sum normaliser may divide by it
    can_vanish: bool = False          # all of phi can be 0: then not with rope, whose numerator does not vanish with it
    unit: bool = False                # |phi(k)| = 1: the delta rule cannot overshoot
    kernel: Callable | None = None    # (q.k, d) -> phi(q).phi(k), where that is cheaper than expanding both


def elu(x):
    """ELU(x) + 1, that is x + 1, and exp(x) below 0 [1, Eq. 7]. Trap: ELU + 1 is 0 below -6 in bf16, -17 in fp32."""
    return F.elu(x) + 1 if x.dtype.itemsize > 2 else F.relu(x) + x.clamp(max=0).exp()


def silu_l2(x):
    """SiLU, then unit length [6, Sec. 3.4]."""
    return F.normalize(F.silu(x), dim=-1).to(x.dtype)                             # autocast on CUDA makes norms fp32


def taylor(x):
    """Second-order Taylor expansion of exp(q.k / sqrt(d)) [2]: d -> 1 + d + d (d + 1) / 2 features.

    Differs: x_i x_j and x_j x_i are one column, times sqrt(2); 153 columns instead of 273 at d = 16, same products.
    """
    d = x.shape[-1]
    x = x * d ** -0.25
    i, j = torch.triu_indices(d, d, device=x.device)
    weight = (0.5 + 0.5 * (i != j).to(x.dtype)).sqrt()
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], dim=-1)


FEATURE_MAPS = {
    "elu": FeatureMap(elu, positive=True),
    "relu": FeatureMap(F.relu, positive=True, can_vanish=True),
    "identity": FeatureMap(lambda x: x),                                          # [3]
    "silu_l2": FeatureMap(silu_l2, unit=True),
    "taylor": FeatureMap(taylor, positive=True, kernel=lambda s, d: 1 + s / d ** 0.5 + s * s / (2 * d)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Configuration. The defaults are the base model; config/ holds the presets.


def require(condition, message):
    if not condition:
        raise ValueError(message)


@dataclass
class ModelConfig:
    vocab_size: int = 50257        # token ids are below this; train.py takes it from the dataset
    dim: int = 512                 # model width
    depth: int = 6                 # number of blocks
    n_heads: int = 8               # heads H of every mixer; a head is dim / n_heads wide
    seq_len: int = 1024            # tokens T in a training sequence; a limit afterwards only with pos=learned
    mixers: str | list[str] = "linear"  # linear | window | softmax | conv, a pattern that repeats over the depth
    causal: bool = True            # False: every token sees all others (encoders; linear and softmax mixers only)
    pos: Literal["none", "learned", "sinusoidal", "rope"] = "rope"  # how positions enter
    feature_map: str = "elu"       # linear: elu | relu | identity | silu_l2 | taylor, or your own in FEATURE_MAPS
    feature_dim: int = 0           # linear: width of q and k per head before the feature map; 0 means dim / n_heads
    expand_v: float = 1.0          # linear: width of v per head, in units of dim / n_heads
    decay: Literal["none", "fixed", "gated"] = "none"  # linear: forget nothing, per head (RetNet), or as the data say
    delta: bool = False            # linear: delta rule, write v minus what the state already answers to k
    normaliser: Literal["sum", "rms"] = "sum"  # linear: divide by the sum of weights, or RMSNorm each head's output
    short_conv: bool = False       # linear: causal depthwise convolution over 4 tokens on q, k and v
    output_gate: bool = False      # linear: multiply the output by SiLU of a projection of the input
    chunk_size: int = 64           # linear: tokens C in a chunk; the result depends on it by rounding only
    window: int = 64               # window: tokens each token sees, itself included
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"  # the feed-forward half of a block
    mlp_ratio: float = 4.0         # its parameters, in units of 2 dim^2; 0 leaves it out
    tied: bool = True              # the output projection is the embedding
    dropout: float = 0.0           # on the embedding and on every residual branch
    tokenizer: str = ""            # whose ids the tokens are, name:hash; train.py takes it from the dataset

    def __post_init__(self):
        if isinstance(self.mixers, str):
            self.mixers = self.mixers.replace(",", " ").split()
        kinds = get_type_hints(type(self)) | {"feature_map": Literal[tuple(FEATURE_MAPS)]}
        for name, legal in [(name, get_args(kind)) for name, kind in kinds.items() if get_origin(kind) is Literal]:
            require(getattr(self, name) in legal, f"{name} must be {' or '.join(legal)}, got {getattr(self, name)!r}")
        at_least = dict.fromkeys(("vocab_size", "dim", "depth", "n_heads", "seq_len", "chunk_size", "window"), 1)
        for name, least in (at_least | dict(mlp_ratio=0, dropout=0, feature_dim=0)).items():
            require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")
        require(self.mixers and all(mixer in MIXERS for mixer in self.mixers),
                f"mixers must be a pattern of {', '.join(MIXERS)}, got {' '.join(self.mixers) or 'nothing'!r}")

        name, phi = self.feature_map, FEATURE_MAPS[self.feature_map]
        linear, rope = "linear" in self.mixers, self.pos == "rope"
        summed, delta = linear and self.normaliser == "sum", linear and self.delta
        ordered = {"window", "conv"} & {*self.mixers} or linear and (self.short_conv or delta or self.decay != "none")
        turned = {self.head_dim("k" if mixer == "linear" else "") for mixer in self.mixers if mixer != "conv"}
        for illegal, reason in (
            (self.dropout >= 1, f"dropout must be below 1, got {self.dropout}"),
            (self.dim % self.n_heads, f"dim={self.dim} must be a multiple of n_heads={self.n_heads}"),
            (self.head_dim("v") < 1, f"expand_v={self.expand_v} leaves v no width"),
            (rope and any(width % 2 for width in turned),
             f"pos=rope turns pairs of features, so heads must be an even number wide, not {sorted(turned)}"),
            (summed and not phi.positive, f"normaliser=sum divides by a sum that feature_map={name} can make zero or "
             "negative: take normaliser=rms, or feature_map elu, relu or taylor"),
            (summed and rope and phi.can_vanish, f"feature_map={name} can make all weights zero, and pos=rope then "
             "leaves a numerator to divide by them: take pos=none, or feature_map=elu"),
            (summed and delta, "delta=True overwrites, so there is no sum to divide by: take normaliser=rms"),
            (delta and not phi.unit, f"delta=True diverges unless keys have length 1: take feature_map=silu_l2"),
            (ordered and not self.causal, "causal=False has no order in time: it needs plain linear or softmax mixers"),
        ):
            require(not illegal, reason)

    def head_dim(self, which=""):
        """Width of one head: "k" and "v" of the linear mixer, otherwise of every other mixer."""
        width = self.dim // self.n_heads
        return {"k": self.feature_dim or width, "v": round(self.expand_v * width)}.get(which, width)


# ----------------------------------------------------------------------------------------------------------------------
# The one operation, three times: the definition, the recurrence, and the chunked form that training uses.
# They take the same arguments and return the same values and gradients (tests/test_model.py: 1e-10 in float64).


def _form(form):
    """The contract of every form, and what they share: checks, precision, and the sum normaliser.

        S'  = exp(g_t) S_{t-1}
        S_t = S' + k_t v_t^T                         plain [1, Eq. 18], with g [3, Eq. 6; 8]
        S_t = S' + k_t (b_t (v_t - S'^T k_t))^T      delta rule [4, Eq. 24; 6, Eq. 10], when beta is given
        y_t = S_t^T q_t

    Args: q, k (B,H,T,K) after the feature map; v (B,H,T,V); log_decay (B,H,T), <= 0; beta (B,H,T), in [0, 1];
      state (B,H,K,V), None for zeros. Any T >= 1.
      expand: a FeatureMap still to be applied to q and k, for maps with a kernel: scores come from kernel(q.k), and
      the features phi are formed only where a state needs them.
      divide_by: divides y by the sum of weights [1, Eq. 12]: True, of those that q and k make; (q', k'), shaped as q
      and k, of those that these make. The sum is one more column of v, of ones, so the state has V+1 columns.
    Returns: y (B,H,T,V) in q.dtype; the state after the last token (B,H,K,V), in fp32 or wider. Passing it on splits
      a sequence over calls without changing anything.
    Raises: ValueError when shapes do not fit, and for beta with divide_by: the delta rule makes no sum of weights.
    Trap: running sums of log decays of -1e4 leave fp32 three digits for what follows; the recurrence has no such sum.
    """
    @functools.wraps(form)
    def checked(q, k, v, log_decay=None, beta=None, state=None, *, expand=None, divide_by=False, **options):
        expand, V = expand or FEATURE_MAPS["identity"], v.shape[-1]
        shape = kernels.check_shapes(q, k, v, log_decay, beta, state, divide_by, expand, **options)
        # bf16 keeps 8 bits: adding 1 to 256 gives 256. Sums over time and states are fp32 or wider, whatever comes in.
        wide = torch.promote_types(q.dtype, torch.float32)
        state = q.new_zeros(shape, dtype=wide) if state is None else state

        def run(q, k, v, state):
            arguments = (x if x is None else x.to(wide) for x in (q, k, v, log_decay, beta, state))
            return form(*arguments, expand=expand, **options)
        with torch.autocast(q.device.type, enabled=False):
            if divide_by is False:
                y, state = run(q, k, v, state)
                return y.to(q.dtype), state
            ones = torch.ones_like(v[..., :1])
            if divide_by is True:                                                 # both sums in one pass
                y, state = run(q, k, torch.cat([v, ones], dim=-1), state)
                y, weights = y.split([V, 1], dim=-1)
            else:
                S, Z = state.split([V, 1], dim=-1)
                (y, S), (weights, Z) = run(q, k, v, S), run(*divide_by, ones, Z)
                state = torch.cat([S, Z], dim=-1)
            return (y / (weights + 1e-6)).to(q.dtype), state                      # relu can make all weights zero
    signature, own = inspect.signature(form), inspect.signature(checked, follow_wrapped=False).parameters
    checked.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own["divide_by"]])
    checked.__doc__ = f"{form.__doc__}\n\n    {_form.__doc__}"
    return checked


def _scores(q, k, D, expand):
    """(q k^T) D: phi(q_i).phi(k_j) as far as i sees j, for i >= j; D is None without decay."""
    scores = q @ k.mT if expand.kernel is None else expand.kernel(q @ k.mT, q.shape[-1])
    return scores.tril() if D is None else scores * D


def _chunk(q, k, v, log_decay, beta, expand):
    """A chunk of C tokens as a map of the state S it starts from: it reads Y + Q S, and leaves A S + M to the next.

    With P = (q k^T) D; q_start = exp(G) q and k_start = exp(G) k, decayed since the start; k_end = exp(G_C - G) k.
    Plain: Y = P v, Q = q_start, A = exp(G_C), M = k_end^T v.
    Delta rule: u - w S is written in place of v, (I + tril(b (k k^T) D, -1)) [u, w] = b [v, k_start] [5, Eq. 8 to 10];
    so Y = P u, Q = q_start - P w, A = exp(G_C) I - k_end^T w, M = k_end^T u.
    Returns: Y (...,C,V), Q (...,C,K), A (...,1,1) or with the delta rule (...,K,K), M (...,K,V).
    """
    phi_q, phi_k, D = expand.phi(q), expand.phi(k), None
    q_start, k_end, A = phi_q, phi_k, v.new_ones(*v.shape[:-2], 1, 1)
    if log_decay is not None:
        G = log_decay.cumsum(-1)                                                  # (...,C)
        future = torch.ones(2 * G.shape[-1:], dtype=torch.bool, device=G.device).triu(1)
        # Mask before exp, which overflows above the diagonal: inf * 0 is NaN in the gradient. For the same reason never
        # split it into exp(G_i) exp(-G_j).
        D = (G[..., :, None] - G[..., None, :]).masked_fill(future, -math.inf).exp()
        since_start, until_end = G.exp()[..., None], (G[..., -1:] - G).exp()[..., None]
        q_start, k_end, A = phi_q * since_start, phi_k * until_end, G[..., -1, None, None].exp()

    P = _scores(q, k, D, expand)
    if beta is None:
        return P @ v, q_start, A, k_end.mT @ v
    b, K, V = beta[..., None], phi_k.shape[-1], v.shape[-1]
    k_start = phi_k if log_decay is None else phi_k * since_start
    earlier = (b * _scores(k, k, D, expand)).tril(-1)
    both = torch.linalg.solve_triangular(earlier, b * torch.cat([v, k_start], dim=-1), upper=False, unitriangular=True)
    u, w = both.split([V, K], dim=-1)
    return P @ u, q_start - P @ w, A * torch.eye(K, dtype=w.dtype, device=w.device) - k_end.mT @ w, k_end.mT @ u


@_form
def linear_attention_quadratic(q, k, v, log_decay=None, beta=None, state=None, *, expand=None):
    """All pairs of tokens as one chunk: plain, y = ((q k^T) D) v + exp(G) q S_0. The definition, in O(T^2)."""
    Y, Q, A, M = _chunk(q, k, v, log_decay, beta, expand)
    return Y + Q @ state, (A * state if beta is None else A @ state) + M


@_form
def linear_attention_recurrent(q, k, v, log_decay=None, beta=None, state=None, *, expand=None):
    """One token after the other, as _form states it: O(T) with a state of fixed size. This is how text is generated."""
    q, k = expand.phi(q), expand.phi(k)
    ys = []
    for t in range(q.shape[2]):
        key, write = k[:, :, t, :, None], v[:, :, t, None, :]                     # (B,H,K,1) (B,H,1,V)
        if log_decay is not None:
            state = log_decay[:, :, t, None, None].exp() * state
        if beta is not None:
            write = beta[:, :, t, None, None] * (write - key.mT @ state)
        state = state + key * write
        ys.append(q[:, :, t, None, :] @ state)                                    # (B,H,1,V)
    return torch.cat(ys, dim=2), state


@_form
def linear_attention_chunked(q, k, v, log_decay=None, beta=None, state=None, *, expand=None, chunk_size=64):
    """Quadratic inside chunks of C tokens, recurrent between them: O(T C) work in matrix products [5, Eq. 8, 9]."""
    T, C = q.shape[2], min(chunk_size, q.shape[2])

    # 1. Cut time into N chunks. Zeros fill up the last one: a zero value (and a zero beta) writes nothing.
    def chunks(x):
        return None if x is None else F.pad(x, (0, 0) * (x.dim() - 3) + (0, -T % C)).unflatten(2, (-1, C))
    Y, Q, A, M = _chunk(*map(chunks, (q, k, v, log_decay, beta)), expand)         # (B,H,N,...)

    # 2. The recurrence again, one step per chunk. Unbound, since each A[:, :, n] would have a gradient as large as A.
    starts = []                                                                   # N of (B,H,K,V)
    for move, write in zip(A.unbind(2), M.unbind(2)):
        starts.append(state)
        state = (move * state if beta is None else move @ state) + write

    # 3. Each query reads its chunk up to itself, and what came before the chunk.
    y = Y + Q @ torch.stack(starts, dim=2)                                        # (B,H,N,C,V)
    return y.flatten(2, 3)[:, :, :T], state


@_form
def linear_attention_bidirectional(q, k, v, log_decay=None, beta=None, state=None, *, expand=None):
    """causal=False: every query reads the one sum over all keys [1, Eq. 6]. There is no order, so no decay or delta."""
    require(log_decay is None and beta is None, "without an order in time there is no decay and no delta rule")
    state = state + expand.phi(k).mT @ v
    return expand.phi(q) @ state, state


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def rope_table(positions, width):
    """cos and sin (T, width/2) of the angles positions * 10000^(-2i/width) [7, Eq. 15]."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64     # fp32: 0.06 off at a million
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device, dtype=wide) / width)
    angle = positions.to(wide)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, table):
    """Turns each pair of features of x (B,H,T,d) by its position's angles; table None leaves x as it is.

    Differs from [7]: pairs are (i, i + d/2) instead of neighbours, the same up to a permutation of features.
    """
    if table is None:
        return x
    cos, sin = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Mixers: what lets tokens see each other. Each is called as mixer(x, state, ropes): x (B,T,dim); its state, None at the
# start of a text; and the rope table of each head width. It returns its output (B,T,dim) and its new state.


def by_heads(x, n_heads, widths):
    """x (B,T,sum of widths) -> one (B,H,T,width / H) for each width."""
    return (part.unflatten(-1, (n_heads, -1)).transpose(1, 2) for part in x.split(widths, dim=-1))


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: y_t = sum_i weight_i x_{t-i}. Its state is the last size-1 inputs."""

    def __init__(self, channels, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-size ** -0.5, size ** -0.5))

    def forward(self, x, state):                                                  # (B,T,channels)
        T, past = x.shape[1], len(self.weight) - 1
        x = F.pad(x, (0, 0, past, 0)) if state is None else torch.cat([state, x], dim=1)
        y = sum(x[:, past - i:past - i + T] * weight for i, weight in enumerate(self.weight))
        return y.to(x.dtype), x[:, T:].clone()                                    # a view would keep all of x alive


class Linear(nn.Module):
    """Linear attention: projections, a feature map, one call to a form, a normaliser, the output projection.

    Covers [1] (elu, sum), [2] (taylor, sum), [3] (identity, fixed decay, rms, gate), [5] (silu_l2, delta, rms, conv)
    and [6] (the same, gated). Its state has a fixed size: S (B,H,K,V), with a ones column of V for the sum normaliser,
    and the inputs that the convolution still needs.
    Differs: with rope and the sum normaliser only the numerator is rotated, as in [7, Eq. 19]: rotated features can
    be negative, and their sum zero. Maps with a kernel (taylor) are functions of q.k and take rotated q and k whole.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.map, dim, H = config, FEATURE_MAPS[config.feature_map], config.dim, config.n_heads
        self.expand = self.map if self.map.kernel else None                       # after rope, by the form; elu before
        self.widths = [H * config.head_dim(which) for which in ("k", "k", "v")]   # of q, k and v, all heads together
        self.qkv = Projection(dim, sum(self.widths))
        self.out = Projection(self.widths[2], dim)
        if config.short_conv:
            self.conv = CausalConv(sum(self.widths), 4)
        if config.output_gate:
            self.gate = Projection(dim, self.widths[2])
        if config.delta:
            self.beta = Projection(dim, H)
        if config.normaliser == "rms":
            self.norm = nn.RMSNorm(config.head_dim("v"), eps=1e-6)
        if config.decay == "gated":                                               # g = -A softplus(x W + bias) [8]
            self.decay = Projection(dim, H)
            step = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)).exp()  # what softplus(bias) starts as
            self.decay_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
            self.log_A = nn.Parameter(torch.empty(H).uniform_(1, 16).log())

    def forward(self, x, state, ropes):
        config, (conv_state, S) = self.config, state or (None, None)
        qkv = self.qkv(x)
        if config.short_conv:
            qkv, conv_state = self.conv(qkv, conv_state)
        q, k, v = by_heads(qkv, config.n_heads, self.widths)
        v = F.silu(v) if config.short_conv else v                                 # as [5, 6]; q and k get their map
        beta = self.beta(x).sigmoid().transpose(1, 2) if config.delta else None   # (B,H,T)
        y, S = self.attend(self.form(q, v), q, k, v, self.log_decay(x), beta, S, ropes.get(q.shape[-1]))
        if config.normaliser == "rms":
            y = self.norm(y.to(self.norm.weight.dtype))
        y = y.transpose(1, 2).flatten(2)                                          # (B,T,H V)
        if config.output_gate:
            y = y * F.silu(self.gate(x))
        return self.out(y), (conv_state, S)

    def form(self, q, v):
        """The fastest form for these. On a GPU, the chunked one again, in Triton."""
        if not self.config.causal:
            return linear_attention_bidirectional
        if q.shape[2] == 1:
            return linear_attention_recurrent
        if kernels.available(q, v, self.expand):
            return kernels.linear_attention_triton
        return functools.partial(linear_attention_chunked, chunk_size=self.config.chunk_size)

    def log_decay(self, x):                                                       # (B,T,dim) -> (B,H,T)
        """In fp32 or wider: bf16 can't tell decays near 1 from 1. Only x W is autocast's, as in the code of [6, 8]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.config.decay == "fixed":                                          # gamma = 1 - 2^(-5-h) [3, Eq. 8]
            h = torch.arange(self.config.n_heads, device=x.device, dtype=wide)
            return torch.log1p(-2.0 ** (-5 - h))[:, None].expand(x.shape[0], -1, x.shape[1])
        if self.config.decay == "gated":
            step = F.softplus(self.decay(x).to(wide) + self.decay_bias)
            return -(self.log_A.to(wide).exp() * step).transpose(1, 2)
        return None

    @speedups.checkpointed
    def attend(self, form, q, k, v, log_decay, beta, S, rope):
        """The feature map, the rotation, and one form with or without the sum normaliser."""
        if self.expand is None:
            q, k = self.map.phi(q), self.map.phi(k)
        turned = (rotate(q, rope), rotate(k, rope))
        divide_by = False if self.config.normaliser == "rms" else True if self.expand or rope is None else (q, k)
        return form(*turned, v, log_decay, beta, S, expand=self.expand, divide_by=divide_by)


def softmax_attention(q, k, v, causal=True, window=None):
    """Softmax attention of q (B,H,T,d), the last T tokens of k and v (B,H,past+T,d), over all or the last `window`."""
    T, tokens = q.shape[2], k.shape[2]
    if window is not None and tokens > window:
        return window_attention(q, k, v, window, tokens - T)
    if T == tokens:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    mask = torch.ones(T, tokens, dtype=torch.bool, device=q.device).tril(tokens - T) if T > 1 else None
    # On a GPU cuDNN would plan each new length for 60 ms; on a CPU the choice itself costs a sixth of a small step.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Softmax(nn.Module):
    """Softmax attention: over all tokens the baseline, with O(T^2) time and a state, all keys and values, that grows.

    With a window, over the last w tokens, exactly: O(T w) time, and a state of the last w - 1 keys and values. A ring
    buffer holds the same, but this is in order and never overwritten: one state can go on in several ways.
    """

    def __init__(self, config, window=None):
        super().__init__()
        self.config, self.window = config, window
        self.qkv = Projection(config.dim, 3 * config.dim)
        self.out = Projection(config.dim, config.dim)

    def forward(self, x, state, ropes):
        q, k, v = by_heads(self.qkv(x), self.config.n_heads, [self.config.dim] * 3)
        q, k = (rotate(part, ropes.get(q.shape[-1])) for part in (q, k))
        if state is not None:
            k, v = (torch.cat(parts, dim=2) for parts in zip(state, (k, v)))      # (B,H,past+T,d)
        y, tokens = softmax_attention(q, k, v, self.config.causal, self.window), k.shape[2]
        if self.window is not None:
            k, v = (part[:, :, max(0, tokens - self.window + 1):].clone() for part in (k, v))
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Conv(nn.Module):
    """Based's gated short convolution [2], without biases: out(gate * SiLU(conv(x'))) over 3 tokens. Its state is 2."""

    def __init__(self, config):
        super().__init__()
        self.both = Projection(config.dim, 2 * config.dim)
        self.conv = CausalConv(config.dim, 3)
        self.out = Projection(config.dim, config.dim)

    def forward(self, x, state, ropes):
        gate, x = self.both(x).chunk(2, dim=-1)
        x, state = self.conv(x, state)
        return self.out(gate * F.silu(x)), state


MIXERS = {"linear": Linear, "window": lambda config: Softmax(config, config.window), "softmax": Softmax, "conv": Conv}


# ----------------------------------------------------------------------------------------------------------------------
# Block and model


def swiglu(x):
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


NORMS = {"rms": functools.partial(nn.RMSNorm, eps=1e-6), "layer": nn.LayerNorm}
MLPS = {"gelu": F.gelu, "swiglu": swiglu, "relu2": lambda x: F.relu(x).square()}


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation, hidden, inner = MLPS[config.mlp], max(1, round(config.mlp_ratio * config.dim)), 1
        if config.mlp == "swiglu":                                                # three matrices for the price of two
            hidden, inner = max(8, round(hidden * 2 / 3 / 8) * 8), 2
        self.up = Projection(config.dim, hidden * inner)
        self.out = Projection(hidden, config.dim)

    def forward(self, x):
        return self.out(self.activation(self.up(x)))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, mixer):
        super().__init__()
        self.norm1, self.mixer = NORMS[config.norm](config.dim), MIXERS[mixer](config)
        self.norm2, self.mlp = (NORMS[config.norm](config.dim), MLP(config)) if config.mlp_ratio else (None, None)
        self.dropout = config.dropout

    def forward(self, x, state, ropes):
        y, state = self.mixer(self.norm1(x), state, ropes)
        x = x + F.dropout(y, self.dropout, self.training)
        if self.mlp is not None:
            x = x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)
        return x, state


class LM(nn.Module, Shared):
    """The language model: embedding, blocks, a final norm, and the output projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // 64) * 64                                   # whole tiles for the matrix units
        self.embed = nn.Embedding(rows, config.dim)
        if config.pos == "learned":
            self.embed_pos = nn.Embedding(config.seq_len, config.dim)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in (config.mixers * config.depth)[:config.depth])
        self.norm = NORMS[config.norm](config.dim)
        self.softmax_loss = speedups.softmax_loss                                  # machine.py compiles it
        self.unembed = Projection(config.dim, rows)
        if config.tied:
            self.unembed.weight = self.embed.weight
        for name, module in self.named_modules():                                 # as GPT-2: 2 depth outputs add up
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 / (2 * config.depth) ** 0.5 if name.endswith(".out") else 0.02)

    def forward(self, idx, targets=None, state=None):
        """Reads the tokens idx (B,T), each below vocab_size, after those that made state (None: a new text).

        Training, evaluation, prefill and single steps are this one call: any split of a text gives the same result.
        Returns: (logits (B,T,vocab_size), state), or with targets (B,T) (mean cross-entropy in nats where >= 0, state).
        Raises: ValueError for no tokens, targets of another shape, a state with causal=False, or no learned position.
        """
        require(targets is None or targets.shape == idx.shape, "there must be one target for each token of idx")
        x, state = self.hidden(idx, state)
        if targets is None:
            return self.logits(x), state
        return speedups.linear_cross_entropy(x.flatten(0, 1), self.unembed.weight, targets.flatten(),
                                            self.config.vocab_size, self.softmax_loss), state

    def hidden(self, idx, state=None):
        """The final norm's output, before the output projection: idx (B,T) -> (B,T,dim), and the new state."""
        config, T = self.config, idx.shape[1]
        require(state is None or config.causal, "causal=False reads a text whole: there is no state to go on from")
        require(T > 0, "there must be at least one token to read")
        state = state or {"tokens": idx.new_zeros(()), "layers": [None] * config.depth}
        past, layers = state["tokens"], [*state["layers"]]
        positions = past + torch.arange(T, device=idx.device)
        x = self.embed(idx)
        if config.pos == "learned":
            require(int(past) + T <= config.seq_len, f"learned positions end at seq_len={config.seq_len}, and this "
                    f"text has {int(past) + T} tokens: shorten it, or train with pos=rope or none")
            x = x + self.embed_pos(positions)
        if config.pos == "sinusoidal":                                            # at 1 it would drown x in the norms
            x = x + 0.02 * torch.cat(rope_table(positions, config.dim), dim=-1)[:, :config.dim].to(x.dtype)
        x = F.dropout(x, config.dropout, self.training)
        turned = {config.head_dim("k"), config.head_dim()} if config.pos == "rope" else ()
        ropes = {width: rope_table(positions, width) for width in turned}
        for i, block in enumerate(self.blocks):
            x, layers[i] = block(x, layers[i], ropes)
        return self.norm(x), {"tokens": past + T, "layers": layers}

    def logits(self, x):
        return self.unembed(x)[..., :self.config.vocab_size]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1, top_k=0, top_p=1.0, generator=None, state=None, piece=4096):
        """Yields one token for each text of idx (B,T), max_new_tokens times. Memory grows only where mixers=softmax.

        The prompt is read in pieces through the chunked form, then every token through the recurrent one, on a GPU as a
        CUDA graph. temperature 0 takes the likeliest token; top_k > 0 keeps the k likeliest; top_p < 1 the fewest that
        hold p. Yields: (tokens (B,), the state before them, which the next token may overwrite).
        """
        def read(idx, state):
            x, state = self.hidden(idx, state)
            return self.logits(x[:, -1]), state
        step = speedups.recorded(read) if idx.is_cuda and self.config.pos != "learned" else read
        for _ in range(max_new_tokens):
            for part in idx.split(piece, dim=1):
                logits, state = step(part, state)
            token = choose(logits, temperature, top_k, top_p, generator)
            yield token, state
            idx = token[:, None]


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draws one token for each row of logits (B,vocab) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        logits = logits.scatter(1, order, logits.gather(1, order).masked_fill(p.cumsum(-1) - p >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def state_bytes(state):
    """Bytes of all tensors in a nested state."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(state) if torch.is_tensor(x))
