"""Claims about support/kernels.py: on a GPU the Triton kernels are the operation that model.py defines, in values, states and
all gradients, against the quadratic form in float64. With no GPU they are skipped, unless Triton interprets them:
    pip install triton "numpy<2.4"; TRITON_INTERPRET=1 python -m pytest tests/test_support_kernels.py
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import FEATURE_MAPS, linear_attention_quadratic
from support import kernels
from support.kernels import linear_attention_triton

WIDTHS = [(16, 16), (64, 1), (153, 64), (80, 48), (256, 256)]
INTERPRETED = kernels.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RULES = ["plain", "decay", "delta", "decay delta"]
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}
CHUNK = 16 if INTERPRETED else 64

runs = pytest.mark.skipif(not INTERPRETED and not (kernels.triton and DEVICE == "cuda"),
                          reason="needs an Nvidia GPU with Triton, or TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def operands(T, rule="plain", normaliser=None, K=64, V=64, B=2, H=3, dtype=torch.float32, state=True):
    """Random arguments by name; q, k, v are views of (B,T,H,.). "sum" divides by their weights, "rope" by others'."""
    if INTERPRETED:
        B, H, K, V = 1, 2, min(K, 20), min(V, 20)
    x = {name: torch.randn(B, T, H, width).transpose(1, 2) for name, width in (("q", K), ("k", K), ("v", V))}
    if normaliser == "sum":
        x["q"], x["k"] = F.elu(x["q"]) + 1, F.elu(x["k"]) + 1
    if normaliser == "rope":
        x["q2"], x["k2"] = torch.rand(B, H, T, K), torch.rand(B, H, T, K)
    x = {name: value.to(dtype) for name, value in x.items()}
    if "decay" in rule:
        x["log_decay"] = -0.2 * torch.rand(B, H, T)
    if "delta" in rule:
        x["k"], x["beta"] = F.normalize(x["k"], dim=-1), torch.rand(B, H, T)
    if state:
        x["state"] = torch.rand(B, H, K, V + (normaliser is not None))
    return {name: value.to(DEVICE).detach().requires_grad_() for name, value in x.items()}


def call(form, x, normaliser=None, **options):
    x = dict(x)
    others = x.pop("q2", None), x.pop("k2", None)
    return form(**x, divide_by={None: False, "sum": True, "rope": others}[normaliser], **options)


def compare(x, limit, normaliser=None, chunk_size=CHUNK, **options):
    """Relative errors of y, the state and every gradient against the quadratic form in float64 stay below limit."""
    exact = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    got = call(linear_attention_triton, x, normaliser, chunk_size=chunk_size, **options)
    wanted = call(linear_attention_quadratic, exact, normaliser, **options)
    assert got[0].dtype == x["q"].dtype and got[1].dtype == torch.float32
    weights = [torch.randn_like(y) for y in got]
    got += torch.autograd.grad(got, list(x.values()), weights)
    wanted += torch.autograd.grad(wanted, list(exact.values()), [weight.double() for weight in weights])
    for name, a, b in zip(["y", "state", *(f"gradient of {name}" for name in x)], got, wanted):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        assert error < limit, f"{name}: relative error {error:.1e}"                # NaN is not smaller either


# ----------------------------------------------------------------------------------------------------------------------
# The operation


@runs
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [1, 17, 40] if INTERPRETED else [1, 63, 64, 65, 127, 200])
def test_values_state_and_all_gradients_are_those_of_the_quadratic_form(T, rule):
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
    compare(operands(T, rule, dtype=dtype), LIMIT[dtype])


