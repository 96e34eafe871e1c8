
import torch, model

class Mean(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out = torch.nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, state, ropes):
        total, count = state or (0, 0)
        return self.out(total + x.cumsum(1)), None

model.MIXERS["mean"] = Mean
