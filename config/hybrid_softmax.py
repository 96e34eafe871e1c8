"""Two layers of Gated DeltaNet to one of full softmax; Qwen3-Next and Kimi Linear (arXiv 2510.26692) have three to one.

    python prepare.py --shards=8
    python train.py config/hybrid_softmax.py

The softmax layers recall exactly what the matrices of the others cannot hold, so the state grows with the text, in a
third of the layers.

44.69 M parameters (18.93 M without the embedding); a sequence's state is 9.68 MB in fp32 after 1024 tokens, and grows
with the text.
"""
out_dir = "out/hybrid_softmax"

mixers = "linear linear softmax"
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
mlp_ratio = 3.333

optimizer = "muon"
lr = 1e-2