@runs
@pytest.mark.parametrize("rule", ["plain", "decay"])
@pytest.mark.parametrize("normaliser", ["sum", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_normaliser_is_divided_by_and_differentiated(dtype, normaliser, rule):
    compare(operands(33 if INTERPRETED else 200, rule, normaliser, dtype=dtype), LIMIT[dtype], normaliser)


@runs
@pytest.mark.parametrize("K, V", [(3, 5), (20, 1)] if INTERPRETED else WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_any_width_up_to_256(dtype, K, V):
    T = 18 if INTERPRETED else 130
    compare(operands(T, "decay", "sum", K, V, dtype=dtype), LIMIT[dtype], "sum")
    compare(operands(T, "decay delta", None, K, V, dtype=dtype), LIMIT[dtype])


@runs
@pytest.mark.parametrize("chunk_size", [1, 16, 33, 1000])
def test_the_chunk_size_changes_nothing(chunk_size):
    compare(operands(40 if INTERPRETED else 200, "decay delta"), LIMIT[torch.float32], chunk_size=chunk_size)


@runs
@pytest.mark.parametrize("normaliser", [None, "sum", "rope"])
def test_a_feature_map_with_a_kernel_is_expanded(normaliser):
    x = operands(20, "decay", normaliser, K=4)
    x["state"] = torch.rand(*x["v"].shape[:2], 15, x["state"].shape[-1], device=DEVICE, requires_grad=True)
    compare(x, LIMIT[torch.float32], normaliser, expand=FEATURE_MAPS["taylor"])


@runs
@pytest.mark.parametrize("normaliser, rule", [(None, "decay delta"), ("sum", "decay"), ("rope", "plain")])
def test_any_split_over_calls_equals_one_call(normaliser, rule):
    x = {name: value.detach() for name, value in operands(40 if INTERPRETED else 130, rule, normaliser).items()}
    T = x["q"].shape[2]
    wanted, wanted_state = call(linear_attention_triton, x, normaliser, chunk_size=CHUNK)
    ys, state = [], x.pop("state")
    for part in zip(*(value.split([1, 17, T - 18], dim=2) for value in x.values())):
        y, state = call(linear_attention_triton, dict(zip(x, part), state=state), normaliser, chunk_size=CHUNK)
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, dim=2), state), (wanted, wanted_state), rtol=1e-4, atol=1e-4)


@runs
@pytest.mark.parametrize("rule", ["decay", "decay delta"])
def test_extreme_decay_gives_no_nan(rule):
    x = operands(40 if INTERPRETED else 200, rule)
    steps = torch.tensor([-1e4, -50.0, 0.0, -1e-6], device=DEVICE)
    x["log_decay"] = steps[torch.randint(4, x["log_decay"].shape, device=DEVICE)].requires_grad_()
    y, S = linear_attention_triton(**x, chunk_size=CHUNK)
    for result in (y, S, *torch.autograd.grad(y.sum() + S.sum(), list(x.values()))):
        assert result.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Around the operation


@runs
def test_slices_of_one_projection_are_read_in_place():
    qkv = torch.randn(2, 40, 3, 2, 16, device=DEVICE, requires_grad=True)                   # (B,T,3,H,D)
    y, _ = linear_attention_triton(*qkv.transpose(1, 3).unbind(2), chunk_size=CHUNK)         # 3 of (B,H,T,D)
    wanted, _ = linear_attention_quadratic(*qkv.transpose(1, 3).unbind(2))
    gradient, wanted_gradient = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (y, wanted))
    torch.testing.assert_close((y, gradient), (wanted, wanted_gradient), rtol=1e-4, atol=1e-3)
    assert y.transpose(1, 2).is_contiguous()                                      # ready for the output projection


@runs
@pytest.mark.parametrize("normaliser, rule", [("sum", "plain"), ("rope", "plain"), (None, "decay delta")])
def test_torch_compile_takes_it_whole(normaliser, rule):
    x = operands(20 if INTERPRETED else 100, rule, normaliser)

    def step(x):
        y, S = call(linear_attention_triton, x, normaliser)
        return y.sin(), S
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")):
        y, S = run(x)
        results.append([y, S, *torch.autograd.grad(y.sum() + S.square().sum(), list(x.values()))])
    for got, wanted in zip(*results):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_shapes_that_do_not_fit_are_rejected():
    q = torch.randn(1, 2, 5, 4)
    for wrong in (dict(k=q[..., :3]), dict(v=q[:, :, :4]), dict(log_decay=q[..., 0, :]), dict(beta=q[..., 0, :]),
                  dict(state=q), dict(state=torch.zeros(1, 2, 4, 4), divide_by=True),
                  dict(beta=q[..., 0], divide_by=True)):
        with pytest.raises(ValueError, match="must have shape|divide_by needs"):
            linear_attention_triton(**{**dict(q=q, k=q, v=q), **wrong})


def test_without_triton_it_imports_and_says_that_it_is_not_available():
    script = "import sys; sys.modules['triton'] = None; import torch; from support import kernels; " \
             "x = torch.ones(1, 1, 1, 8); assert not kernels.available(x, x)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(kernels.__file__).parent.parent)
