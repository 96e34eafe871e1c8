"""support/optim.py: the schedule, what decays, and that Muon's step is what it says."""
import math

import pytest
import torch

from model import LM, ModelConfig
from support import speedups
from support.optim import Muon, load_named_state, lr_at, make_optimizer, named_state, orthogonal
from train import TrainConfig


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    config = TrainConfig(lr=1.0, warmup_steps=9, max_steps=109, decay_frac=0.5)
    rates = [lr_at(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and rates[9:60] == [1.0] * 51
    assert rates[84] == pytest.approx(0.5) and rates[109] == 0 and rates[108] == pytest.approx(0.02)


def test_only_matrices_decay_and_adamw_is_fused():
    model = LM(ModelConfig(257, 16, 2, 2, decay="gated", normaliser="rms", short_conv=True, norm="layer"))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (not any(word in name for word in ("norm", "bias", "log_A"))), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert optimizer.defaults["fused"]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = LM(ModelConfig(257, 16, 3, 2, mixers="linear window conv", decay="gated", short_conv=True, mlp="swiglu"))
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", lr=0.01))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[0].backward()
    optimizer.step()
    hidden = {name for name, p in model.named_parameters() if "momentum" in optimizer.state[p]}
    assert hidden == {f"{name}.weight" for name, module in model.blocks.named_modules(prefix="blocks")
                      if isinstance(module, torch.nn.Linear) and not name.endswith("decay")}
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("shape", [(48, 16), (16, 16), (16, 48)])
def test_a_step_of_muon_is_along_the_orthogonal_matrix_nearest_to_the_momentum(shape):
    torch.manual_seed(0)
    U, S, V = torch.linalg.svd(G := torch.randn(3, *shape), full_matrices=False)
    got = U.mT @ orthogonal(G) @ V.mT                                       # on the singular vectors: diagonal
    assert (got - torch.diag_embed(torch.diagonal(got, dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert torch.diagonal(got, dim1=-2, dim2=-1)[S > 0.1 * S[:, :1]].sub(0.95).abs().max() < 0.3

    W = torch.nn.Parameter(torch.randn(shape))
    optimizer = Muon([{"params": [W], "momentum": 0.9, "lr": 0.1, "weight_decay": 0.5}])
    M, expected = torch.zeros(shape), W.detach().clone()
    for G in torch.randn(3, *shape):
        W.grad, M = G.clone(), 0.9 * M + G
        optimizer.step()
        expected = expected - 0.1 * (0.2 * max(shape) ** 0.5 * orthogonal(G + 0.9 * M) + 0.5 * expected)
    assert torch.allclose(W, expected, atol=1e-5)


@pytest.mark.parametrize("mixers, parts", [("linear", (16, 16, 32)), ("softmax", (16, 16, 16)), ("window", (16, 16, 16))])
def test_muon_orthogonalises_q_k_and_v_each_by_itself_with_a_step_of_the_same_size(mixers, parts):
    """Each part of qkv moves along U V^T of its own gradient: singular values 0.7..1.2 times 0.2 sqrt(max(rows, columns))."""
    torch.manual_seed(0)
    model = LM(ModelConfig(257, 16, 1, 2, mixers=mixers, expand_v=2.0 if mixers == "linear" else 1.0))
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", lr=0.1, weight_decay=0))
    W = model.blocks[0].mixer.qkv.weight
    before = W.detach().clone()
    W.grad = torch.randn_like(W) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(torch.tensor(parts))[:, None]
    optimizer.step()
    for move, G in zip((before - W.detach()).split(parts), W.grad.split(parts)):
        U, S, V = torch.linalg.svd(G, full_matrices=False)
        along = U.mT @ move @ V.mT / (0.1 * 0.2 * max(G.shape) ** 0.5)
        assert (along - along.diag().diag()).abs().max() < 1e-3
        assert along.diag()[S > 0.1 * S[0]].sub(0.95).abs().max() < 0.3
        assert move.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.2)


@pytest.mark.parametrize("precision, units, same", [("bf16", True, False), ("bf16", False, True), ("fp32", True, True)])
def test_muon_steps_in_bf16_on_a_cpu_that_trains_in_it_and_has_units(precision, units, same, monkeypatch):
    def moved(precision):
        torch.manual_seed(0)
        model = LM(ModelConfig(257, 64, 1, 2))
        optimizer = make_optimizer(model, TrainConfig(optimizer="muon", lr=0.1, weight_decay=0, precision=precision))
        W = model.blocks[0].mlp.up.weight
        before = W.detach().clone()
        W.grad = torch.randn_like(W)
        optimizer.step()
        return W.detach() - before
    monkeypatch.setattr(speedups, "BF16_UNITS", units)
    got, wanted = moved(precision), moved("fp32")
    assert torch.equal(got, wanted) == same
    assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_an_optimizer_that_there_is_not_is_refused_with_those_there_are():
    config = TrainConfig()
    config.optimizer = "sgd"
    with pytest.raises(ValueError, match="optimizer must be adamw or muon, got 'sgd'"):
        make_optimizer(LM(ModelConfig(vocab_size=9, dim=8, depth=1, n_heads=1)), config)
    with pytest.raises(ValueError, match="optimizer must be adamw or muon, got 'sgd'"):
        TrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="precision must be auto or fp32 or bf16, got 'fp16'"):
        TrainConfig(precision="fp16")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_to_be_skipped_changes_neither_weights_nor_moments_and_the_next_is_as_without_it(optimizer):
    def trained(skips):
        torch.manual_seed(0)
        model = LM(ModelConfig(257, 16, 2, 2, decay="gated", normaliser="rms"))
        ours = make_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.1))
        for step, skip in enumerate(skips):
            generator = torch.Generator().manual_seed(step - sum(skips[:step]))
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan) if skip else torch.randn(p.shape, generator=generator)
            ours.step(torch.tensor(skip))
        return [*model.state_dict().values()], [[*map(torch.as_tensor, s.values())] for s in ours.state.values()]
    for skips in ([True, False, False], [False, True, False], [False, False, True]):
        (weights, moments), (theirs, their_moments) = trained(skips), trained([False, False])
        assert all(torch.equal(a, b) for a, b in zip(weights, theirs))
        assert all(torch.equal(x, y) for a, b in zip(moments, their_moments) for x, y in zip(a, b))


