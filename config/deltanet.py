"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): the delta rule, unit keys, short convolutions.

    python prepare.py
    python train.py config/deltanet.py

44.71 M parameters (18.96 M beside the embedding); a sequence's state is 1.68 MB in fp32.
"""
out_dir = "out/deltanet"

n_heads = 4
feature_map = "silu_l2"
delta = True
normaliser = "rms"
short_conv = True
pos = "none"
mlp = "swiglu"
