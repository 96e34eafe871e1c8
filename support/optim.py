"""Optimisation: the learning rate of each step, AdamW, and Muon."""
from collections import defaultdict

import torch


def lr_at(step, config):
    """The learning rate of step 0, 1, ...: linear warmup, flat, then linear to zero at max_steps."""
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay = (config.max_steps - step) / max(1, config.decay_frac * (config.max_steps - config.warmup_steps))
    return config.lr * max(0.0, min(1.0, warmup, decay))


def make_optimizer(model, config):
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Decay on matrices only: a norm's scale or a gate's bias has no reason to be near zero.
    """
    def kind(name, p):
        if p.dim() < 2:
            return "vector"
        hidden = name.startswith("blocks.") and name.split(".")[-2] in ("qkv", "out", "up", "gate")
        return "hidden" if hidden and config.optimizer == "muon" else "matrix"
    groups = [{"params": [p for name, p in model.named_parameters() if kind(name, p) == which],
               "weight_decay": config.weight_decay * (which != "vector"), "momentum": 0.95 * (which == "hidden")}
              for which in ("matrix", "vector", "hidden")]
    return Muon([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but groups with a momentum take Muon's step: along the orthogonal matrix nearest to the momentum M.

        M = momentum M + G;   W = W - lr (0.2 sqrt(max(rows, columns)) orthogonal(G + momentum M) + weight_decay W)

    The factor makes steps as large as AdamW's are, so that one lr and weight decay serve both (arXiv 2502.16982).
    Differs from torch.optim.Muon: fp32 on a CPU, where its bf16 can be hundreds of times slower; torch before 2.9.
    """

    @torch.no_grad()
    def step(self):
        groups, self.param_groups = self.param_groups, [g for g in self.param_groups if not g["momentum"]]
        super().step()
        self.param_groups = groups
        for group in (g for g in groups if g["momentum"]):
            same_shape = defaultdict(list)                                        # one batch of products for each shape
            for W in (p for p in group["params"] if p.grad is not None):
                if not self.state[W]:
                    # AdamW's loading wants a step.
                    self.state[W].update(step=torch.zeros(()), momentum=torch.zeros_like(W))
                M = self.state[W]["momentum"].mul_(group["momentum"]).add_(W.grad)
                same_shape[W.shape].append((W, W.grad.add(M, alpha=group["momentum"])))
            for shape, pairs in same_shape.items():
                Ws, G = [W for W, _ in pairs], torch.stack([G for _, G in pairs])
                U = orthogonal(G.bfloat16() if G.is_cuda else G).to(G.dtype) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(Ws, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(Ws, list(U.unbind()), alpha=-group["lr"])


def orthogonal(G, steps=5):
    """The nearest orthogonal matrix of each of G (..., rows, columns), roughly: singular values end in 0.7..1.2.

    Newton-Schulz iterations of the odd polynomial that Muon's author tuned (K. Jordan 2024): only matrix products.
    """
    X = G if G.shape[-2] <= G.shape[-1] else G.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if G.shape[-2] <= G.shape[-1] else X.mT


def load_optimizer(optimizer, state):
    """Moments from the checkpoint, settings (weight decay, betas, fused) from this run's config."""
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, state["param_groups"]):
        group["lr"] = saved["lr"]                                                 # best.pt may come before a next step
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
