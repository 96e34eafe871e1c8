"""Claims about support/kernels.py: on a GPU the Triton kernels are the recurrence of model.py, in values, states and
all gradients, against a loop over tokens in float64. With no GPU they are skipped, unless Triton interprets them:
    pip install triton "numpy<2.4"; TRITON_INTERPRET=1 python -m pytest tests/test_support_kernels.py
"""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
from support import kernels
from support.kernels import linear_attention, normalised_linear_attention

WIDTHS = [(16, 16), (64, 1), (153, 64), (96, 192), (80, 48), (256, 256)]
INTERPRETED = kernels.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RULES = ["plain", "decay", "delta", "decay delta"]
NORMALISERS = [None, "own", "other"]
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}
CHUNK = 16 if INTERPRETED else 64

runs = pytest.mark.skipif(not INTERPRETED and not (kernels.triton and DEVICE == "cuda"),
                          reason="needs an Nvidia GPU with Triton, or TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def recurrence(q, k, v, log_decay=None, beta=None, state=None, q_den=None, k_den=None):
    """The definition, token by token; q_den and k_den make the weights to divide by."""
    S = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3] + (q_den is not None)) if state is None else state
    S, Z = (S, None) if q_den is None else S.split([v.shape[3], 1], dim=-1)
    ys = []
    for t in range(q.shape[2]):
        kept = 1.0 if log_decay is None else log_decay[:, :, t, None, None].exp()
        S, write = kept * S, v[:, :, t, None]
        if beta is not None:
            write = beta[:, :, t, None, None] * (write - k[:, :, t, None] @ S)
        S = S + k[:, :, t, :, None] * write
        y = q[:, :, t, None] @ S
        if q_den is not None:
            Z = kept * Z + k_den[:, :, t, :, None]
            y = y / (q_den[:, :, t, None] @ Z + 1e-6)
        ys.append(y)
    return torch.cat(ys, dim=2), S if Z is None else torch.cat([S, Z], dim=-1)


def operands(T, rule="plain", normaliser=None, K=64, V=64, B=2, H=3, dtype=torch.float32, state=True):
    """Random arguments by name; q, k, v are views of (B,T,H,.). "own" and "other" weights are positive."""
    if INTERPRETED:
        B, H, K, V = 1, 2, min(K, 70), min(V, 70)
    x = {name: torch.randn(B, T, H, width).transpose(1, 2) for name, width in (("q", K), ("k", K), ("v", V))}
    if normaliser == "own":
        x["q"], x["k"] = F.elu(x["q"]) + 1, F.elu(x["k"]) + 1
    if normaliser == "other":
        x["q_den"], x["k_den"] = torch.rand(B, H, T, K), torch.rand(B, H, T, K)
    x = {name: value.to(dtype) for name, value in x.items()}
    if "decay" in rule:
        x["log_decay"] = -0.2 * torch.rand(B, H, T)
    if "delta" in rule:
        x["k"], x["beta"] = F.normalize(x["k"], dim=-1), 2 * torch.rand(B, H, T)
    if state:
        x["state"] = torch.rand(B, H, K, V + (normaliser is not None))
    return {name: value.to(DEVICE).detach().requires_grad_() for name, value in x.items()}


def call(form, x, normaliser=None, **options):
    """form is the kernels' or the recurrence."""
    own = dict(q_den=x["q"], k_den=x["k"]) if normaliser == "own" else {}
    if form == "kernels":
        form = linear_attention if normaliser is None else normalised_linear_attention
    return form(**x, **own, **options)


def compare(x, limit, normaliser=None, chunk_size=CHUNK):
    """Relative errors of y, the state and every gradient against the recurrence in float64 stay below limit."""
    exact = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    got = call("kernels", x, normaliser, chunk_size=chunk_size)
    wanted = call(recurrence, exact, normaliser)
    assert got[0].dtype == x["q"].dtype and got[1].dtype == torch.float32
    weights = [torch.randn_like(y) for y in got]
    got += torch.autograd.grad(got, list(x.values()), weights)
    wanted += torch.autograd.grad(wanted, list(exact.values()), [weight.double() for weight in weights])
    for name, a, b in zip(["y", "state", *(f"gradient of {name}" for name in x)], got, wanted):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        if name == "gradient of log_decay":  # a difference of two sums
            error /= 2
        assert error < limit, f"{name}: relative error {error:.1e}"                # NaN is not smaller either


# ----------------------------------------------------------------------------------------------------------------------
# The operation


@runs
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [1, 17, 40] if INTERPRETED else [1, 63, 64, 65, 127, 200])
def test_values_state_and_all_gradients_are_those_of_the_recurrence(T, rule):
    compare(operands(T, rule), LIMIT[torch.float32])


