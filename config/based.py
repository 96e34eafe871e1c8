"""Based (Arora et al. 2024, arXiv 2402.18668): gated convolutions, Taylor linear attention, a 64-token window.

    python prepare.py --shards=8
    python train.py config/based.py

Differs: the paper's 27 layers repeat conv, linear, window, conv, conv; six layers repeat the first three here. Its
convolution is the one of the authors' recall experiment; in their language model it is wider. Its MLP is SwiGLU; GELU
is better here, and mlp_ratio gives it the parameters of the base model. Muon, where the paper has AdamW. Rope in the
linear layers too, which changes nothing (docs/results.md).

44.64 M parameters (18.89 M without the embedding); a sequence's state is 1.16 MB in fp32.
"""
out_dir = "out/based"

mixers = "conv linear window"
feature_map = "taylor"
feature_dim = 16
window = 64
mlp_ratio = 4.75

optimizer = "muon"
lr = 5e-3
