"""The demo: a byte-level model on the Python standard library's own source, a few minutes on two CPU cores.

    python prepare.py --dataset=stdlib
    python train.py config/tiny.py
    python sample.py --out_dir=out/tiny --prompt="def "

1.84 M parameters; 288 kB of state per sequence. Five minutes on two idle cores, to 1.03 to 1.07 nats per byte.
Source: gated linear attention alternating with a window, as Based [arXiv 2402.18668] mixes the two.
"""
out_dir = "out/tiny"
dataset = "stdlib"

dim = 192
depth = 4
n_heads = 4
seq_len = 256
mixers = "linear window"  # gated linear attention for the far past, softmax over 64 bytes for the near
decay = "gated"
normaliser = "rms"
short_conv = True
pos = "none"

batch_size = 16
grad_accum = 1
optimizer = "muon"  # AdamW at lr 3e-3 ended these 700 steps at 1.31 to 1.35 nats per byte
lr = 2e-2
warmup_steps = 50
max_steps = 700
eval_interval = 100
save_interval = 100
eval_tokens = 2**15
