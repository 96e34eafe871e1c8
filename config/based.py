"""Based (Arora et al. 2024, arXiv 2402.18668): Taylor linear attention, a 64-token window, gated convolutions.

    python prepare.py
    python train.py config/based.py

Differs: the paper's 27 layers repeat conv, linear, window, conv, conv; six layers repeat the first three here. The
mlp_ratio gives it the parameters of the base model.

44.61 M parameters (18.85 M beside the embedding); a sequence's state is 1.16 MB in fp32.
"""
out_dir = "out/based"

mixers = "conv linear window"
feature_map = "taylor"
feature_dim = 16
window = 64
mlp = "swiglu"
mlp_ratio = 4.4
