"""What model.py refuses: a configuration that makes no model, arguments that do not fit each other.

Each is a ValueError with one sentence that says what is wrong and what to set.
"""
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from configurator import UserError


def require(condition, message):
    if not condition:
        raise ValueError(message)


def at_least(config, least, *names):
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{name} must be at least {least}, got {value}")


def check_shapes(q, k, v, log_decay, beta, state, chunk_size=1, columns=None):
    """The arguments of linear_attention_chunked, the state with V columns or as many as are said. The sentence names
    the one that does not fit q."""
    require(q.dim() == 4 and 0 not in q.shape, f"q must be (B,H,T,K), each at least 1, got {tuple(q.shape)}")
    require(chunk_size >= 1, f"chunk_size must be at least 1, got {chunk_size}")
    B, H, T, K = q.shape
    V = v.shape[-1]
    wanted = {"k": (k, (B, H, T, K)), "v": (v, (B, H, T, V)), "log_decay": (log_decay, (B, H, T)),
              "beta": (beta, (B, H, T)), "state": (state, (B, H, K, columns or V))}
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit q {tuple(q.shape)}, got {tuple(x.shape)}")


def check_config(config, mixers, feature_maps):
    """A ModelConfig, with the MIXERS and FEATURE_MAPS that there are."""
    check_choices(config)
    check_choice("feature_map", config.feature_map, feature_maps, " (one of your own needs --plugin=FILE)")
    at_least(config, 1, "vocab_size", "dim", "depth", "n_heads", "seq_len", "chunk_size", "window")
    at_least(config, 0, "feature_dim", "mlp_ratio", "dropout")
    require(config.dropout < 1, f"dropout must be below 1, got {config.dropout}")
    require(config.mixers and {*config.mixers} <= {*mixers},
            f"mixers must be a pattern of {', '.join(mixers)}, got {' '.join(config.mixers) or 'nothing'!r}"
            " (one of your own needs --plugin=FILE)")
    require(config.dim % config.n_heads == 0, f"dim={config.dim} must be a multiple of n_heads={config.n_heads}")
    require(0 < config.beta_max <= 2, f"beta_max must be above 0 and at most 2, got {config.beta_max}: above 2 the "
            "state of a delta rule diverges")
    require(config.value_dim >= 1, f"expand_v={config.expand_v} leaves v no width")
    if config.pos == "rope":
        widths = {config.key_dim if mixer == "linear" else config.head_dim
                  for mixer in config.mixers if mixer != "conv"}
        require(all(width % 2 == 0 for width in widths),
                f"pos=rope turns pairs of features, so heads must be an even number wide, not {sorted(widths)}")
    if "linear" in config.mixers:
        check_linear(config, feature_maps[config.feature_map])
    if not config.causal:
        check_without_order(config)


def check_choices(config):
    """The settings that have few values, for a config that was made in Python: those of a command line fit already."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            check_choice(name, getattr(config, name), get_args(kind))


def check_choice(name, value, legal, hint=""):
    require(value in legal, f"{name} must be {' or '.join(legal)}, got {value!r}{hint}")


def check_linear(config, feature_map):
    name = config.feature_map
    if config.normaliser == "sum":
        require(feature_map.positive, f"normaliser=sum divides by a sum that feature_map={name} can make zero or "
                "negative: use normaliser=rms, or feature_map elu or taylor")
        require(not (feature_map.can_vanish and config.pos == "rope"), f"feature_map={name} can make all weights zero, "
                "and pos=rope then leaves a numerator to divide by them: use pos=none, or feature_map=elu")
        require(not config.delta, "delta=True overwrites, so there is no sum to divide by: use normaliser=rms")
    if config.pos == "rope" and not feature_map.rotate_first:
        width = feature_map.phi(torch.zeros(1, config.key_dim)).shape[-1]
        require(width == config.key_dim, f"feature_map={name} makes {width} features of {config.key_dim}, and pos=rope "
                "turns them in the width of a head: give it rotate_first=True, or use pos=none")
    require(feature_map.unit or not config.delta,
            "delta=True diverges unless keys have length 1: use feature_map=silu_l2")


def check_without_order(config):
    """causal=False: every token sees all, so nothing may depend on which came first."""
    ordered = {"window", "conv"} & {*config.mixers} or config.short_conv
    if "linear" in config.mixers:
        ordered = ordered or config.delta or config.decay != "none"
    require(not ordered, "causal=False has no order in time: it needs plain linear or softmax mixers")


@torch.no_grad()
def check_mixers(model, plugin):
    """UserError where a mixer of the user's own breaks the contract beside model.MIXERS: a text read in two calls must
    give what it gives in one. Otherwise the mixer sees later tokens, and learns nothing else, or its state is too
    small.
    """
    tokens = min(12, model.config.seq_len)
    if not model.config.causal or tokens < 2:
        return
    device = model.embed.weight.device
    random = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (3, tokens), generator=random).to(device)
    training = model.training
    model.eval()
    try:
        whole, _ = model.hidden(idx)
        first, state = model.hidden(idx[:, :tokens // 2])
        rest, _ = model.hidden(idx[:, tokens // 2:], state)
    except (TypeError, ValueError) as error:
        if "unpack" not in str(error):
            raise
        raise UserError(f"{plugin}: a mixer must return two things, its output and its new state") from None
    finally:
        model.train(training)
    parts = torch.cat([first, rest], dim=1)
    if not torch.allclose(parts, whole, rtol=0, atol=1e-3 * float(whole.abs().max())):
        raise UserError(f"{plugin}: read in two calls, a text gives other results than in one: a mixer sees later "
                        "tokens, or its state does not hold all that it needs")