@runs
@pytest.mark.parametrize("rule", RULES)
def test_without_a_state_it_starts_from_zeros(rule):
    compare(operands(30, rule, state=False), LIMIT[torch.float32])


@on_gpu
@runs
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [200, 1024])
def test_half_precision_inputs_cost_only_their_rounding(T, rule, dtype):
    x = operands(T, rule, dtype=dtype)
    if "beta" in x:
        x["beta"] = (x["beta"] / 2).detach().requires_grad_()        # above 1, roundings do not fade
    compare(x, LIMIT[dtype])


@runs
@pytest.mark.parametrize("rule", ["plain", "decay"])
@pytest.mark.parametrize("normaliser", ["own", "other"])
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_of_weights_is_divided_by_and_differentiated(dtype, normaliser, rule):
    compare(operands(33 if INTERPRETED else 200, rule, normaliser, dtype=dtype), LIMIT[dtype], normaliser)


@runs
@pytest.mark.parametrize("K, V", [(3, 5), (70, 1), (5, 70)] if INTERPRETED else WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_any_width_up_to_256(dtype, K, V):
    T = 18 if INTERPRETED else 130
    compare(operands(T, "decay", "own", K, V, dtype=dtype), LIMIT[dtype], "own")
    compare(operands(T, "decay", "other", K, V, dtype=dtype), LIMIT[dtype], "other")
    compare(operands(T, "decay delta", None, K, V, dtype=dtype), LIMIT[dtype])


@runs
@pytest.mark.parametrize("chunk_size", [1, 16, 33, 1000])
def test_the_chunk_size_changes_nothing(chunk_size):
    compare(operands(40 if INTERPRETED else 200, "decay delta"), LIMIT[torch.float32], chunk_size=chunk_size)


@runs
@pytest.mark.parametrize("normaliser, rule", [(None, "decay delta"), ("own", "decay"), ("other", "plain")])
def test_any_split_over_calls_equals_one_call(normaliser, rule):
    x = {name: value.detach() for name, value in operands(40 if INTERPRETED else 130, rule, normaliser).items()}
    T = x["q"].shape[2]
    wanted, wanted_state = call("kernels", x, normaliser, chunk_size=CHUNK)
    ys, state = [], x.pop("state")
    for part in zip(*(value.split([1, 17, T - 18], dim=2) for value in x.values())):
        y, state = call("kernels", dict(zip(x, part), state=state), normaliser, chunk_size=CHUNK)
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, dim=2), state), (wanted, wanted_state), rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize("normaliser, rule", [(None, rule) for rule in RULES] + [
    (kind, rule) for kind in ("own", "other") for rule in ("plain", "decay")])
@pytest.mark.parametrize("K, V", [(3, 5), (64, 64), (70, 1)] if INTERPRETED else [(16, 16), (153, 64), (96, 192)])
def test_single_tokens_take_the_kernel_of_one_token_and_are_the_recurrence(K, V, normaliser, rule):
    x = {name: value.detach() for name, value in operands(4, rule, normaliser, K, V).items()}
    wanted = call(recurrence, x, normaliser)
    state = x.pop("state")
    given = state.clone()
    step = kernels.linear_attention_step if normaliser is None else kernels.normalised_linear_attention_step
    for overwrite in (False, True):
        ys, S = [], state
        for part in zip(*(value.split(1, dim=2) for value in x.values())):
            y, S = call(step, dict(zip(x, part), state=S), normaliser, overwrite=overwrite)
            ys.append(y)
        torch.testing.assert_close((torch.cat(ys, dim=2), S), wanted, rtol=1e-5, atol=1e-5)
        assert (S is state) == overwrite
        assert torch.equal(state, given) != overwrite                             # a kept state stays as it was


@runs
def test_the_recurrent_form_of_one_token_without_gradient_is_that_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "runs_on", lambda x: True)                       # interpreted, it is on a CPU
    taken = []
    for name in ("linear_attention_step", "normalised_linear_attention_step"):
        monkeypatch.setattr(kernels, name, lambda *inputs, step=getattr(kernels, name): taken.append(1) or step(*inputs))
    q, k, v = torch.rand(3, 2, 3, 1, 16, device=DEVICE)
    form = model.linear_attention_recurrent
    for call, columns in ((form, 0), (lambda *x, **kept: model.normalised(form, *x, x[0], x[1], **kept), 1)):
        state = torch.rand(2, 3, 16, 16 + columns, device=DEVICE)
        wanted = call(q.clone().requires_grad_(), k, v, state=state)              # a gradient is asked for: no kernel
        with torch.no_grad():
            got = call(q, k, v, state=state)
            for wrong in (state[:1], state[..., 1:]):                             # the kernel would write beside them
                with pytest.raises(ValueError, match="state must have shape"):
                    call(q, k, v, state=wrong)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(taken) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Any log decay <= 0


