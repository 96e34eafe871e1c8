"""support/speedups.py: each gives what the plain way gives, in values and gradients, and in less memory where it says so."""
import pytest
import torch
import torch.nn.functional as F

from model import LM, ModelConfig, Projection, choose, elu, naive_softmax_attention, rope_table, rotate
from support import speedups
from support.speedups import SoftmaxLoss
from test_model import TINY, Largest, close, same_numbers_every_time  # noqa: F401 (a fixture)


def linear_cross_entropy(x, weight, targets, vocab_size, chunk):
    return speedups.linear_cross_entropy(x, weight, targets, vocab_size, SoftmaxLoss(), chunk)


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_chunked_cross_entropy_is_cross_entropy_in_value_and_gradients(chunk):
    x, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (30, 128))
    targets = torch.randint(70, (30,))                                           # the other 58 rows are padding
    targets[[0, 7, 8, 29]] = -1
    loss = linear_cross_entropy(x, weight, targets, 70, chunk=chunk)
    wanted = F.cross_entropy(x @ weight[:70].T, targets, ignore_index=-1)
    close(loss, wanted, 1e-12)
    close(*(torch.autograd.grad(3 * z, (x, weight)) for z in (loss, wanted)), 1e-12)
    assert linear_cross_entropy(x, weight, targets.clamp(max=-1), 70, chunk=chunk) == 0


def test_the_loss_in_blocks_of_rows_is_that_of_all_rows():
    logits, targets = torch.randn(50, 50304), torch.randint(-1, 50257, (50,))
    wanted, wanted_grad = SoftmaxLoss()(logits.clone(), targets, 50257, True)
    seen = []

    def loss(block, *others):
        seen.append(len(block))
        return SoftmaxLoss()(block, *others)
    got, grad = speedups.in_cache(loss, logits, targets, 50257, True)
    assert len(seen) > 2 and sum(seen) == 50
    close(got, wanted, 1e-6)
    assert torch.equal(grad, wanted_grad)


def test_no_more_than_one_chunk_of_logits_is_in_memory():
    x, weight = (torch.randn(n, 8, requires_grad=True) for n in (4096, 512))
    with Largest() as seen:
        linear_cross_entropy(x, weight, torch.randint(512, (4096,)), 512, chunk=64).backward()
    assert seen.elements <= 64 * 512                                             # and not 4096 * 512
    lm, idx = LM(ModelConfig(**{**TINY, "vocab_size": 50257, "depth": 1})), torch.zeros(1, 2048, dtype=torch.long)
    with Largest() as seen:
        lm(idx, idx)[0].backward()
    assert seen.elements <= 2 ** 25                                              # and not 2048 * 50257


@pytest.mark.parametrize("shape, pieces", [((), 1), ((1, 1), 1), ((2, 4), 1), ((3, 3), 0), ((0, 3), 0)])
def test_a_projection_of_few_tokens_is_the_same_product_read_by_all_cores(shape, pieces):
    module, x = Projection(256, 1040), torch.randn(*shape, 256, requires_grad=True)
    with torch.profiler.profile() as profile:
        y = module(x)
    products = sum(event.name == "aten::bmm" for event in profile.events())
    assert products == (pieces and torch.backends.mkl.is_available())
    wanted = F.linear(x, module.weight)
    close(y, wanted, 1e-5)
    close(torch.compile(module, dynamic=False, fullgraph=True, backend="eager")(x), y, 1e-5)  # no graph breaks
    close(*(torch.autograd.grad(z.square().sum(), (x, module.weight)) for z in (y, wanted)), 1e-3)


def test_elu_and_rope_in_bf16_are_those_of_fp32_in_values_and_gradients(monkeypatch):
    monkeypatch.setattr(speedups, "BF16_UNITS", True)
    table = rope_table(torch.arange(300), 64)
    x = torch.tensor([-30, -7, -1, -0.0, 0.5, 3, 100]).repeat(1, 2, 300, 10)[..., :64].bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    for function in (elu, lambda x: rotate(x, table)):
        y, wanted = function(x), function(wide)
        upstream = torch.randn(y.shape)
        assert y.dtype == torch.bfloat16
        got = y, *torch.autograd.grad(y, x, upstream.bfloat16())
        for got, exact in zip(got, (wanted, *torch.autograd.grad(wanted, wide, upstream))):
            assert (got - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str)
def test_a_convolution_on_a_cpu_is_the_sum_of_shifted_products_in_values_and_gradients(dtype, limit):
    x, weight = torch.randn(3, 2000, 6).to(dtype).requires_grad_(), torch.randn(4, 6, requires_grad=True)
    upstream = torch.randn(3, 1997, 6).to(dtype)
    exact_x, exact_weight = (z.detach().double().requires_grad_() for z in (x, weight))
    y = speedups.causal_conv(x, weight)
    wanted = sum(exact_x[:, 3 - i:2000 - i] * exact_weight[i] for i in range(4))
    got = y, *torch.autograd.grad(y, (x, weight), upstream)
    assert [z.dtype for z in got] == [dtype, dtype, torch.float32]
    for z, exact in zip(got, (wanted, *torch.autograd.grad(wanted, (exact_x, exact_weight), upstream.double()))):
        assert (z.double() - exact).norm() < limit * exact.norm()


