"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): the delta rule, unit keys, short convolutions.

    python prepare.py
    python train.py config/deltanet.py
"""
out_dir = "out/deltanet"

n_heads = 4
feature_map = "silu_l2"
delta = True
normaliser = "rms"
short_conv = True
pos = "none"
mlp = "swiglu"
