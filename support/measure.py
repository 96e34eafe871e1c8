"""What decoding costs, measured by what sample.py runs: LM.generate."""
import itertools

import torch

from support.machine import autocast


def cast_for_decoding(model, precision):
    """The model with its matrices in the precision of the products: cast once, not at every token."""
    for p in model.parameters():
        if precision == "bf16" and p.dim() == 2:
            p.data = p.data.bfloat16()
    return model.eval()


def decoding_calls(model, prompt, steps, device, precision, state=None, warm_up=4, compiled=False):
    """A function whose every call takes the next `steps` tokens of model.generate after prompt (B,T).

    The prompt and what is set up once, in the first steps, are behind it.
    """
    tokens = model.generate(prompt, 10**9, temperature=0, state=state, compiled=compiled)

    def take(count=steps):
        with torch.no_grad(), autocast(device, precision):
            for _ in itertools.islice(tokens, count):
                pass
    take(warm_up)
    return take
