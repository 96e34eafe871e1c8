"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): the delta rule, unit keys, short convolutions.

    python prepare.py --shards=8
    python train.py config/deltanet.py

Differs: the paper has SwiGLU and AdamW; GELU and Muon are better here.

44.69 M parameters (18.93 M without the embedding); a sequence's state is 1.68 MB in fp32.
"""
out_dir = "out/deltanet"

n_heads = 4
feature_map = "silu_l2"
delta = True
normaliser = "rms"
short_conv = True
pos = "none"

optimizer = "muon"
lr = 1e-2
