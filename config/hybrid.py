"""The best model found whose state does not grow: softmax over a window of 256 tokens, alternating with Gated DeltaNet.

    python prepare.py --shards=8
    python train.py config/hybrid.py

The window sees the near past exactly, the gated delta rule keeps the far past in a matrix, and a convolution over 4
tokens stands before both. Gated DeltaNet-H1 (arXiv 2412.06464, section 3.4) mixes the same two in another order, with
a longer window, SwiGLU and AdamW. docs/results.md has what was compared.

44.69 M parameters (18.93 M without the embedding); a sequence's state is 4.13 MB in fp32.
"""
out_dir = "out/hybrid"

mixers = "window linear"
window = 256
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
mlp_ratio = 3.5

optimizer = "muon"
lr = 1e-2
