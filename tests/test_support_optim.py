"""support/optim.py: the schedule, what decays, and that Muon's step is what it says."""
import pytest
import torch

from model import LM, ModelConfig
from support.optim import Muon, lr_at, make_optimizer, orthogonal
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
