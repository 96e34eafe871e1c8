"""RetNet (Sun et al. 2023, arXiv 2307.08621): linear attention with a fixed decay for each head, and a gate.

    python prepare.py --shards=8
    python train.py config/retnet.py

Values are twice as wide as keys, and the feed-forward half as wide, as in its section 3.1. Differs: rope, not xPos;
Muon, not AdamW.

44.64 M parameters (18.88 M without the embedding); a sequence's state is 3.15 MB in fp32.
"""
out_dir = "out/retnet"

n_heads = 4
feature_map = "identity"
decay = "fixed"
normaliser = "rms"
output_gate = True
expand_v = 2.0
mlp_ratio = 2.0

optimizer = "muon"
lr = 1e-2
