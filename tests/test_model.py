"""Claims about model.py: the three forms are one operation, any split of a text gives the same result, the mixers are
the published ones (written out here as slow loops, with equation numbers), and nothing large is ever in memory.

References as in model.py: [1] Transformers are RNNs, [2] Based, [3] RetNet, [6] Gated DeltaNet, [7] RoFormer.
"""
import cmath
import dataclasses
import functools
import itertools
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from configurator import read_config_file
from model import (FEATURE_MAPS, LM, ModelConfig, choose, naive_softmax_attention, normalised, rope_table, rotate,
                   softmax_attention)
from support import speedups


def chunked(size):
    return lambda *args, **options: model.linear_attention_chunked(*args, chunk_size=size, **options)


FORMS = {"quadratic": model.linear_attention_quadratic, "recurrent": model.linear_attention_recurrent,
         "chunked by 7": chunked(7), "chunked by 64": chunked(64), "chunked by 1000": chunked(1000)}
RULES = ["plain", "decay", "delta", "decay delta"]
TAYLOR = FEATURE_MAPS["taylor"]


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                     # for tensors this small, also faster
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def operands(T, rule="plain", state=True, K=4, V=3, B=2, H=2, dtype=torch.float64):
    """Random arguments of a form, by name; keys have unit length where the delta rule needs it."""
    x = {"q": torch.randn(B, H, T, K), "k": torch.randn(B, H, T, K), "v": torch.randn(B, H, T, V)}
    if "decay" in rule:
        x["log_decay"] = -torch.rand(B, H, T)
    if "delta" in rule:
        x["k"], x["beta"] = F.normalize(x["k"], dim=-1), torch.rand(B, H, T)
    if state:
        x["state"] = torch.randn(B, H, K, V)
    return {name: value.to(dtype).requires_grad_() for name, value in x.items()}


def close(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# The forms


def by_hand(q, k, v, log_decay=None, beta=None, state=None):
    """Section 3 of the design, token by token, one (batch, head) at a time."""
    y, S = torch.zeros_like(v), torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state.clone()
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        key, write = k[b, h, t], v[b, h, t]
        if log_decay is not None:
            S[b, h] *= math.exp(log_decay[b, h, t])
        if beta is not None:
            write = beta[b, h, t] * (write - S[b, h].T @ key)
        S[b, h] += torch.outer(key, write)
        y[b, h, t] = S[b, h].T @ q[b, h, t]
    return y, S


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
def test_every_form_is_the_recurrence_written_by_hand(rule, state, float64):
    x = {name: value.detach() for name, value in operands(11, rule, state).items()}
    wanted = by_hand(**x)
    for form in [*FORMS.values(), chunked(1), chunked(10), chunked(11)]:
        close(form(**x), wanted, 1e-12)


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 127, 200])
def test_quadratic_recurrent_and_chunked_agree_in_values_state_and_all_gradients(T, rule, state):
    x = operands(T, rule, state, B=1)
    results = {name: values_and_gradients(form, x) for name, form in FORMS.items()}
    for result in results.values():
        close(result, results["recurrent"], 1e-10)