def small(**options):
    torch.manual_seed(0)
    return LM(ModelConfig(257, 16, 1, 2, **options))


def trained(model, **options):
    optimizer = make_optimizer(model, TrainConfig(**options))
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[0].backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_by_name_and_by_position_go_to_the_same_parameters(kind):
    model = small(decay="gated", normaliser="rms")
    ours = trained(model, optimizer=kind)
    named, positions = named_state(ours), ours.state_dict()
    assert named["state"].keys() == dict(model.named_parameters()).keys()
    for saved in (named, positions):
        other = make_optimizer(model, TrainConfig(optimizer=kind))
        assert load_named_state(other, saved, ours.names) == []
        for p in model.parameters():
            assert ours.state[p].keys() == other.state[p].keys()
            assert all(torch.equal(ours.state[p][key], other.state[p][key]) for key in ours.state[p])


def test_moments_that_fit_no_parameter_are_left_out_and_those_without_any_are_named():
    tied, untied = small(), small(tied=False)
    for source, target, new in ((tied, untied, ["unembed.weight"]), (untied, tied, [])):
        theirs = trained(source)
        ours = make_optimizer(target, TrainConfig())
        assert load_named_state(ours, theirs.state_dict(), theirs.names) == new
        assert all(state["exp_avg"].shape == p.shape for p, state in ours.state.items())
    reshaped = small(mlp_ratio=2.0)
    assert load_named_state(make_optimizer(reshaped, TrainConfig()), named_state(trained(tied)), []) == [
        "blocks.0.mlp.up.weight", "blocks.0.mlp.out.weight"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_is_that_of_torch_up_to_its_bf16():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(32, 96)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.95}
    optimizers = (Muon([{"params": [ours], **settings}]),
                  torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw"))
    for G in torch.randn(4, 32, 96):
        ours.grad, theirs.grad = G.clone(), G.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - 0.98 ** 4).norm()
