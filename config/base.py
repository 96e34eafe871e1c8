"""The paper card's model: linear attention with elu+1, dim 512, depth 6; 44.6 M parameters on C4.

    python prepare.py
    python train.py config/base.py
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
grad_accum = 2  # pieces of 32,768 tokens keep an H100 busy; take 4 for half the memory
lr = 2e-4
weight_decay = 0.1
max_steps = 20000  # 1.3 billion tokens
