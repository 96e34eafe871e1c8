"""Seven presets with 1.2 M parameters on Python's source: what `python -m experiments.compare` runs."""
arms = ["config/base.py", "config/softmax.py", "config/based.py", "config/retnet.py", "config/deltanet.py",
        "config/gated_deltanet.py,feature_dim=24", "config/hybrid.py,feature_dim=24"]
lrs = "0.01,0.02"

dataset = "stdlib"
dim = 128
n_heads = 4
seq_len = 256
window = 64
optimizer = "muon"
batch_size = 8
grad_accum = 1
warmup_steps = 50
max_steps = 500
