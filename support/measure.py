"""What decoding costs, measured by what sample.py runs: LM.generate."""
import itertools

import torch

from support.machine import autocast, seconds


def cast_for_decoding(model, precision):
    """Matrices in the precision of the products, as checkpoint.open_model has them."""
    for p in model.parameters() if precision == "bf16" else ():
        p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    return model.eval()


def decoding_times(model, prompt, steps, device, precision, state=None, warm_up=4, repeats=3):
    """Seconds of a step of model.generate after prompt (B,T), `repeats` times, each over `steps` tokens.

    The prompt and what is set up once, the first steps, are not counted.
    """
    tokens = model.generate(prompt, warm_up + repeats * steps, temperature=0, state=state)

    def take(count):
        with torch.no_grad(), autocast(device, precision):
            for _ in itertools.islice(tokens, count):
                pass
    take(warm_up)
    return [seconds(lambda: take(steps), device) / steps for _ in range(repeats)]
