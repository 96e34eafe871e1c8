"""checkpoint.py: a checkpoint is whole or refused by name."""
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CHECKPOINT, load_checkpoint
from configurator import UserError
from model import LM, ModelConfig
from test_train import as_it_was, data, flip, refusal, run, same  # noqa: F401 (fixtures)


def test_a_cut_or_flipped_checkpoint_is_refused_by_name_or_unharmed(run, refusal):
    run()
    path = Path("out/ckpt.pt")
    whole, content, rng, unharmed = path.read_bytes(), load_checkpoint(path), random.Random(0), 0
    for i in range(400):
        path.write_bytes(whole[:rng.randrange(len(whole))] if i % 4 == 0 else whole)
        if i % 4:
            flip(path, rng.randrange(len(whole)), rng.randrange(8))
        try:
            assert same(load_checkpoint(path), content) and i % 4 > 0         # only zip's padding has no checksum
            unharmed += 1
        except UserError as error:
            assert "out/ckpt.pt is damaged" in str(error)
    assert unharmed < 30
    path.write_bytes(whole[:len(whole) // 2])
    assert "out/ckpt.pt is damaged" in refusal()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content, message", [
    (Trap(), "is damaged or not"), ({"model": Trap()}, "is damaged or not"), (5, "not a checkpoint"),
    ({"model": {}}, "it lacks best_loss, config, data"),
    (dict.fromkeys(CHECKPOINT) | {"model_config": {"depht": 3}}, "another version of model.py: its model has")])
def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(refusal, tmp_path, content, message):
    (tmp_path / "run/out").mkdir(parents=True)
    torch.save(content, tmp_path / "run/out/ckpt.pt")
    assert message in refusal() and not Path("trapped").exists()


NEVER_WRITTEN = [
    ("step", "3"), ("step", -3), ("step", 2**60), ("step", True), ("tokens", "9"), ("model", None), ("model", {"embed.weight": 3}),
    ("model", {"embed.weight": torch.ones(3, dtype=torch.long)}), ("model", {"embed.weight": torch.ones(3, 3).to_sparse()}),
    ("model_config", None), ("model_config", {"dim": "x"}), ("model_config", {"mixers": 5}), ("model_config", {"depth": 10**9}),
    ("model_config", [1]), ("data", None), ("data", {"tokenizer": "bytes"}), ("optimizer", [1]), ("config", 5), ("best_loss", "x"), ("skips", 1)]
NO_TRAINING = [
    ("optimizer", None), ("optimizer", {}), ("optimizer", {"state": {"embed.weight": 5}, "param_groups": [{"lr": 1.0}]}),
    ("config", None), ("config", {}), ("config", {"precision": "fp64", "batch_size": 1}), ("rng", None), ("rng", {}),
    ("rng", {"cpu": torch.zeros(3)}), ("skips", [1]), ("recent_losses", ["a"]), ("tokens", None)]


@pytest.mark.parametrize("words, changes", [("is damaged or not a checkpoint (", NEVER_WRITTEN),
                                            ("does not hold what a run needs to resume (its ", NO_TRAINING)])
def test_a_whole_file_that_says_what_train_never_writes_is_refused_in_one_line(run, refusal, words, changes):
    run("--max_steps=1")
    content = load_checkpoint(Path("out/ckpt.pt"))
    for key, value in changes:
        torch.save(content | {key: value}, "out/ckpt.pt")
        said = refusal("--max_steps=2", "--resume=changed")
        assert words in said and not re.search("None|object|iterable|attribute", said), (key, value, said)
    torch.save(content | {"model_config": content["model_config"] | {"n_heads": -1}}, "out/ckpt.pt")
    assert "cannot be made: n_heads must be at least 1" in refusal("--max_steps=2", "--resume=changed")


