"""Gated DeltaNet layers in turn with softmax over a short window, as Gated DeltaNet-H1 (arXiv 2412.06464, section 3.4).

    python prepare.py
    python train.py config/hybrid.py

The order of the layers is that paper's; the window and the widths here were not searched for.

44.64 M parameters (18.89 M beside the embedding); a sequence's state is 2.50 MB in fp32.
"""
out_dir = "out/hybrid"

mixers = "linear window"
window = 128
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
mlp = "swiglu"
mlp_ratio = 3.5
