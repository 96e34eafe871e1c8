"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464): the delta rule with a gate that forgets, and an output gate.

    python prepare.py --shards=8
    python train.py config/gated_deltanet.py

Widths as in its section 3.4: keys 0.75 dim, values 1.5 dim in all, so the mixer has 6 dim^2 parameters.
Differs: the paper has SwiGLU and AdamW; GELU and Muon are better here.

44.70 M parameters (18.94 M without the embedding); a sequence's state is 1.88 MB in fp32.
"""
out_dir = "out/gated_deltanet"

n_heads = 4
feature_map = "silu_l2"
feature_dim = 96
expand_v = 1.5
decay = "gated"
delta = True
normaliser = "rms"
short_conv = True
output_gate = True
pos = "none"
mlp_ratio = 3.0

optimizer = "muon"
lr = 1e-2
