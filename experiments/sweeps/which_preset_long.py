"""Which preset: 65.5 M tokens that do not repeat, the mix and Python's packages, two seeds (regime b).

    python -m experiments.python_source --out=python
    python prepare.py --dataset=mix_python --data_files='mix/*.json.gz python/*.jsonl.gz'
    python -m experiments.compare experiments/sweeps/which_preset_long.py --minutes=9

20 trainings of 2,000 steps. Mix and source are validated each apart.
"""
arms = ["config/softmax.py", "config/softmax.py,short_conv=True", "config/hybrid.py", "config/hybrid_softmax.py",
        "config/gated_deltanet.py", "config/deltanet.py", "config/retnet.py", "config/based.py", "config/base.py",
        "config/base.py,decay=gated,short_conv=True,pos=none"]
lrs = "0.01"
seeds = 2
jobs = 3
out_dir = "out/which_preset_long"
checkpoints = False
plot = "out/which_preset_long/compare.png"

dataset = "mix_python"
dim = 512
depth = 6
seq_len = 1024
optimizer = "muon"
batch_size = 32
grad_accum = 1
warmup_steps = 50
max_steps = 2000
log_interval = 10
save_interval = 500
eval_tokens = 2**20
