"""Which preset: one epoch of the mix, 16.4 M tokens, at equal tokens and rate, three seeds (regime a).

    python prepare.py --dataset=mix --data_files='mix/*.json.gz'
    python -m experiments.compare experiments/sweeps/which_preset.py --minutes=8

30 trainings of 45 M parameters. The rate was the best of 0.005, 0.01 and 0.02 for nearly all arms;
--lrs=0.005,0.01,0.02 searches for each arm's own.
"""
arms = ["config/softmax.py", "config/softmax.py,short_conv=True", "config/hybrid.py", "config/hybrid_softmax.py",
        "config/gated_deltanet.py", "config/deltanet.py", "config/retnet.py", "config/based.py", "config/base.py",
        "config/base.py,decay=gated,short_conv=True,pos=none"]
lrs = "0.01"
seeds = 3
jobs = 3
out_dir = "out/which_preset"
checkpoints = False
plot = "out/which_preset/compare.png"

dataset = "mix"
dim = 512
depth = 6
seq_len = 1024
optimizer = "muon"
batch_size = 32
grad_accum = 1
warmup_steps = 50
max_steps = 500
log_interval = 5
save_interval = 250
eval_tokens = 2**19
