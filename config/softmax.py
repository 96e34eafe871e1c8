"""The baseline: the base model with softmax attention (Vaswani et al. 2017, arXiv 1706.03762); nothing else differs.

    python prepare.py --shards=8
    python train.py config/softmax.py
    python train.py config/softmax.py --short_conv --out_dir=out/softmax_conv    # the stronger baseline

44.64 M parameters (18.88 M without the embedding); a sequence's state is 25.17 MB in fp32 after 1024 tokens, and grows
with the text.
"""
out_dir = "out/softmax"
dataset = "c4"

dim = 512
depth = 6
n_heads = 8
seq_len = 1024
mixers = "softmax"
pos = "rope"

batch_size = 64
grad_accum = 4  # on an H100 take 2: larger pieces keep it busy
optimizer = "muon"
lr = 1e-2
weight_decay = 0.1
max_steps = 20000  # 1.3 billion tokens
