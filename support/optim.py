"""Optimisation: the learning rate of each step, AdamW, Muon, and which losses are spikes."""
import math
from collections import defaultdict, deque

import numpy as np
import torch

from support import speedups
from support.checks import check_choice

OPTIMIZERS = ("adamw", "muon")  # values of train.py's setting
# The blocks' matrices, which Muon takes.
HIDDEN = ("qkv", "out", "up", "gate", "both")


def lr_at(step, config):
    """The learning rate of step 0, 1, ...: linear warmup, flat, then linear to zero at max_steps."""
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay = (config.max_steps - step) / max(1, config.decay_frac * (config.max_steps - config.warmup_steps))
    return config.lr * max(0.0, min(1.0, warmup, decay))


def make_optimizer(model, config):
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Decay on matrices only: a norm's scale or a gate's bias has no reason to be near zero.
    """
    groups = []
    all_names = []
    for kind, names in parameter_groups(model, config.optimizer).items():
        all_names += names
        groups.append({
            "params": [model.get_parameter(name) for name in names],
            "weight_decay": 0.0 if kind == "vector" else config.weight_decay,
            "momentum": 0.95 if kind == "hidden" else 0.0,
        })
    optimizer = Muon(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    optimizer.names = all_names
    optimizer.in_bf16 = config.precision == "bf16" and speedups.BF16_UNITS
    for module in model.modules():
        if len(getattr(module, "parts", ())) > 1:
            optimizer.parts[module.weight] = module.parts
    return optimizer


def parameter_groups(model, optimizer):
    """{kind: names of its parameters}, in the order in which an optimiser counts them."""
    check_choice("optimizer", optimizer, OPTIMIZERS)
    groups = {"matrix": [], "vector": [], "hidden": []}
    for name, p in model.named_parameters():
        kind = "matrix"
        if p.dim() < 2:
            kind = "vector"
        elif optimizer == "muon" and name.startswith("blocks.") and name.split(".")[-2] in HIDDEN:
            kind = "hidden"
        groups[kind].append(name)
    return {kind: names for kind, names in groups.items() if names}


class Muon(torch.optim.AdamW):
    """AdamW, but groups with a momentum take Muon's step: along the orthogonal matrix nearest to the momentum M.

        M = momentum M + G;   W = W - lr (0.2 sqrt(max(rows, columns)) orthogonal(G + momentum M) + weight_decay W)

    The factor gives the step a root mean square of 0.2 lr whatever the shape, about that of AdamW, so that one lr and
    weight decay serve both (arXiv 2502.16982). A weight that is several matrices one below the other, as q, k and v in
    one projection, is stepped as these: `parts` holds their rows, and each is orthogonalised by itself, with its own
    rows and columns in the factor.
    Differs from torch.optim.Muon: fp32 on a CPU unless it trains in bf16 and has units for it, without which that is
    hundreds of times slower; torch before 2.9.
    """

    def __init__(self, groups, **options):
        self.names = []                                                           # of the parameters of all groups
        self.in_bf16 = False                                                      # the products of a CPU; a GPU's are
        self.parts = {}                                                           # {weight: rows of each matrix in it}
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, skip=None):
        """One step; none where skip, a tensor on the parameters' device, is true. The host need not know."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["momentum"]]
        self.grad_scale = None
        self.found_inf = None if skip is None else skip.float()                   # how torch's fused AdamW names it
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["momentum"]:
                self.orthogonal_step(group, skip)

    def orthogonal_step(self, group, skip):
        weights = [W for W in group["params"] if W.grad is not None]
        if not weights:
            return
        gradients = [W.grad for W in weights]
        for W in weights:
            if not self.state[W]:                                                 # AdamW's loading wants a step
                self.state[W].update(step=torch.zeros(()), momentum=torch.zeros_like(W))
        Ms = [self.state[W]["momentum"] for W in weights]
        kept = group["momentum"]
        rate = group["lr"]
        decayed = 1 - rate * group["weight_decay"]
        if skip is not None:                                                      # then M = 1 M + 0 and W = 1 W - 0
            gradients = [G.masked_fill(skip, 0) for G in gradients]
            kept = torch.where(skip, 1.0, kept)
            decayed = torch.where(skip, 1.0, decayed)
            rate = torch.where(skip, 0.0, rate)
        torch._foreach_mul_(Ms, kept)
        torch._foreach_add_(Ms, gradients)
        directions = torch._foreach_add(gradients, Ms, alpha=group["momentum"])
        torch._foreach_mul_(weights, decayed)

        same_shape = defaultdict(list)                                            # one batch of products for each shape
        for W, G in zip(weights, directions):
            rows = self.parts.get(W, [len(W)])
            for W_part, G_part in zip(W.split(rows), G.split(rows)):
                same_shape[W_part.shape].append((W_part, G_part))
        for shape, pairs in same_shape.items():
            Ws, Gs = zip(*pairs)
            G = torch.stack(Gs)
            U = orthogonal(G.bfloat16() if G.is_cuda or self.in_bf16 else G).to(G.dtype)
            U *= rate * (0.2 * max(shape) ** 0.5)
            torch._foreach_sub_(Ws, U.unbind())


