"""The paper card's model: linear attention, dim 512, depth 6, elu+1 as in
Transformers are RNNs (Katharopoulos et al. 2020, arXiv 2006.16236).

    python prepare.py --shards=8
    python train.py config/base.py

44.64 M parameters (18.88 M without the embedding); a sequence's state is 0.80 MB in fp32.
Differs: trained by Muon, as all presets are; the paper's optimizer is one flag away: --optimizer=adamw --lr=2e-4.
"""
out_dir = "out/base"
dataset = "c4"

dim = 512
depth = 6
n_heads = 8
seq_len = 1024
mixers = "linear"
feature_map = "elu"
normaliser = "sum"
pos = "rope"

batch_size = 64
grad_accum = 4  # 12 GB on a CPU; on an H100 take 2: larger pieces keep it busy
optimizer = "muon"
lr = 1e-2
weight_decay = 0.1
max_steps = 20000  # 1.3 billion tokens