def run_fast(monkeypatch, new_state, steps=5):
    """Which of these steps, of four tokens first and then of one, are fast; each leaves new_state(state)."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: lambda idx, state: ("fast", state))
    step = speedups.fast_step(lambda idx, state: ("read", new_state(state)), compiled=True)
    state, seen = None, []
    for tokens in [4, 4] + [1] * (steps - 2):
        said, state = step(torch.zeros(2, tokens), state)
        seen.append(said)
    return seen


def test_a_step_is_fast_once_one_token_leaves_the_shapes_of_its_state(monkeypatch):
    fixed = run_fast(monkeypatch, lambda state: [None, torch.zeros(3)])
    assert fixed == ["read", "read", "read", "fast", "fast"]
    growing = run_fast(monkeypatch, lambda state: [torch.zeros(len(state[0]) + 1 if state else 1)])
    assert set(growing) == {"read"}


@pytest.mark.parametrize("part", [5, torch.zeros(1, device="meta")], ids=["number", "another device"])
def test_a_state_with_what_a_graph_would_freeze_is_not_recorded(part, monkeypatch):
    assert set(run_fast(monkeypatch, lambda state: [torch.zeros(3), part])) == {"read"}


def generated(lm, count, idx, **options):
    with torch.no_grad():
        return torch.stack([tokens for tokens, _ in lm.generate(idx, count, **options)], dim=1)


def test_a_compiled_step_makes_the_same_tokens(monkeypatch):
    compiled = []
    compile = torch.compile

    def traced(step, **options):
        compiled.append(step)
        return compile(step, backend="eager", dynamic=False)
    monkeypatch.setattr(torch, "compile", traced)
    torch.manual_seed(0)
    lm, idx = LM(ModelConfig(vocab_size=70, dim=16, depth=2, n_heads=2)).eval(), torch.randint(70, (2, 7))
    for options in (dict(temperature=0), dict(temperature=0.7, top_k=9, top_p=0.9)):
        slow, fast = (generated(lm, 9, idx, generator=torch.Generator().manual_seed(1), compiled=flag, **options)
                      for flag in (False, True))
        assert torch.equal(slow, fast)
    assert len(compiled) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["recorded", "compiled"])
@pytest.mark.parametrize("mixers", ["linear", "window linear"])
def test_a_step_on_a_gpu_makes_the_tokens_that_reading_the_text_whole_makes(compiled, mixers):
    torch.manual_seed(0)
    lm = LM(ModelConfig(vocab_size=70, dim=64, depth=2, n_heads=2, mixers=mixers, window=8)).cuda().eval()
    idx = torch.randint(70, (2, 7), device="cuda")
    text = generated(lm, 40, idx, temperature=0, compiled=compiled)
    with torch.no_grad():
        logits, _ = lm(torch.cat([idx, text], dim=1))
    best = logits[:, 6:-1].max(-1).values
    chosen = logits[:, 6:-1].gather(-1, text[..., None])[..., 0]
    assert (best - chosen).max() < 1e-4                                               # a tie may fall otherwise


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_draws_the_numbers_that_the_generator_would_have_given():
    torch.manual_seed(0)
    lm = LM(ModelConfig(vocab_size=70, dim=64, depth=2, n_heads=2)).cuda().eval()
    idx = torch.zeros(2, 7, dtype=torch.long, device="cuda")
    fast = generated(lm, 20, idx, generator=torch.Generator("cuda").manual_seed(1))
    generator, text = torch.Generator("cuda").manual_seed(1), idx
    with torch.no_grad():
        for _ in range(20):
            tokens = choose(lm(text)[0][:, -1], generator=generator)
            text = torch.cat([text, tokens[:, None]], dim=1)
    assert (fast == text[:, 7:]).float().mean() > 0.9    # rounding may turn one near a border


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("T, w", [(5, 4), (300, 64), (1024, 256)])
def test_a_window_on_a_gpu_is_the_naive_one_in_values_and_gradients(T, w):
    inputs = [torch.randn(2, T, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    wanted = naive_softmax_attention(q.float(), k.float(), v.float(), window=w)
    upstream = torch.randn_like(wanted)
    wanted_gradients = torch.autograd.grad(wanted, inputs, upstream)
    for window in (speedups.flash_window, speedups.window_in_blocks):
        y = window(q, k, v, w)
        gradients = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
        for got, exact in zip((y, *gradients), (wanted, *wanted_gradients)):
            assert (got.float() - exact.float()).norm() < 0.01 * exact.float().norm()