def orthogonal(G, steps=5):
    """The nearest orthogonal matrix of each of G (..., rows, columns), roughly: singular values end in 0.7..1.2.

    Newton-Schulz iterations of the odd polynomial that Muon's author tuned (K. Jordan 2024): only matrix products.
    """
    wide = G.shape[-2] <= G.shape[-1]
    X = G if wide else G.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if wide else X.mT


class Spikes:
    """Watches the loss: is it 6 standard deviations above the last 128?"""

    def __init__(self, recent=()):
        self.recent = deque(recent, maxlen=128)

    def __call__(self, loss):
        limit = math.inf
        if len(self.recent) == 128:
            limit = np.mean(self.recent) + 6 * np.std(self.recent)
        if math.isfinite(loss):
            self.recent.append(loss)
        return bool(loss > limit)


# ----------------------------------------------------------------------------------------------------------------------
# The optimiser's state, by the names of parameters


def named_state(optimizer):
    """optimizer.state_dict(), but with the name of each parameter instead of its position."""
    names = optimizer.names
    saved = optimizer.state_dict()
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    return {"state": {names[i]: saved["state"][i] for i in sorted(saved["state"])}, "param_groups": groups}


def load_named_state(optimizer, saved, names, step=0):
    """Moments from a checkpoint, each to the parameter of its name; settings (weight decay, betas) from this run.

    Args: saved, what named_state returned, or a state_dict by position, as older checkpoints have it; names, those of
      the positions; step, that of the checkpoint.
    Returns: the names of parameters that start without moments after step 0: the checkpoint has none that fit.
    """
    saved_state = {names[key] if isinstance(key, int) else key: state for key, state in saved["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    state = {}
    new = []
    for group, parameters in zip(groups, optimizer.param_groups):
        group["lr"] = saved["param_groups"][0]["lr"]                              # best.pt may come before a next step
        moments = {"momentum"} if group["momentum"] else {"exp_avg", "exp_avg_sq"}
        for i, p in zip(group["params"], parameters["params"]):
            name = optimizer.names[i]
            theirs = saved_state.get(name, {})
            if theirs.keys() == moments | {"step"} and all(theirs[key].shape == p.shape for key in moments):
                state[i] = theirs
            elif saved_state or step:
                new.append(name)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return new


def split_state(saved, model, mesh, device):
    """named_state with its moments split over the processes as the parameters of the model are (machine.shard)."""
    from torch.distributed.tensor import distribute_tensor                        # here: it takes 0.8 s to import
    for name, state in saved["state"].items():
        p = model.get_parameter(name)
        for key, value in state.items():
            if value.shape == p.shape:
                state[key] = distribute_tensor(value.to(device), mesh, p.placements)
    return saved
