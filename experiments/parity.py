"""State tracking: parity, which a delta rule learns where its beta reaches 2, and not where it stays below 1.

    python -m experiments.parity                  about four minutes of one CPU core

After each bit the model says whether the number of ones so far is odd. A state that only decays and adds cannot track
that. A delta rule scales what the state holds along its key by 1 - beta: by 0 to 1 where beta is at most 1, and by -1
to 1 where beta is at most 2. At -1 every one flips a sign, and that is parity. The model is trained on 40 bits, and so
on every length up to 40, and tested far beyond, as in Grazzi et al. 2024 (Unlocking state-tracking in linear RNNs
through negative eigenvalues, arXiv 2411.12537, section 5.1).
"""
import sys
from dataclasses import dataclass

from configurator import command, configure, help_first

help_first(__name__, __file__, config_file=False)

from support.machine import pick_device, progress, say                            # support comes before torch
from support.report import table

import torch

from model import LM, ModelConfig

START = 2                                                                         # the token before the first bit


@dataclass
class ParityConfig:
    steps: int = 700                 # training steps
    batch_size: int = 64             # sequences in a step
    bits: int = 40                   # bits of a training sequence
    lr: float = 3e-2                 # learning rate, which falls linearly to 0 in the second half
    dim: int = 32                    # width of the model
    depth: int = 1                   # layers of the model
    seeds: int = 3                   # trainings of each kind
    device: str = "auto"             # as for train.py


def sequences(count, bits, generator, device):
    """(Tokens, parities so far), both (count, bits + 1)."""
    ones = torch.randint(2, (count, bits), generator=generator)
    start = torch.full((count, 1), START)
    tokens = torch.cat([start, ones], dim=1)
    parities = torch.cat([0 * start, ones.cumsum(1) % 2], dim=1)
    return tokens.to(device), parities.to(device)


def train(model, config, device, seed):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    for step in progress(range(config.steps), leave=False):
        optimizer.param_groups[0]["lr"] = config.lr * min(1, 2 * (1 - step / config.steps))
        loss, _ = model(*sequences(config.batch_size, config.bits, generator, device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model, bits, device):
    """Share of right parities over the last half of the positions: those that are not in reach of training."""
    tokens, parities = sequences(max(1, 2**15 // bits), bits, torch.Generator().manual_seed(0), device)
    logits, _ = model(tokens)
    return (logits.argmax(-1) == parities)[:, bits // 2:].double().mean().item()


def main():
    config, = configure(sys.argv[1:], ParityConfig, config_file=False)
    device = pick_device(config.device)
    rows = []
    for beta_max in (1, 2):
        for seed in range(config.seeds):
            torch.manual_seed(seed)
            model = LM(ModelConfig(vocab_size=3, dim=config.dim, depth=config.depth, n_heads=2, mixers="linear",
                                   feature_map="silu_l2", delta=True, beta_max=beta_max, normaliser="rms", pos="none"))
            model.to(device)
            train(model, config, device, seed)
            row = {"beta to": beta_max, "seed": seed}
            row |= {f"{bits} bits": f"{accuracy(model, bits, device):.3f}" for bits in (config.bits, 256, 4096)}
            say(str(row))
            rows.append(row)
    table("Parity: accuracy over the last half of the positions", rows)


if __name__ == "__main__":
    command(main)
