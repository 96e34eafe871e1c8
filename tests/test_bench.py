"""experiments/bench.py: every part runs on a small model, and its figures are the ones it says."""
import json
import sys

import pytest
import torch

import model
import prepare
import train
from configurator import UserError
from experiments import bench
from model import LM, ModelConfig

SMALL = ["--dim=16", "--depth=2", "--n_heads=2", "--vocab_size=100", "--device=cpu", "--precision=fp32", "--repeats=2",
         "--tokens=128"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(bench, "machine_peaks", lambda device, dtype: (1e12, 1e10))


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()


@pytest.mark.parametrize("mixers", ["linear", "linear window"])
def test_every_part_is_measured_and_written_as_json_and_picture(mixers, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *SMALL, f"--mixers={mixers}", "--seq_lens=32,64", "--positions=8,300", "--prefill=64", "--decode_batch=1,2",
        f"--json={tmp_path / 'b.json'}", f"--plot={tmp_path / 'b.png'}")
    figures = json.loads((tmp_path / "b.json").read_text())
    assert [row["T"] for row in figures["train"]] == [row["T"] for row in figures["eval"]] == [32, 64]
    assert [(row["texts"], row["after"]) for row in figures["decode"]] == [(1, 8), (1, 300), (2, 8), (2, 300)]
    assert len({row["operation"] for row in figures["op"]}) == 6 and len(figures["op"]) == 12
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "Training" in (out := capsys.readouterr().out) and "The operation alone" in out


def test_the_state_of_linear_attention_is_flat_and_the_cache_grows():
    config, options = ModelConfig(dim=16, depth=2, n_heads=2, vocab_size=100), bench.BenchConfig(prefill=64, precision="fp32")
    for mixers, grows in (("linear", 1), ("softmax", 10)):
        sizes = [bench.decoding(ModelConfig(**vars(config) | {"mixers": mixers}), past, 3, options, torch.device("cpu"))[2]
                 for past in (40, 400)]
        assert sizes[1] == pytest.approx(grows * sizes[0], rel=1e-3)


@pytest.mark.parametrize("short_conv", [False, True])
def test_the_preallocated_cache_of_the_peer_gives_what_the_growing_one_gives(short_conv):
    def model(mixers):
        torch.manual_seed(0)
        return LM(ModelConfig(dim=16, depth=2, n_heads=2, vocab_size=50, mixers=mixers, pos="rope", short_conv=short_conv)).eval()
    growing, fixed = model("softmax"), model("fixed_cache")
    prompt = torch.randint(50, (3, 7))
    with torch.no_grad():
        (_, state), (_, other) = growing(prompt[:, :6]), fixed(prompt[:, :6])
        wanted, _ = growing(prompt[:, 6:], state=state)
        other["layers"] = [bench.longer(layer, "fixed_cache", 6) for layer in other["layers"]]
        shapes = [cache.shape for _, caches in other["layers"] for cache in caches]
        found, after = fixed(prompt[:, 6:], state=other)
    torch.testing.assert_close(found, wanted)
    assert [cache.shape for _, caches in after["layers"] for cache in caches] == shapes   # so it can be recorded


def test_decoding_is_timed_on_what_generate_makes(monkeypatch):
    made = []
    generate = LM.generate

    def counted(self, *arguments, **options):
        for result in generate(self, *arguments, **options):
            made.append(1)
            yield result
    monkeypatch.setattr(LM, "generate", counted)
    options = bench.BenchConfig(prefill=64, precision="fp32")
    call, _, _ = bench.decoding(ModelConfig(dim=16, depth=1, n_heads=2, vocab_size=50), 9, 2, options, torch.device("cpu"))
    before = len(made)
    call()
    assert len(made) - before == 32


@pytest.mark.parametrize("flag", ["json", "plot"])
def test_what_cannot_be_written_is_known_before_measuring(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file/b.out"):
        with pytest.raises(UserError, match=f"cannot write .*: use another --{flag}"):
            run(monkeypatch, *SMALL, f"--{flag}={path}")
    for name in ("settings.json", "notes.txt"):
        (tmp_path / name).write_text('{"mine": 1}')
        with pytest.raises(UserError, match=f"{name} exists, and --{flag} wrote no such file"):
            run(monkeypatch, *SMALL, f"--{flag}={tmp_path / name}")


def test_the_form_timed_is_the_operation():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 32, 8, dtype=torch.float64)
    w = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    y = (w.tril() @ v) / w.tril().sum(-1, keepdim=True)
    torch.testing.assert_close(bench.attention(q, k, v, normalise=True), y, atol=1e-5, rtol=1e-5)


def test_a_byte_dataset_is_measured_with_its_own_vocabulary(tmp_path):
    for flags, wanted in (([], 257), (["--vocab_size=1000"], 1000)):
        config, settings = bench.configure(["--dataset=stdlib", f"--data_dir={tmp_path}", *flags], ModelConfig, train.TrainConfig)
        bench.vocabulary(config, settings)
        assert config.vocab_size == wanted


def test_the_card_evaluates_the_checkpoint(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "a-val.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    common = ["--dataset=text", f"--data_dir={tmp_path / 'data'}"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *common, f"--data_files={tmp_path}/*.txt", "--tokenizer=bytes"])
    prepare.main()
    flags = [*common, f"--out_dir={tmp_path / 'out'}", "--precision=fp32", "--device=cpu", "--eval_tokens=512"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--dim=16", "--depth=1", "--n_heads=2", "--seq_len=16", "--max_steps=2",
                                      "--batch_size=2", "--grad_accum=1"])
    train.main()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--eval_only"])
    capsys.readouterr()
    train.main()
    wanted = json.loads(capsys.readouterr().out)["ppl"]
    run(monkeypatch, *flags, "--parts=card", "--repeats=1", f"--json={tmp_path / 'b.json'}")
    row = json.loads((tmp_path / "b.json").read_text())["card"]
    assert row["perplexity"] == pytest.approx(wanted, rel=1e-6) and row["MB a sequence in training"] > 0


def test_a_mixer_in_the_users_own_file_is_measured_named_by_a_flag_or_in_a_config_file(monkeypatch, tmp_path, capsys):
    plugin = tmp_path / "bench_own.py"
    plugin.write_text("import model\nmodel.MIXERS['own'] = model.MIXERS['linear']")
    preset = tmp_path / "preset.py"
    preset.write_text(f"mixers = ['own']\nplugin = {str(plugin)!r}\n")
    for flags in (["--mixers=own", f"--plugin={plugin}"], [str(preset)]):
        monkeypatch.setattr(model, "MIXERS", dict(model.MIXERS))
        monkeypatch.delitem(sys.modules, "plugin_bench_own", raising=False)
        run(monkeypatch, *SMALL, *flags, "--parts=train", "--seq_lens=32", "--memory=False")
        assert "mixers own" in capsys.readouterr().out
        model.MIXERS.pop("own")
    monkeypatch.delitem(sys.modules, "plugin_bench_own", raising=False)
    with pytest.raises(UserError, match="needs --plugin=FILE"):
        run(monkeypatch, *SMALL, "--mixers=own")


@pytest.mark.parametrize("flag, words", [("--parts=speed", "parts are"), ("--seq_lens=1k", "whole numbers"),
                                         ("--decode_batch=0", "at least 1"), ("--repeats=0", "repeats must be")])
def test_bad_values_are_refused_with_the_reason(flag, words, monkeypatch):
    with pytest.raises(UserError, match=words):
        run(monkeypatch, flag)
