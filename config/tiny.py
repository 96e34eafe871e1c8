"""The demo: a byte-level model on the Python standard library's own source, a few minutes on two CPU cores.

    python prepare.py --dataset=stdlib
    python train.py config/tiny.py
    python sample.py --out_dir=out/tiny --prompt="def "
"""
out_dir = "out/tiny"
dataset = "stdlib"

dim = 192
depth = 4
n_heads = 6
seq_len = 256
mixers = "linear"

batch_size = 16
grad_accum = 1
lr = 3e-3
warmup_steps = 50
max_steps = 1000
eval_interval = 250
save_interval = 250
eval_tokens = 2**16
