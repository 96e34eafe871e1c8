"""Fine-tuning: from the weights of a trained model, on text of your own, with a short schedule and a low rate.

    python prepare.py --dataset=letters --data_files=letters.txt --tokenizer=bytes
    python train.py config/finetune.py --init_from=out/tiny
    python sample.py --out_dir=out/finetune --prompt="def "

The model's settings are those of the model it starts from; set here or by a flag are only the ones to change. After a
softmax model, --mixers=linear makes a linear one of it: what both have is kept, and this run trains the rest.
"""
out_dir = "out/finetune"
dataset = "letters"

batch_size = 16
grad_accum = 1
lr = 3e-4
warmup_steps = 20
max_steps = 200
eval_interval = 50
save_interval = 50
eval_tokens = 2**15