def test_tensors_without_numbers_are_no_checkpoint(run, refusal):
    run("--max_steps=1")
    content = load_checkpoint(Path("out/ckpt.pt"))
    moments = content["optimizer"]["state"]
    for change in (lambda x: x.to_sparse(), lambda x: x.to("meta"), torch.Tensor.int, lambda x: x + 1j):
        state = {name: {key: change(x) for key, x in values.items()} for name, values in moments.items()}
        torch.save(content | {"optimizer": content["optimizer"] | {"state": state}}, "out/ckpt.pt")
        assert "to resume (its optimizer state is damaged)" in refusal("--max_steps=2", "--resume=changed")
        torch.save(content | {"model": {name: change(x) for name, x in content["model"].items()}}, "out/ckpt.pt")
        assert "which is not a weight)" in refusal("--max_steps=2", "--resume=changed")
    torch.save(content | {"rng": {"cpu": torch.zeros_like(content["rng"]["cpu"])}}, "out/ckpt.pt")
    assert "to resume (its random numbers are damaged)" in refusal("--max_steps=2", "--resume=changed")


def test_an_optimizer_that_a_checkpoint_names_and_there_is_not_is_refused_with_those_there_are(run, refusal):
    run("--max_steps=1")
    content = load_checkpoint(Path("out/ckpt.pt"))
    torch.save(content | {"config": content["config"] | {"optimizer": "sgd"}}, "out/ckpt.pt")
    assert "to resume (its optimizer is 'sgd', not adamw or muon): " in refusal("--max_steps=2", "--resume=changed")


@pytest.mark.parametrize("setting", ["dim", "vocab_size", "seq_len"])
def test_settings_far_larger_than_the_weights_are_damage_and_take_no_memory(run, refusal, setting):
    run("--max_steps=1", "--pos=learned")
    content = load_checkpoint(Path("out/ckpt.pt"))
    torch.save(content | {"model_config": content["model_config"] | {setting: 10**12}}, "out/ckpt.pt")
    assert "is damaged or not a checkpoint (its embed" in refusal("--eval_only")


def test_moments_that_a_checkpoint_lacks_are_said_to_start_anew(run):
    run("--max_steps=1")
    content = load_checkpoint(Path("out/ckpt.pt"))
    torch.save(content | {"optimizer": content["optimizer"] | {"state": {}}}, "out/ckpt.pt")
    result = run("--max_steps=2", "--resume=changed")
    assert result.code == 0 and "the optimizer state is reset for embed.weight, " in result.err


def test_a_file_of_the_users_own_is_not_advised_to_be_deleted(refusal, tmp_path):
    (tmp_path / "text.txt").write_text("mine")
    said = refusal(f"--init_from={tmp_path}/text.txt", "--out_dir=new")
    assert "text.txt is damaged or not a checkpoint (" in said and "delete" not in said


def test_only_what_would_work_is_advised_where_shapes_differ(run, refusal):
    run("--max_steps=1", "--pos=learned")
    for flag in ("--pos=rope", "--seq_len=8", "--dim=32"):
        said = refusal(flag, "--max_steps=2", "--resume=changed")
        assert "changed_model" not in said and "init_from" not in said
        assert "init_from" not in refusal(flag, "--max_steps=2", "--resume=changed_model")
    flags = "--pos=learned", "--mixers=conv", "--max_steps=2"
    assert "--init_from=out/ckpt.pt and another" in refusal(*flags, "--resume=changed_model")
    assert run(*flags, "--init_from=out/ckpt.pt", "--out_dir=new", "--resume=false").code == 0


def old_and_new(**options):
    """A checkpoint's weights, a model of the same settings, and some tokens."""
    small = dict(vocab_size=70, dim=16, depth=2, n_heads=2, **options)
    return LM(ModelConfig(**small)).state_dict(), LM(ModelConfig(**small)), torch.randint(70, (2, 23))


@torch.no_grad()
def test_weights_from_before_windows_had_convolutions_give_the_same_logits():
    weights, lm, idx = old_and_new(mixers="window")
    lm_with_convolutions = LM(ModelConfig(**vars(lm.config) | {"short_conv": True}))
    lm.load_state_dict(weights)
    checkpoint.load_weights(lm_with_convolutions, {"model": dict(weights)})
    assert torch.equal(lm_with_convolutions(idx)[0], lm(idx)[0])


