"""Based (Arora et al. 2024, arXiv 2402.18668): Taylor linear attention, a 64-token window, gated convolutions.

    python prepare.py
    python train.py config/based.py

Differs: the paper's 27 layers repeat conv, linear, window, conv, conv; six layers repeat the first three here.
"""
out_dir = "out/based"

mixers = "conv linear window"
feature_map = "taylor"
feature_dim = 16
window = 64
mlp = "swiglu"