@runs
@pytest.mark.parametrize("reset", [-math.inf, -1e30, -1e4, -300.0, -100.0])
@pytest.mark.parametrize("normaliser, rule", [(None, "decay"), (None, "decay delta"), ("own", "decay"),
                                              ("other", "decay")])
def test_a_reset_forgets_everything_before_it_and_costs_no_digits_after_it(normaliser, rule, reset):
    x = operands(40 if INTERPRETED else 200, rule, normaliser)
    log_decay = x["log_decay"].detach()
    for t in (0, 5, 6, 15, 16, 33, -1):
        log_decay[..., t] = reset
    x["log_decay"] = log_decay.requires_grad_()
    compare(x, LIMIT[torch.float32], normaliser)
    y, S = call("kernels", x, normaliser, chunk_size=CHUNK)
    gradient = torch.autograd.grad(y.sum() + S.sum(), x["log_decay"])[0]
    assert gradient.isfinite().all()
    if reset <= -300:
        assert (gradient[log_decay == reset] == 0).all()


@runs
@pytest.mark.parametrize("rule", ["decay", "decay delta"])
@pytest.mark.parametrize("strong", [-20.0, -80.0, -87.0])
def test_strong_decays_leave_all_digits_to_the_weak_ones_between_them(strong, rule):
    x = operands(40 if INTERPRETED else 200, rule)
    weak = torch.rand_like(x["log_decay"]) < 0.3
    x["log_decay"] = torch.where(weak, x["log_decay"], strong).detach().requires_grad_()
    compare(x, LIMIT[torch.float32])


@runs
def test_a_log_decay_that_is_no_number_is_not_hidden():
    x = {name: value.detach() for name, value in operands(20, "decay").items()}
    x["log_decay"][..., 3] = math.nan
    y, S = call("kernels", x, chunk_size=CHUNK)
    assert y[:, :, 4:].isnan().all() and S.isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# Around the operation


@runs
def test_slices_of_one_projection_are_read_in_place():
    qkv = torch.randn(2, 40, 3, 2, 16, device=DEVICE, requires_grad=True)                   # (B,T,3,H,D)
    y, _ = linear_attention(*qkv.transpose(1, 3).unbind(2), chunk_size=CHUNK)               # 3 of (B,H,T,D)
    wanted, _ = recurrence(*qkv.transpose(1, 3).unbind(2))
    gradient, wanted_gradient = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (y, wanted))
    torch.testing.assert_close((y, gradient), (wanted, wanted_gradient), rtol=1e-4, atol=1e-3)
    assert y.transpose(1, 2).is_contiguous()                                      # ready for the output projection


@runs
@pytest.mark.parametrize("normaliser, rule", [("own", "plain"), ("other", "plain"), (None, "decay delta")])
def test_torch_compile_takes_it_whole(normaliser, rule):
    x = operands(20 if INTERPRETED else 100, rule, normaliser)

    def step(x):
        y, S = call("kernels", x, normaliser)
        return y.sin(), S
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")):
        y, S = run(x)
        results.append([y, S, *torch.autograd.grad(y.sum() + S.square().sum(), list(x.values()))])
    for got, wanted in zip(*results):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@on_gpu
@runs
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_under_autocast_everything_multiplied_has_its_dtype(normaliser):
    x = operands(70, "plain", normaliser)
    x["v"] = x["v"].detach().bfloat16().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y, S = call("kernels", x, normaliser)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    gradients = torch.autograd.grad(y.float().sum() + S.sum(), list(x.values()))
    assert [gradient.dtype for gradient in gradients] == [value.dtype for value in x.values()]


@runs
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_a_row_of_logits_is_cross_entropy_and_its_gradient_takes_their_place(dtype):
    logits = (3 * torch.randn(7, 5000)).to(dtype).to(DEVICE)
    logits[3, 4096] = 80.0                                                        # a certain token
    targets = torch.tensor([0, 4095, 4096, 4096, 4899, -1, 17], device=DEVICE)
    exact = logits[:, :4900].double().requires_grad_()                           # the other 100 columns are padding
    wanted = F.cross_entropy(exact, targets, ignore_index=-1, reduction="sum")
    wanted.backward()
    loss, nothing = kernels.softmax_loss(logits.clone(), targets, 4900, False)
    same_loss, gradient = kernels.softmax_loss(logits, targets, 4900, True)
    assert nothing is None and loss == same_loss and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0)
    assert (gradient[:, 4900:] == 0).all() and (gradient[5] == 0).all()
    error = (gradient[:, :4900].double() - exact.grad).norm() / exact.grad.norm()
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


def test_without_triton_it_imports_and_says_that_it_is_not_available():
    script = "import sys; sys.modules['triton'] = None; from support import kernels; import torch; " \
             "x = torch.ones(1, 1, 1, 8); assert not kernels.available(x, x)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(kernels.__file__).parents[1])