def test_weights_of_the_gated_convolution_of_before_are_refused_by_name():
    weights, lm, _ = old_and_new(mixers="conv")
    old = {name.replace("gate.weight", "both.weight"): weight for name, weight in weights.items()}
    with pytest.raises(UserError, match="`conv` layers of an earlier version"):
        checkpoint.load_weights(lm, {"model": old})


def test_a_forbidden_pickle_is_refused_in_our_words(refusal, tmp_path):
    (tmp_path / "run/out").mkdir(parents=True)
    torch.save({"model": Trap()}, tmp_path / "run/out/ckpt.pt")
    line = refusal()
    assert "more than tensors and plain values, which is never run" in line and "weights_only" not in line


@pytest.mark.parametrize("name", ["ckpt.pt", "metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named_and_neither_waited_for_nor_advised_to_be_deleted(run, refusal, name, make):
    run("--max_steps=3")
    os.replace(Path("out", name), "elsewhere")
    make(Path("out", name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_train.contents", lambda folder: None)
        line = refusal("--max_steps=3")
    assert f"cannot read out/{name} (it is not a file)" in line and "delete" not in line


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run, refusal, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")
    run("--max_steps=3")
    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", denied)
    assert "cannot read out/ckpt.pt (Permission denied): fix that" in refusal()


def test_a_shared_models_card_says_what_it_is_how_to_load_it_licence_data_and_loss(run):
    pytest.importorskip("safetensors")
    run("--max_steps=2")
    checkpoint.load_pretrained("out").save_pretrained("shared")
    card = Path("shared/README.md").read_text()
    best = load_checkpoint(Path("out/best.pt"))["best_loss"]
    for said in ("license:", "linear-attention language model", "python sample.py --init_from=", "`text`", f"{best:.4f}",
                 "to step 2, 128 tokens"):
        assert said in card, said


def test_a_shared_model_with_settings_that_we_do_not_know_is_refused(run, refusal):
    pytest.importorskip("safetensors")
    run("--max_steps=1")
    checkpoint.load_pretrained("out").save_pretrained("shared")
    settings = json.loads(Path("shared/config.json").read_text())
    Path("shared/config.json").write_text(json.dumps(settings | {"depht": 3, "rope_scale": 2}))
    assert "another version of model.py: its config.json has depht, rope_scale" in refusal("--init_from=shared", "--out_dir=new")


def test_a_hub_that_does_not_answer_is_one_line_at_once_and_a_kept_copy_needs_no_network(run, refusal, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    asked = []
    download = hub.hf_hub_download

    def unreachable(*args, **options):
        asked.append(options)
        raise ConnectionError("no network")

    def noted(*args, local_files_only):                                           # else: again and again for 25 s
        asked.append(local_files_only)
        return download(*args, local_files_only=True)
    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", noted)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", "cache")
    line = refusal("--init_from=someone/model", "--out_dir=new")
    assert line.endswith("hub gives (it does not answer, and no copy is kept here: check the network)\n")
    assert asked == [{"timeout": 10}, True]
    run("--max_steps=1")
    lm = checkpoint.load_pretrained("out")
    lm.save_pretrained("cache/models--someone--model/snapshots/abc")
    Path("cache/models--someone--model/refs").mkdir()
    Path("cache/models--someone--model/refs/main").write_text("abc")
    assert torch.equal(checkpoint.load_pretrained("someone/model").embed.weight, lm.embed.weight)


def test_a_kept_checkpoint_takes_no_room_of_its_own(tmp_path):
    (tmp_path / "ckpt.pt").write_text("x")
    checkpoint.keep(tmp_path / "ckpt.pt", 5, 2)
    assert (tmp_path / "ckpt-00000005.pt").samefile(tmp_path / "ckpt.pt")


def test_keep_drops_the_checkpoints_of_an_abandoned_branch_first(tmp_path):
    for name in ("ckpt.pt", *(f"ckpt-000000{step}.pt" for step in (20, 30, 40)), "ckpt-mine.pt"):
        (tmp_path / name).write_text(name)
    for step in (22, 24):
        checkpoint.keep(tmp_path / "ckpt.pt", step, 3)
    assert [path.name[5:-3] for path in sorted(tmp_path.glob("ckpt-*"))] == ["00000020", "00000022", "00000024", "mine"]