def values_and_gradients(form, x):
    y, S = form(**x)
    weigh = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, S, *torch.autograd.grad((y * weigh).sum() + S.square().sum(), list(x.values()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["quadratic", "recurrent", "chunked by 7"])
def test_gradients_are_the_slopes(form, rule):
    x = operands(9, rule, K=2, V=2, B=1, H=1)
    assert torch.autograd.gradcheck(lambda *xs: FORMS[form](**dict(zip(x, xs))), tuple(x.values()))


@pytest.mark.parametrize("others", [False, True], ids=["own weights", "other weights"])
@pytest.mark.parametrize("form", ["recurrent", "chunked by 7", "bidirectional"])
def test_gradients_of_the_sum_normaliser_are_the_slopes(form, others):
    form = FORMS.get(form, model.linear_attention_bidirectional)
    q, k, v, q2, k2 = (torch.rand(1, 1, 9, 2, dtype=torch.float64, requires_grad=True) for _ in range(5))
    assert torch.autograd.gradcheck(
        lambda q, k, v, q2, k2: normalised(form, q, k, v, *((q2, k2) if others else (q, k))), (q, k, v, q2, k2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_any_split_over_calls_equals_one_call(form, rule):
    x = operands(130, rule, K=3)
    wanted, wanted_state = FORMS[form](**x)
    for lengths in ([1, 129], [129, 1], [64, 66], [1, 1, 63, 2, 63]):
        ys, state = [], x["state"]
        parts = {name: value.split(lengths, dim=2) for name, value in x.items() if name != "state"}
        for i in range(len(lengths)):
            y, state = FORMS[form](**{name: part[i] for name, part in parts.items()}, state=state)
            ys.append(y)
        close((torch.cat(ys, dim=2), state), (wanted, wanted_state), 1e-10)


@pytest.mark.parametrize("reset", [-math.inf, -1e30, -1e4, -104.0, -90.0, -86.0, -50.0])
@pytest.mark.parametrize("rule", ["decay", "decay delta"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decay_that_leaves_nothing_is_a_reset_and_costs_its_neighbours_no_digits(form, rule, reset):
    x = operands(200, rule, dtype=torch.float32)
    steps = torch.tensor([reset, -0.1, 0.0, -1e-6, -3.0, -0.5])
    x["log_decay"] = steps[torch.randint(6, (2, 2, 200))].requires_grad_()
    y, S = FORMS[form](**x)
    for gradient in torch.autograd.grad(y.sum() + S.sum(), list(x.values())):
        assert gradient.isfinite().all()
    exact = {name: value.detach().double() for name, value in x.items()}
    wanted, wanted_state = model.linear_attention_recurrent(**exact)
    close(y.double(), wanted, 3e-6)
    close(S.double(), wanted_state, 3e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_before_a_reset_is_forgotten_exactly(form):
    x = {name: value.detach() for name, value in operands(100, "decay").items()}
    x["log_decay"][:, :, 37] = -math.inf
    alone, S = FORMS[form](**{name: value[:, :, 37:] for name, value in x.items() if name != "state"})
    y, state = FORMS[form](**x)
    close((y[:, :, 37:], state), (alone, S), 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_within_one_percent_of_fp32_at_2048_tokens(form, rule):
    x = operands(2048, rule, B=1, H=1, K=16, V=16, dtype=torch.bfloat16)
    x = {name: value.detach() for name, value in x.items()}
    y, S = FORMS[form](**x)
    wanted, wanted_state = FORMS["chunked by 64"](**{name: value.float() for name, value in x.items()})
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert (y - wanted).norm() < 0.01 * wanted.norm()
    assert (S - wanted_state).norm() < 0.01 * wanted_state.norm()


@pytest.mark.parametrize("T", [65, 200, 2000])
@pytest.mark.parametrize("normaliser", [False, True], ids=["", "normaliser"])
@pytest.mark.parametrize("rule", ["plain", "decay"])
def test_products_in_bf16_are_as_exact_as_the_kernels(rule, normaliser, T, monkeypatch):
    """Within 6e-3 of float64, as tests/test_support_kernels.py asks: values, state and gradients."""
    monkeypatch.setattr(speedups, "BF16_UNITS", True)
    x = operands(T, rule, B=1, K=32, V=32)
    form, exact = model.linear_attention_chunked, model.linear_attention_quadratic
    if normaliser:
        x |= {name: torch.rand_like(x["q"]) for name in ("q_den", "k_den")}
        x["state"] = torch.rand(*x["state"].shape[:3], x["v"].shape[-1] + 1)
        form, exact = (functools.partial(model.normalised, each) for each in (form, exact))
    x = {name: value.bfloat16().detach().requires_grad_() for name, value in x.items()}
    for name in {"log_decay", "state"} & {*x}:
        x[name] = x[name].detach().float().requires_grad_()
    results = values_and_gradients(form, x)
    wanted = values_and_gradients(exact, {name: value.detach().double().requires_grad_() for name, value in x.items()})
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    for got, exact in zip(results, wanted):
        assert (got.double() - exact).norm() < 6e-3 * exact.norm()


@pytest.mark.parametrize("units", [False, True])
def test_only_bf16_inputs_are_multiplied_in_bf16_and_only_where_that_is_fast(units, monkeypatch):
    monkeypatch.setattr(speedups, "BF16_UNITS", units)
    q, k, v = torch.randn(3, 1, 2, 2000, 8).bfloat16()
    _, S = model.linear_attention_chunked(q, k, v)
    wanted, wanted_state = model.linear_attention_chunked(*(x.float() for x in (q, k, v)))
    assert torch.equal(S, wanted_state) == (not units)
    monkeypatch.setattr(speedups, "BF16_UNITS", not units)
    assert torch.equal(wanted, model.linear_attention_chunked(*(x.float() for x in (q, k, v)))[0])


@pytest.mark.parametrize("units", [False, True])
def test_2000_ones_do_not_stall_at_256(units, monkeypatch):
    monkeypatch.setattr(speedups, "BF16_UNITS", units)
    ones = torch.ones(1, 1, 2000, 1, dtype=torch.bfloat16)
    y, S = model.linear_attention_chunked(ones, ones, ones)
    assert S.item() == 2000
    close(y.float().flatten(), torch.arange(1, 2001.0), 4e-3)
    y, S = model.normalised(model.linear_attention_chunked, ones, ones, ones, ones.clone(), ones.clone())
    assert S.tolist() == [[[[2000, 2000]]]]
    close(y, ones, 4e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_counts_ones_exactly_in_bf16_and_under_autocast(form):
    ones = torch.ones(1, 1, 1500, 1)
    assert FORMS[form](*[ones.bfloat16()] * 3)[1].item() == 1500
    with torch.autocast("cpu", torch.bfloat16):
        y, S = FORMS[form](ones, ones, ones)
    assert S.item() == 1500 and torch.equal(y.flatten(), torch.arange(1, 1501.0))


@pytest.mark.parametrize("form", FORMS)
def test_decay_zero_is_no_decay_exactly(form):
    for rule in ("plain", "delta"):
        x = operands(100, rule, dtype=torch.float32)
        for got, wanted in zip(FORMS[form](**x, log_decay=torch.zeros(2, 2, 100)), FORMS[form](**x)):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("weights", ["q and k", "another pair"])
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_normaliser_is_what_values_of_one_read_over_any_split(form, weights):
    x = {name: value.detach().abs() for name, value in operands(70, state=False, K=4).items()}
    q, k, v = x.values()
    g = -torch.rand(2, 2, 70).double()
    q_den, k_den = (q, k) if weights == "q and k" else (torch.rand_like(q), torch.rand_like(k))
    y, S = FORMS[form](q, k, v, g)
    sums, Z = FORMS[form](q_den, k_den, torch.ones_like(v[..., :1]), g)
    wanted, state, ys = (y / (sums + 1e-6), torch.cat([S, Z], dim=-1)), None, []
    for part in (slice(0, 66), slice(66, 70)):
        q_part, k_part, v_part, g_part, *pair = (a[:, :, part] for a in (q, k, v, g, q_den, k_den))
        pair = (q_part, k_part) if weights == "q and k" else pair
        y, state = normalised(FORMS[form], q_part, k_part, v_part, *pair, g_part, state)
        ys.append(y)
    close((torch.cat(ys, dim=2), state), wanted, 1e-10)


@pytest.mark.parametrize("name", ["k", "v", "log_decay", "beta", "state"])
def test_an_argument_that_does_not_fit_is_refused_by_name(name):
    x = operands(5, "decay delta")
    x[name] = x[name][:1]
    for form in FORMS.values():
        with pytest.raises(ValueError, match=rf"^{name} must have shape"):
            form(**x)


def test_a_normalised_form_refuses_a_state_without_its_last_column_or_of_another_batch():
    q, k, v = torch.rand(3, 2, 3, 5, 4)
    for state in (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"^state must have shape \(2, 3, 4, 5\)"):
            normalised(model.linear_attention_chunked, q, k, v, q.clone(), k.clone(), state=state)


@pytest.mark.parametrize("options", [{}, dict(norm="layer"), dict(normaliser="rms", mixers="linear softmax")],
                         ids=["base", "layer norm", "rms"])
def test_a_model_with_its_matrices_in_bf16_can_be_called_without_autocast(options):
    lm = LM(ModelConfig(vocab_size=60, dim=16, depth=3, n_heads=2, **options))
    for p in lm.parameters():
        p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    idx = torch.randint(60, (2, 9))
    with torch.no_grad():
        logits, state = lm(idx)
        assert logits.dtype == torch.bfloat16 and len(list(lm.generate(idx, 3))) == 3
    exact, _ = lm.float()(idx)
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name, wrong", [
    ("q", dict(q=torch.rand(2, 5, 4))), ("q", dict.fromkeys("qkv", torch.rand(0, 2, 5, 4))),
    ("q", dict.fromkeys("qkv", torch.rand(2, 2, 0, 4))), ("k", dict(k=torch.rand(2, 5, 4))),
    *(("k", dict(k=torch.rand(shape))) for shape in ((1, 2, 5, 4), (2, 1, 5, 4), (2, 2, 7, 4), (2, 2, 5, 3)))],
    ids=range(8))
def test_shapes_that_would_be_broadcast_or_break_inside_are_refused_by_name(name, wrong):
    for form in (*FORMS.values(), model.linear_attention_bidirectional):
        with pytest.raises(ValueError, match=rf"^{name} must "):
            form(**{**dict.fromkeys("qkv", torch.rand(2, 2, 5, 4)), **wrong})


@pytest.mark.parametrize("size", [0, -3])
def test_a_chunk_of_no_tokens_is_refused(size):
    with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
        model.linear_attention_chunked(*[torch.rand(2, 2, 5, 4)] * 3, chunk_size=size)


@pytest.mark.parametrize("d", [2, 5, 16])
def test_taylor_features_multiply_to_its_kernel(d):
    """[2]: phi(q).phi(k) = 1 + s + s^2 / 2, s = q.k / sqrt(d); 153 columns at d = 16."""
    q, k = torch.randn(2, 20, d, dtype=torch.float64)
    s = (q * k).sum(-1) / d ** 0.5
    close((TAYLOR.phi(q) * TAYLOR.phi(k)).sum(-1), 1 + s + s * s / 2, 1e-12)
    assert TAYLOR.phi(q).shape[-1] == 1 + d + d * (d + 1) // 2


def test_feature_maps_are_their_formulas_and_as_positive_and_as_long_as_they_say():
    x = 3 * torch.randn(2, 500, 8)
    close(FEATURE_MAPS["elu"].phi(x), torch.where(x > 0, x + 1, x.exp()), 1e-6)  # [1, Eq. 7]
    close(FEATURE_MAPS["relu"].phi(x), x.clamp(min=0), 0)
    for phi in FEATURE_MAPS.values():
        q, k = phi.phi(x)
        assert not phi.positive or (q @ k.T >= 0).all()
        assert not phi.unit or (q.norm(dim=-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_elu_plus_one_keeps_its_small_values_in_16_bits(dtype):
    """[1, Eq. 7]: exp(x) below 0. In bf16 ELU(-6) is -1."""
    x = torch.linspace(-9, 9, 500).to(dtype)
    y = FEATURE_MAPS["elu"].phi(x)
    wanted = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert y.dtype == dtype and (y.double() / wanted - 1).abs().max() < 0.01
    x = torch.tensor([-90.0, -1.0, 0.0, 2.0, 90.0], dtype=dtype, requires_grad=True)
    slope, = torch.autograd.grad(FEATURE_MAPS["elu"].phi(x).sum(), x)
    close(slope.double(), x.clamp(max=0).double().exp(), 0.01)


# ----------------------------------------------------------------------------------------------------------------------
# The whole model

TINY = dict(vocab_size=70, dim=16, n_heads=2, seq_len=32, chunk_size=4, window=5, mlp_ratio=1.0)
CONFIG = Path(__file__).resolve().parent.parent / "config"


def model_settings(path):
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    return {key: value for _, key, value, _ in read_config_file(str(path)) if key in names}


def shrunk(settings):
    """The settings of a model at the width of TINY."""
    if "feature_dim" in settings:
        width = settings.get("dim", ModelConfig.dim) // settings.get("n_heads", ModelConfig.n_heads)
        settings["feature_dim"] = settings["feature_dim"] * TINY["dim"] // TINY["n_heads"] // width
    return {key: value for key, value in settings.items() if key not in {*TINY, "depth"}}


PRESETS = {path.stem: shrunk(model_settings(path)) for path in sorted(CONFIG.glob("*.py")) if path.stem != "finetune"}
LINEAR_OPTIONS = dict(
    mixers=["linear", "linear window", "conv linear softmax", ["window", "linear"]],
    feature_map=list(FEATURE_MAPS), pos=["none", "learned", "sinusoidal", "rope"], decay=["none", "fixed", "gated"],
    delta=[False, True], beta_max=[1.0, 2.0], normaliser=["sum", "rms"], short_conv=[False, True], output_gate=[False, True],
    expand_v=[1.0, 2.0], feature_dim=[0, 4], mlp=["gelu", "swiglu", "relu2"], mlp_ratio=[0.0, 1.0],
    norm=["rms", "layer"], tied=[True, False], chunk_size=[1, 4, 64], window=[1, 5, 64])
OTHER_OPTIONS = dict(mixers=["window", "softmax", "conv", ["softmax", "conv", "window"]],
                     **{name: LINEAR_OPTIONS[name] for name in ("pos", "short_conv", "mlp", "mlp_ratio", "norm", "tied", "window")})


def tiny(**options):
    """A small model in float64, its weights large enough that every part of it matters to the logits."""
    lm = LM(ModelConfig(**{**TINY, "depth": 3, **options})).double().eval()
    for name, p in lm.named_parameters():
        if p.dim() == 2 and "conv" not in name:
            torch.nn.init.normal_(p, std=1 / p.shape[1] ** 0.5)
    return lm


def legal(**options):
    try:
        return bool(ModelConfig(**{**TINY, **options}))
    except ValueError:
        return False


def covering_set(options):
    """A few legal configurations in which every legal pair of option values occurs, found greedily at random.

    Returns them, and the pairs of which no legal configuration was found.
    """
    draw, chosen, impossible = random.Random(0), [], []

    def pairs(config):
        return set(itertools.combinations([(name, str(value)) for name, value in config.items()], 2))
    todo = {((a, str(x)), (b, str(y))): {a: x, b: y} for a, b in itertools.combinations(options, 2)
            for x, y in itertools.product(options[a], options[b])}
    while todo:
        fixed = next(iter(todo.values()))
        tries = [{name: fixed.get(name, draw.choice(values)) for name, values in options.items()} for _ in range(400)]
        tries = sorted((c for c in tries if legal(**c)), key=lambda c: len(pairs(c) & todo.keys()))
        if not tries:
            impossible.append(next(iter(todo)))
        chosen += tries[-1:]
        for pair in pairs(tries[-1]) if tries else [next(iter(todo))]:
            todo.pop(pair, None)
    return chosen, impossible


COVERING, IMPOSSIBLE = map(list.__add__, covering_set(LINEAR_OPTIONS), covering_set(OTHER_OPTIONS))
COVERING += list(PRESETS.values())


def test_only_these_pairs_of_options_are_refused():
    unit = [(("feature_map", m), ("delta", "True")) for m in FEATURE_MAPS if m != "silu_l2"]
    summed = [(("feature_map", m), ("normaliser", "sum")) for m in ("identity", "silu_l2")]
    assert set(IMPOSSIBLE) == {*unit, *summed, (("delta", "True"), ("normaliser", "sum"))}


def read(lm, idx, lengths):
    """The logits of idx read in parts of these lengths, and the last state."""
    parts, state = [], None
    for part in idx.split(lengths, dim=1):
        logits, state = lm(part, state=state)
        parts.append(logits)
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize("options", COVERING, ids=str)
@torch.no_grad()
def test_any_split_of_a_text_gives_one_result_and_no_token_changes_the_past(options):
    lm, idx = tiny(**options), torch.randint(70, (2, 23))
    wanted, state = lm(idx)
    for lengths in ([9] + [1] * 14, [1] * 3 + [2, 4, 14], [12, 11]):
        got, got_state = read(lm, idx, lengths)
        close(got, wanted, 1e-9)
        close(tree_leaves(got_state), tree_leaves(state), 1e-9)
    for t in (1, 10, 22):
        other = idx.clone()
        other[:, t] = (idx[:, t] + 1) % 70
        changed, _ = lm(other)
        assert torch.equal(changed[:, :t], wanted[:, :t])
        assert not torch.equal(changed[:, t:], wanted[:, t:])


def test_swapping_the_mixer_is_one_line_of_a_config():
    base, softmax = (dataclasses.asdict(ModelConfig(**model_settings(CONFIG / f"{name}.py"))) for name in ("base", "softmax"))
    assert {key for key in base if base[key] != softmax[key]} == {"mixers"}
    for mixers in (*model.MIXERS, "conv linear window"):
        assert legal(**{**PRESETS["base"], "mixers": mixers})


@torch.no_grad()
def test_a_feature_map_and_a_mixer_of_ones_own_are_one_line_of_a_registry_each(monkeypatch):
    class Mean(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x, state, ropes):
            total, n = (0, 0) if state is None else state
            sums, counts = total + x.cumsum(1), n + torch.arange(1, x.shape[1] + 1)
            return sums / counts[:, None], (sums[:, -1:], counts[-1])
    monkeypatch.setitem(model.MIXERS, "mean", Mean)
    monkeypatch.setitem(FEATURE_MAPS, "square", model.FeatureMap(torch.square, positive=True))
    lm, idx = tiny(mixers="mean linear", feature_map="square"), torch.randint(70, (2, 23))
    assert type(lm.blocks[0].mixer) is Mean
    close(read(lm, idx, [9] + [1] * 14)[0], lm(idx)[0], 1e-9)
    assert not torch.equal(lm(idx)[0], tiny(mixers="mean linear")(idx)[0])


@pytest.mark.parametrize("options", [dict(depth=1), dict(mixers="linear conv window", feature_map="taylor"),
                                     dict(PRESETS["gated_deltanet"], depth=1)], ids=["base", "taylor", "delta"])
def test_blocks_compile_whole_to_the_same_loss(options):
    lm, idx = tiny(**options), torch.randint(70, (2, 13))
    wanted, _ = lm(idx, idx)
    for block in lm.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="eager")            # no graph breaks
    close(lm(idx, idx)[0], wanted, 1e-12)


@pytest.mark.parametrize("mixers, depth, wanted", [
    ("linear", 3, "Linear Linear Linear"), ("conv linear window", 4, "GatedConv Linear Softmax5 GatedConv"),
    ("softmax,linear", 2, "Softmax Linear"), (["window", "conv"], 3, "Softmax5 GatedConv Softmax5")])
def test_a_pattern_of_mixers_repeats_over_the_depth(mixers, depth, wanted):
    found = [block.mixer for block in tiny(mixers=mixers, depth=depth).blocks]
    names = [type(mixer).__name__.replace("Attention", "") for mixer in found]
    assert " ".join(f"{name}{getattr(mixer, 'window', None) or ''}" for name, mixer in zip(names, found)) == wanted


@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_block_adds_its_mixer_and_then_its_mlp_to_normed_inputs(mlp, norm):
    block, x = tiny(mlp=mlp, norm=norm, mlp_ratio=3.0, pos="none").blocks[0], 5 * torch.randn(2, 9, 16).double()

    def normed(x):
        return F.layer_norm(x, [16]) if norm == "layer" else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x1 = x + block.mixer(normed(x), None, {})[0]
    up = normed(x1) @ block.mlp.up.weight.T
    hidden = {"gelu": lambda: up * (1 + torch.erf(up / 2 ** 0.5)) / 2, "relu2": lambda: up.clamp(min=0) ** 2,
              "swiglu": lambda: up[..., :32] * up[..., :32].sigmoid() * up[..., 32:]}[mlp]()   # 2 / 3 of 3 * 16
    close(block(x, None, {})[0], x1 + hidden @ block.mlp.out.weight.T, 1e-10)


@torch.no_grad()
def test_a_gate_fixed_to_one_makes_gated_deltanet_deltanet_exactly():
    options = {**PRESETS["deltanet"], "mixers": "linear"}
    plain, gated, idx = tiny(**options), tiny(**options, decay="gated"), torch.randint(70, (2, 23))
    assert not gated.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert not torch.equal(gated(idx)[0], plain(idx)[0])
    for block in gated.blocks:
        block.mixer.log_A.fill_(-math.inf)                                       # alpha = exp(-A softplus) = 1
    assert torch.equal(gated(idx)[0], plain(idx)[0])


@torch.no_grad()
def test_a_window_longer_than_the_text_is_full_softmax():
    full, idx = tiny(mixers="softmax"), torch.randint(70, (2, 23))
    for w, same in ((23, True), (100, True), (22, False)):
        windowed = tiny(mixers="window", window=w)
        windowed.load_state_dict(full.state_dict())
        assert torch.allclose(windowed(idx)[0], full(idx)[0], rtol=0, atol=1e-12) == same


@pytest.mark.parametrize("T", [1, 4, 5, 6, 31])
def test_a_window_sees_its_last_tokens_and_no_others(T):
    q, k, v = (torch.randn(2, 2, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    age = torch.arange(T)[:, None] - torch.arange(T)
    scores = (q @ k.mT / 2).masked_fill((age < 0) | (age >= 5), -math.inf)
    wanted = scores.softmax(-1) @ v
    close(naive_softmax_attention(q, k, v, window=5), wanted, 1e-12)
    y = softmax_attention(q, k, v, window=5)
    close(y, wanted, 1e-12)
    close(*(torch.autograd.grad(z.square().sum(), (q, k, v)) for z in (y, wanted)), 1e-12)


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("T, tokens", [(1, 1), (1, 9), (4, 9), (9, 9), (20, 31)])
def test_fast_softmax_attention_is_the_naive_one_after_any_past(T, tokens, window):
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (T, tokens, tokens))
    close(softmax_attention(q, k, v, window=window), naive_softmax_attention(q, k, v, window=window), 1e-12)
    if window is None and T == tokens:
        both_ways = softmax_attention(q, k, v, causal=False)
        close(both_ways, naive_softmax_attention(q, k, v, causal=False), 1e-12)


class Largest(TorchDispatchMode):
    """Records the size in elements of the largest memory that any operation gave back, forward or backward."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("mixers", ["linear", "window", "conv"])
def test_memory_grows_linearly_with_the_text(mixers):
    lm, largest = tiny(mixers=mixers, depth=1, chunk_size=64, window=32), {}
    for T in (1024, 2048):
        _, state = lm(torch.randint(70, (1, 40)))
        with Largest() as seen:
            lm(torch.randint(70, (1, T)))[0].sum().backward()
            lm(torch.randint(70, (1, T)), state=state)                           # and as the rest of a text
        largest[T] = seen.elements
    assert largest[2048] <= 2 * largest[1024] and largest[2048] < 2048 * 2048 / 8


@pytest.mark.parametrize("scale", [1e-4, 1e2])
@pytest.mark.parametrize("options", COVERING, ids=str)
def test_bf16_forward_and_backward_stay_finite_at_4096_tokens_with_extreme_inputs(options, scale):
    lm = LM(ModelConfig(**{**TINY, **options, "chunk_size": 64, "seq_len": 4096, "depth": 3}))
    idx = torch.randint(70, (1, 4096))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(scale if p.dim() == 2 else 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = lm(idx, idx)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in lm.parameters())


@pytest.mark.parametrize("decay", ["fixed", "gated"])
@torch.no_grad()
def test_decays_and_states_of_a_bf16_model_are_fp32(decay):
    """A decay of 1 - 2^-12 is 1 in bf16."""
    lm = LM(ModelConfig(**{**TINY, "dim": 64, "n_heads": 8, "decay": decay, "normaliser": "rms"})).bfloat16()
    mixer, x = lm.blocks[0].mixer, torch.randn(2, 9, 64).bfloat16()
    g = mixer.log_decay(x)
    if decay == "fixed":                                                         # [3, Eq. 8]
        wanted = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(8)])[:, None]
    else:                                                                        # [8]
        wanted = -mixer.log_A.float().exp() * F.softplus(mixer.decay(x).float() + mixer.decay_bias)
        wanted = wanted.transpose(1, 2)
    assert g.dtype == torch.float32 and torch.allclose(g, wanted.expand_as(g), rtol=1e-6, atol=0)
    state = lm(torch.randint(70, (2, 9)))[1]
    assert all(S.dtype == torch.float32 for _, S in state["layers"])


# ----------------------------------------------------------------------------------------------------------------------
# The published layers, one token at a time. Queries, keys and values of x W, x one text (T,D).


def by_heads(x, weight, width):
    return (x @ weight.T).unflatten(-1, (-1, width)).unbind(1)                   # H of (T,width)


def turned(x):
    """[7, Eq. 14, 15] on the pairs (i, i + d/2), as complex numbers: row n is multiplied by e^{i n theta}."""
    d = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000 ** (-torch.arange(d) / d)
    z = torch.complex(x[:, :d], x[:, d:]) * torch.exp(1j * angle)
    return torch.cat([z.real, z.imag], dim=-1)


def based(m, x, turn=lambda x: x):
    """[1, Eq. 3, 8]: y_t = sum_j sim(q_t, k_j) v_j / sum_j sim(q_t, k_j) over j <= t, and what [2] takes for sim: the
    second-order Taylor expansion of the softmax's exp, 1 + s + s^2 / 2 at s = q.k / sqrt(16).
    """
    Wq, Wk, Wv = m.qkv.weight.split([2 * 16, 2 * 16, 16])
    ys = []
    for q, k, v in zip(by_heads(x, Wq, 16), by_heads(x, Wk, 16), by_heads(x, Wv, 8)):
        q, k, rows = turn(q), turn(k), []
        for t in range(len(x)):
            s = [q[t] @ k[j] / 4 for j in range(t + 1)]
            weights = [1 + a + a * a / 2 for a in s]
            rows.append(sum(a * v[j] for j, a in enumerate(weights)) / (sum(weights) + 1e-6))
        ys.append(torch.stack(rows))
    return torch.cat(ys, dim=-1) @ m.out.weight.T


def based_with_rope(m, x):
    return based(m, x, turned)


def roformer(m, x):
    """[7, Eq. 19] with phi = elu + 1 [1, Eq. 7]: the numerator is rotated, the denominator is not."""
    ys = []
    for q, k, v in zip(*(by_heads(x, W, 8) for W in m.qkv.weight.split(16))):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        Q, K = turned(q), turned(k)
        rows = [sum(Q[t] @ K[j] * v[j] for j in range(t + 1)) / (sum(q[t] @ k[j] for j in range(t + 1)) + 1e-6)
                for t in range(len(x))]
        ys.append(torch.stack(rows))
    return torch.cat(ys, dim=-1) @ m.out.weight.T


def retnet(m, x):
    """[3, Eq. 5, 6, 8]: S_n = gamma S_{n-1} + K_n^T V_n, o_n = Q_n S_n, Q_n turned by e^{in theta} and K_n by its
    conjugate; a norm of each head; (swish(x W_G) * Y) W_O. Differs: GroupNorm is RMSNorm, as in the authors' code, with
    a weight that starts at 1; theta is RoFormer's [7, Eq. 15], on pairs (i, i + d/2).
    """
    Wq, Wk, Wv = m.qkv.weight.split([16, 16, 32])
    ys = []
    for h, (q, k, v) in enumerate(zip(by_heads(x, Wq, 8), by_heads(x, Wk, 8), by_heads(x, Wv, 16))):
        gamma, S, rows = 1 - 2.0 ** (-5 - h), 0, []
        for n in range(len(x)):
            turn = torch.exp(1j * n * 10000 ** (-torch.arange(4) / 4))
            Q, K = (torch.complex(z[n, :4], z[n, 4:]) * turn for z in (q, k))
            S = gamma * S + K.conj()[:, None] * v[n]
            o = (Q @ S).real
            rows.append(m.norm.weight * o / (o.square().mean() + 1e-6).sqrt())
        ys.append(torch.stack(rows))
    return (F.silu(x @ m.gate.weight.T) * torch.cat(ys, dim=-1)) @ m.out.weight.T


def gated_deltanet(m, x):
    """[6, Eq. 10]: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T, o_t = S_t q_t.

    [6, Sec. 3.4]: q, k = L2(SiLU(conv)), v = SiLU(conv), a norm, a SiLU gate. alpha_t = exp(-A softplus(x W + b)) [8].
    """
    z = x @ m.qkv.weight.T
    z = [sum(m.conv.weight[i] * z[t - i] for i in range(min(4, t + 1))) for t in range(len(x))]
    z = torch.stack([a / (1 + (-a).exp()) for a in z])                           # SiLU
    ys, K, V = [], m.config.key_dim, m.config.value_dim
    for h in range(2):
        q, k, v = (part[:, h * part.shape[1] // 2:][:, :part.shape[1] // 2] for part in z.split([2 * K, 2 * K, 2 * V], dim=1))
        S, rows = torch.zeros(V, K), []
        for t in range(len(x)):
            key, query = k[t] / k[t].norm(), q[t] / q[t].norm()
            alpha = (-m.log_A[h].exp() * (1 + (x[t] @ m.decay.weight[h] + m.decay_bias[h]).exp()).log()).exp()
            beta = 1 / (1 + (-x[t] @ m.beta.weight[h]).exp())
            S = S @ (alpha * (torch.eye(K) - beta * torch.outer(key, key))) + beta * torch.outer(v[t], key)
            o = S @ query
            rows.append(m.norm.weight * o / (o.square().mean() + 1e-6).sqrt())
        ys.append(torch.stack(rows))
    gate = x @ m.gate.weight.T
    return (torch.cat(ys, dim=-1) * gate / (1 + (-gate).exp())) @ m.out.weight.T


def gated_conv(m, x):
    """[2], as in its authors' code: (conv(x) + b) (x W + c) + x, depthwise over 3 tokens."""
    convs = [sum(m.conv.weight[i] * x[t - i] for i in range(min(3, t + 1))) + m.conv_bias for t in range(len(x))]
    return torch.stack([conv * (m.gate.weight @ x[t] + m.gate.bias) + x[t] for t, conv in enumerate(convs)])


def softmax_conv(m, x, window=None):
    """Softmax attention on q, k and v after a convolution over 4 tokens of each."""
    z = x @ m.qkv.weight.T
    z = torch.stack([sum(m.conv.weight[i] * z[t - i] for i in range(min(4, t + 1))) for t in range(len(x))])
    ys = []
    for q, k, v in zip(*(part.unflatten(-1, (-1, 8)).unbind(1) for part in z.split(16, dim=1))):
        rows = []
        for t in range(len(x)):
            first = 0 if window is None else max(0, t - window + 1)
            weights = torch.stack([q[t] @ k[j] / 8 ** 0.5 for j in range(first, t + 1)]).softmax(0)
            rows.append(weights @ v[first:t + 1])
        ys.append(torch.stack(rows))
    return torch.cat(ys, dim=-1) @ m.out.weight.T


def window_conv(m, x):
    return softmax_conv(m, x, window=5)


@pytest.mark.parametrize("layer, options", [
    (based, dict(feature_map="taylor", feature_dim=16, pos="none")), (roformer, dict()),
    (based_with_rope, dict(feature_map="taylor", feature_dim=16)),
    (gated_conv, dict(mixers="conv")), (softmax_conv, dict(mixers="softmax", short_conv=True, pos="none")),
    (window_conv, dict(mixers="window", short_conv=True, pos="none")), (retnet, PRESETS["retnet"]), (gated_deltanet, PRESETS["gated_deltanet"])],
    ids=lambda x: getattr(x, "__name__", ""))
def test_mixer_is_the_published_layer_in_one_pass_step_by_step_and_in_gradients(layer, options, float64):
    mixer = tiny(depth=1, **options).blocks[0].mixer
    for p in mixer.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p)                                             # norm weights, A, bias of the decay
    x = torch.randn(2, 13, 16, requires_grad=True)
    wanted = torch.stack([layer(mixer, text) for text in x])

    def ropes(start, end):
        return {} if options.get("pos") == "none" else {d: rope_table(torch.arange(start, end), d) for d in (8, 16)}
    y, _ = mixer(x, None, ropes(0, 13))
    close(y, wanted, 1e-10)
    steps, state = [], None
    for t in range(13):
        y_t, state = mixer(x[:, t:t + 1], state, ropes(t, t + 1))
        steps.append(y_t)
    close(torch.cat(steps, dim=1), wanted, 1e-10)
    close(*(torch.autograd.grad(z.square().sum(), [x, *mixer.parameters()]) for z in (y, wanted)), 1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize("options", [dict(mixers="softmax"), dict(mixers="window"), dict(), PRESETS["retnet"],
                                     dict(feature_map="taylor")], ids=str)
@torch.no_grad()
def test_rope_depends_on_distances_only(options):
    lm, idx = tiny(**options), torch.randint(70, (1, 20))
    late, _ = lm(idx, state={"tokens": torch.tensor(1000), "layers": [None] * 3})
    close(late, lm(idx)[0], 1e-9)


def test_rope_turns_pairs_exactly_even_at_a_million():
    for n in (0, 1, 1_000_000):
        x = torch.randn(1, 1, 1, 6)
        got = rotate(x, rope_table(torch.tensor([n]), 6)).flatten().tolist()
        for i in range(3):
            z = complex(x[0, 0, 0, i], x[0, 0, 0, i + 3]) * cmath.exp(1j * n * 10000.0 ** (-2 * i / 6))
            assert abs(complex(got[i], got[i + 3]) - z) < 1e-6


@pytest.mark.parametrize("pos", ["none", "learned", "sinusoidal", "rope"])
@torch.no_grad()
def test_only_positions_tell_the_order_of_the_past(pos):
    lm, idx = tiny(pos=pos, depth=1), torch.randint(70, (1, 20))
    shuffled = torch.cat([idx[:, torch.randperm(19)], idx[:, 19:]], dim=1)
    assert torch.allclose(lm(shuffled)[0][:, -1], lm(idx)[0][:, -1], rtol=0, atol=1e-9) == (pos == "none")


@torch.no_grad()
def test_sinusoids_are_their_formula_and_no_larger_than_the_embedding_they_are_added_to():
    lm, idx, seen = LM(ModelConfig(**{**TINY, "pos": "sinusoidal", "depth": 1})), torch.randint(70, (1, 32)), []
    lm.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    for start in (0, 1000):
        lm(idx, state={"tokens": torch.tensor(start), "layers": [None]})
        angles = [[n / 10000 ** (2 * i / 16) for i in range(8)] for n in range(start, start + 32)]
        wanted = torch.tensor([[*map(math.cos, row), *map(math.sin, row)] for row in angles])
        added = seen.pop()[0] - lm.embed(idx)[0]
        close(added, 0.02 * wanted, 1e-6)
        assert 0.5 < added.square().mean().sqrt() / lm.embed.weight.square().mean().sqrt() < 1


@torch.no_grad()
def test_learned_positions_end_at_seq_len_and_say_so():
    lm = tiny(pos="learned")
    _, state = lm(torch.zeros(1, 32, dtype=torch.long))
    for tokens, past in ((33, None), (1, state)):
        with pytest.raises(ValueError, match="learned positions end at seq_len=32, and this text has 33 tokens"):
            lm(torch.zeros(1, tokens, dtype=torch.long), state=past)


# ----------------------------------------------------------------------------------------------------------------------
# causal=False


@pytest.mark.parametrize("feature_map", ["elu", "taylor"])
@torch.no_grad()
def test_bidirectional_attention_is_the_sum_over_all_keys(feature_map):
    mixer, x = tiny(causal=False, feature_map=feature_map, depth=1).blocks[0].mixer, torch.randn(1, 9, 16).double()
    q, k, v = (torch.stack(by_heads(x[0], W, 8)) for W in mixer.qkv.weight.split(16))
    phi = FEATURE_MAPS[feature_map].phi
    weights = phi(q) @ phi(k).mT                                                 # (H,T,T)
    wanted = weights @ v / weights.sum(-1, keepdim=True)
    close(mixer(x, None, {})[0][0], wanted.transpose(0, 1).flatten(1) @ mixer.out.weight.T, 1e-5)
    x = operands(5)
    y, S = model.linear_attention_bidirectional(**x)
    close((y, S), (x["q"] @ S, x["state"] + x["k"].mT @ x["v"]), 1e-12)
    with pytest.raises(ValueError, match="without an order in time"):
        model.linear_attention_bidirectional(**operands(5, "decay"))


@pytest.mark.parametrize("mixers", ["linear", "softmax"])
@torch.no_grad()
def test_without_order_or_positions_shuffling_tokens_shuffles_logits(mixers):
    idx, shuffle = torch.randint(70, (2, 20)), torch.randperm(20)
    for pos, same in (("none", True), ("rope", False)):
        lm = tiny(mixers=mixers, causal=False, pos=pos)
        assert torch.allclose(lm(idx[:, shuffle])[0], lm(idx)[0][:, shuffle], rtol=0, atol=1e-9) == same


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_the_model_is_cross_entropy_of_its_logits(tied):
    lm, idx = tiny(tied=tied), torch.randint(70, (3, 20))
    targets = idx.roll(-1, dims=1)
    targets[:, -1] = -1
    loss, wanted = lm(idx, targets)[0], F.cross_entropy(lm(idx)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    close(loss, wanted, 1e-12)
    close(*(torch.autograd.grad(z, list(lm.parameters())) for z in (loss, wanted)), 1e-10)


def test_targets_of_another_shape_are_refused():
    for shape in ((1, 1), (1, 4), (3,)):                                         # (1, 1) was three times the loss
        with pytest.raises(ValueError, match="one target for each token"):
            tiny()(torch.zeros(1, 3, dtype=torch.long), torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_evaluating_the_loss_multiplies_by_the_vocabulary_once():
    lm, idx = LM(ModelConfig(**{**TINY, "vocab_size": 512})), torch.zeros(1, 100, dtype=torch.long)
    with FlopCounterMode(display=False) as without_loss:
        lm.hidden(idx)
    with FlopCounterMode(display=False) as with_loss:
        lm(idx, idx)
    assert with_loss.get_total_flops() - without_loss.get_total_flops() == 2 * 100 * lm.config.dim * 512


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def generate(lm, idx, n, **options):
    return torch.stack([token for token, _ in lm.generate(idx, n, **options)], dim=1)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_a_full_forward(preset):
    lm, idx = tiny(**PRESETS[preset]), torch.randint(70, (2, 7))
    for _ in range(12):
        idx = torch.cat([idx, lm(idx)[0][:, -1:].argmax(-1)], dim=1)
    for piece in (1, 3, 7, 4096):
        assert torch.equal(generate(lm, idx[:, :7], 12, temperature=0, piece=piece), idx[:, 7:])
    for sharp in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)):
        assert torch.equal(generate(lm, idx[:, :7], 12, **sharp), idx[:, 7:])


def test_a_prompt_is_read_in_pieces_and_then_token_by_token(monkeypatch):
    lm, hidden, lengths = tiny(), LM.hidden, []
    monkeypatch.setattr(lm, "hidden", lambda idx, state: lengths.append(idx.shape[1]) or hidden(lm, idx, state))
    generate(lm, torch.randint(70, (2, 7)), 3, piece=3)
    assert lengths == [3, 3, 1, 1, 1]


def test_a_text_of_no_tokens_and_a_state_without_an_order_in_time_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        tiny()(torch.zeros(1, 0, dtype=torch.long))
    lm, idx = tiny(causal=False), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot continue a state"):
        lm(idx, state=lm(idx)[1])


def test_sampling_repeats_by_seed_and_continues_from_a_state():
    lm, idx = tiny(), torch.randint(70, (2, 7))

    def draw(seed):
        return generate(lm, idx, 20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    tokens, states = zip(*lm.generate(idx, 10, temperature=0))
    assert [int(state["tokens"]) for state in states] == list(range(7, 17))
    assert torch.equal(generate(lm, tokens[3][:, None], 6, temperature=0, state=states[3]), torch.stack(tokens[4:], 1))


@pytest.mark.parametrize("options, p", [
    (dict(), [0.5, 0.3, 0.15, 0.05]), (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
    (dict(top_k=2), [0.625, 0.375, 0, 0]), (dict(top_k=9), [0.5, 0.3, 0.15, 0.05]), (dict(top_p=0.45), [1, 0, 0, 0]),
    (dict(top_p=0.55), [0.625, 0.375, 0, 0]), (dict(top_p=0.85), [0.526, 0.316, 0.158, 0])], ids=str)
def test_tokens_are_drawn_as_often_as_the_options_say(options, p):
    order = torch.tensor([2, 0, 3, 1])                                           # token order[i] has probability p[i]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[order.argsort()].expand(20000, 4)
    share, p = choose(logits, **options).bincount(minlength=4)[order] / 20000, torch.tensor(p, dtype=torch.float)
    assert torch.allclose(share, p, rtol=0, atol=0.02) and (share[p == 0] == 0).all()


@pytest.mark.parametrize("preset", [*PRESETS, "window"])
def test_a_state_does_not_grow_over_300_tokens_unless_it_is_softmax(preset):
    lm, sizes = tiny(**PRESETS.get(preset, dict(mixers=preset))), []
    for _, state in lm.generate(torch.zeros(1, 40, dtype=torch.long), 300):
        parts = [x for x in tree_leaves(state) if x is not None]
        sizes.append(sum(x.untyped_storage().nbytes() for x in parts))           # what a view keeps alive counts too
    assert sizes[-1] == sum(x.numel() * x.element_size() for x in parts)
    assert (sizes[0] == sizes[-1]) == ("softmax" not in preset)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration and initial weights


def test_a_feature_map_that_changes_the_width_is_refused_with_rope_unless_it_is_rotated_first(monkeypatch):
    def twice(x):
        return torch.cat([x, -x], dim=-1).relu() + 0.1
    monkeypatch.setitem(FEATURE_MAPS, "twice", model.FeatureMap(twice, positive=True))
    with pytest.raises(ValueError, match="rotate_first=True, or use pos=none"):
        tiny(feature_map="twice")
    assert tiny(feature_map="twice", pos="none")(torch.zeros(1, 5, dtype=torch.long))
    monkeypatch.setitem(FEATURE_MAPS, "twice", model.FeatureMap(twice, positive=True, rotate_first=True))
    assert tiny(feature_map="twice")(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("options", [dict(), dict(pos="rope", decay="gated", short_conv=True, output_gate=True)], ids=str)
def test_under_autocast_a_form_is_given_and_a_mixer_returns_the_dtype_of_the_matrix_products(feature_map, options, monkeypatch):
    normaliser = "sum" if FEATURE_MAPS[feature_map].positive and feature_map != "relu" else "rms"
    lm = LM(ModelConfig(**{**TINY, "feature_map": feature_map, "normaliser": normaliser, **options}))
    name = "normalised" if normaliser == "sum" else "linear_attention_chunked"
    function, seen = getattr(model, name), []

    def spy(*args, **options):
        seen.extend([x.dtype for x in args if torch.is_tensor(x)][:3])
        return function(*args, **options)
    monkeypatch.setattr(model, name, spy)
    outputs = []
    for block in lm.blocks:
        block.mixer.register_forward_hook(lambda module, inputs, result: outputs.append(result[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        lm(torch.zeros(1, 9, dtype=torch.long))
    assert {*seen, *outputs} == {torch.bfloat16} and seen and outputs


@pytest.mark.parametrize("word, options", [
    *((name, {name: 0}) for name in ("vocab_size", "dim", "depth", "n_heads", "seq_len", "chunk_size", "window")),
    *((name, {name: -0.1}) for name in ("dropout", "mlp_ratio")), ("dropout", dict(dropout=1.0)),
    ("multiple of n_heads=3", dict(n_heads=3)),
    ("liner", dict(mixers="linear liner")), ("mixers", dict(mixers="")), ("mixers", dict(mixers=[])),
    ("exp", dict(feature_map="exp")), ("expand_v", dict(expand_v=0.0)), ("feature_dim", dict(feature_dim=-1)),
    ("even", dict(feature_dim=5)), ("even", dict(n_heads=16, mixers="window")),
    ("even", dict(n_heads=16, mixers="softmax")),
    ("normaliser", dict(feature_map="identity")), ("normaliser", dict(feature_map="silu_l2")),
    ("normaliser", dict(feature_map="silu_l2", delta=True)), ("delta", dict(delta=True)),
    ("silu_l2", dict(delta=True, normaliser="rms")), ("causal", dict(causal=False, mixers="window")),
    ("causal", dict(causal=False, mixers="linear conv")), ("causal", dict(causal=False, short_conv=True)),
    ("causal", dict(causal=False, decay="fixed")), ("causal", dict(causal=False, decay="gated")),
    ("causal", dict(causal=False, delta=True, feature_map="silu_l2", normaliser="rms")),
    *((name, {name: "nonsense"}) for name in ("pos", "decay", "normaliser", "norm", "mlp")),
    ("relu", dict(feature_map="relu", pos="rope"))], ids=str)
def test_an_illegal_configuration_is_refused_with_one_sentence(word, options):
    with pytest.raises(ValueError, match=word) as refusal:
        ModelConfig(**{**TINY, **options})
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


@pytest.mark.parametrize("options", [dict(decay="gated"), dict(delta=True)], ids=str)
def test_an_option_of_the_linear_mixer_is_not_counted_where_there_is_none(options):
    ModelConfig(**{**TINY, **options}, mixers="softmax", causal=False)


@pytest.mark.filterwarnings("error")
def test_a_tiny_mlp_has_at_least_one_unit():
    for mlp, least in (("gelu", 1), ("swiglu", 8)):
        assert tiny(mlp=mlp, mlp_ratio=0.01).blocks[0].mlp.out.in_features == least


def test_the_base_model_has_the_parameters_of_the_paper_card():
    with torch.device("meta"):
        lm, untied = LM(ModelConfig()), LM(ModelConfig(tied=False))
    assert 44.6e6 < sum(p.numel() for p in lm.parameters()) < 44.7e6
    assert lm.unembed.weight is lm.embed.weight and lm.embed.weight.shape == (50304, 512)
    assert untied.unembed.weight is not untied.embed.weight


@pytest.mark.parametrize("name", ["base", "softmax", "based", "retnet", "deltanet", "gated_deltanet", "hybrid",
                                  "hybrid_softmax"])
@torch.no_grad()
def test_a_preset_has_the_parameters_and_the_state_of_its_comment(name):
    path = CONFIG / f"{name}.py"
    lm = LM(ModelConfig(**model_settings(path)))
    total, embedding = sum(p.numel() for p in lm.parameters()), lm.embed.weight.numel()
    _, state = lm.hidden(torch.zeros(1, 1024, dtype=torch.long))
    size = sum(x.numel() * x.element_size() for x in tree_leaves(state["layers"]) if x is not None)
    said = re.search(r"([\d.]+) M parameters \(([\d.]+) M without the embedding\).*? ([\d.]+) MB", path.read_text())
    assert "arXiv" in path.read_text()                                           # the source
    assert said.groups() == tuple(f"{n / 1e6:.2f}" for n in (total, total - embedding, size))
    assert abs(total - embedding - 18.91e6) < 0.005 * 18.91e6                    # so any two are within 1 %


def test_initial_weights_have_the_scale_of_gpt2():
    lm = LM(ModelConfig(vocab_size=256, dim=128, depth=8, n_heads=4, **{**PRESETS["gated_deltanet"], "tied": False}))
    for name, p in lm.named_parameters():
        if p.dim() == 2 and "conv" not in name:
            assert 0.9 < p.std() / (0.02 / 4 if name.endswith(".out.weight") else 0.02) < 1.1, name
    for block in lm.blocks:                                                      # A in 0.01..16, steps in 0.001..0.1
        A, step = block.mixer.log_A.exp(), F.softplus(block.mixer.decay_bias)
        assert (A >= 0.0099).all() and (A <= 16.01).all() and (step > 0.00099).all() and (step < 0.101).all()


@torch.no_grad()
def test_dropout_is_on_the_embedding_and_on_both_branches_of_a_block():
    lm, idx, seen = tiny(dropout=0.5, depth=1).train(), torch.randint(70, (4, 20)), []
    block = lm.blocks[0]
    block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    lm(idx)
    kept = seen[0] / lm.embed(idx)                                               # 0 or 1 / (1 - p)
    assert ((kept == 0) | (kept == 2)).all() and 0.4 < (kept == 0).double().mean() < 0.6
    for silent in (block.mlp, block.mixer):                                      # which leaves the other branch alone
        out, x = silent.out.weight.clone(), torch.randn(4, 20, 16).double()
        silent.out.weight.zero_()
        assert 0.4 < (block(x, None, {})[0] == x).double().mean() < 0.6
        silent.out.weight.copy_(out)


def test_dropout_acts_in_training_only():
    lm, idx = tiny(dropout=0.5), torch.randint(70, (1, 20))
    assert torch.equal(lm(idx)[0], lm(idx)[0])
    lm.train()
    assert not torch.equal(lm(idx)[0], lm(idx)[0])
