"""experiments/recall.py: the data are the published ones, only answers count, finished runs are kept, and a state's bytes are real."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import recall
from experiments.recall import FULL, Part

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = dataclasses.replace(
    recall.SMALL, vocab_size=32, batch_size=32, epochs=4, lrs=(1e-2, 3e-2), seeds=1, models=("softmax d32", "elu d16"),
    train=(Part(16, 2, 2048),), test=(Part(16, 2, 256), Part(32, 4, 64)))


def data(part, vocab_size=FULL.vocab_size, seed=0):
    return recall.make_data([part], vocab_size, seed, CPU)[0]


@pytest.mark.parametrize("part", [part._replace(examples=20) for part in (*FULL.train, *FULL.test)], ids=Part.name)
def test_every_question_is_a_key_of_the_sequence_and_its_answer_the_value_beside_it(part):
    tokens, where, answers = data(part)
    assert tokens.shape == (20, part.T) and where.shape == answers.shape == (20, part.pairs)
    for row, places, values in zip(tokens.tolist(), where.tolist(), answers.tolist()):
        keys, stated = row[0:2 * part.pairs:2], row[1:2 * part.pairs:2]
        assert len(set(keys)) == len(set(stated)) == len(set(places)) == part.pairs
        assert all(1 <= key < 4096 for key in keys) and all(4096 <= value < 8192 for value in stated)
        assert all(place >= 2 * part.pairs and place % 2 == 0 and place < part.T for place in places)
        value_of = dict(zip(keys, stated))
        assert [value_of[row[place]] for place in places] == values
        assert sorted(row[place] for place in places) == sorted(keys)                 # each key is asked for once


def test_first_gaps_follow_the_published_power_law():
    _, where, _ = data(Part(64, 4, 10_000))
    space = 64 // 2 - 4
    counts = Counter(((where[:, 0] - 8) // 2).tolist())                               # the first draw: no replacement yet
    p = torch.arange(1, space + 1).double() ** (0.01 - 1)
    expected = p / p.sum()
    found = torch.tensor([counts[gap] / 10_000 for gap in range(space)], dtype=torch.float64)
    assert (found - expected).abs().max() < 5 * (expected.max() / 10_000).sqrt()


def test_keys_values_and_filling_cover_their_ranges_and_the_seed_decides():
    tokens, where, answers = data(Part(16, 2, 4096), vocab_size=16)
    assert set(tokens[:, 0].tolist()) == set(range(1, 8)) and set(answers.flatten().tolist()) == set(range(8, 16))
    filling = tokens[:, 4:].scatter(1, where - 4, -1)
    assert set(filling.flatten().tolist()) == {-1, *range(16)}
    again, other = (data(Part(16, 2, 4096), vocab_size=16, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)


def test_the_full_setting_is_the_published_one():
    assert sum(part.T * part.examples for part in FULL.train) == 24_320_000
    assert sum(part.pairs * part.examples for part in FULL.train) == 2_800_000
    assert (FULL.vocab_size, FULL.batch_size, FULL.epochs) == (8192, 256, 32)
    assert sorted(round(lr, 4) for lr in FULL.lrs) == [0.001, 0.0032, 0.01, 0.0316]
    assert set(recall.PUBLISHED) <= set(FULL.models)
    for name in FULL.models:
        config = FULL.config(name)
        assert config.depth == 2 and config.mixers[0] == "conv" and config.pos == "none" and config.norm == "layer"
        assert config.n_heads == (2 if "delta" in name else 1) and config.mlp_ratio == 0 and config.tied


def test_the_loss_at_answers_equals_the_masked_loss_over_all_positions_with_its_gradients():
    model = recall.new_model(TINY.config("elu d16"), 0).eval()
    tokens, where, answers = (x[:8] for x in data(TINY.test[1], 32))
    labels = torch.full_like(tokens, -100).scatter(1, where, answers)
    logits, _ = model(tokens)
    full = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    ours = recall.answer_loss(model, recall.hidden(model, tokens), where, answers)
    torch.testing.assert_close(ours, full)
    for mine, theirs in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, full))):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_dropout_acts_on_the_embedding_alone():
    model = recall.new_model(TINY.config("elu d16"), 0)
    assert model.config.dropout == 0.1 and model.training
    x = torch.randn(2, 8, 16)
    assert all(torch.equal(block(x, None, {})[0], block(x, None, {})[0]) for block in model.blocks)
    dropped = [torch.equal(a, b) for a, b in zip(*(model.hidden(torch.ones(2, 8, dtype=torch.long))[0] for _ in range(2)))]
    assert not any(dropped)


@pytest.mark.parametrize("name, size", [
    ("based d64 f16", (153 * 65 + 2 * 64) * 4), ("based d48 f8", (45 * 49 + 2 * 48) * 4), ("elu d64", (64 * 65 + 2 * 64) * 4),
    ("deltanet d64", (2 * 32 * 32 + 3 * 192 + 2 * 64) * 4), ("gated_deltanet d64", (2 * 32 * 64 + 3 * 256 + 2 * 64) * 4),
    ("window64 d128", (2 * 64 * 128 + 2 * 128) * 4), ("softmax d64", (2 * 1024 * 64 + 2 * 64) * 4)])
def test_state_bytes_are_those_of_the_tensors_that_decoding_keeps(name, size):
    assert recall.state_size(FULL.config(name)) == size


@pytest.mark.parametrize("name", [name for name in FULL.models if name in recall.PUBLISHED])
def test_states_have_the_published_size_but_for_the_inputs_that_convolutions_keep(name):
    """The published count: 3 inputs of the first convolution where we keep 2, and none of a delta rule's own."""
    config = FULL.config(name)
    own = 3 * (2 * config.dim + config.n_heads * config.value_dim) * 4 if config.short_conv else 0
    assert abs(recall.state_size(config) - own + config.dim * 4 - recall.PUBLISHED[name][0]) <= 0.02 * recall.PUBLISHED[name][0]


def test_training_twice_in_one_trainer_gives_what_two_trainers_give():
    train, test = (recall.make_data(parts, 32, seed, CPU) for seed, parts in enumerate((TINY.train, TINY.test)))
    def record(trainer, lr):
        found = trainer.run(lr, 0, train, test, 1, float("inf"))
        return found["loss"], found["accuracy"]
    trainer, fresh = (recall.Trainer(TINY.config("elu d16"), TINY, CPU, "fp32", False) for _ in range(2))
    first = record(trainer, 3e-2)
    assert record(trainer, 1e-2) == record(fresh, 1e-2) != first


def test_a_run_that_is_far_behind_is_given_up_and_one_out_of_time_leaves_nothing():
    train, test = (recall.make_data(parts, 32, seed, CPU) for seed, parts in enumerate((TINY.train, TINY.test)))
    trainer = recall.Trainer(TINY.config("elu d16"), TINY, CPU, "fp32", False)
    perfect = [{"mean": 1.0}] * 4
    assert trainer.run(1e-6, 0, train, test, 4, float("inf"), perfect)["end"] == "behind"
    assert trainer.run(1e-6, 0, train, test, 2, 0.0) is None


def test_softmax_solves_a_tiny_setting_in_seconds():
    train, test = (recall.make_data(parts, 32, seed, CPU) for seed, parts in enumerate((TINY.train, TINY.test[:1])))
    trainer = recall.Trainer(TINY.config("softmax d32"), TINY, CPU, "fp32", False)
    record = trainer.run(1e-2, 0, train, test, 20, float("inf"))
    assert record["end"] == "solved" and record["mean"] > 0.99 and record["epoch"] == len(record["history"])


def test_finished_runs_are_skipped_and_a_solved_configuration_needs_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "SMALL", TINY)
    calls = []

    class Counting(recall.Trainer):
        def run(self, lr, seed, *rest):
            calls.append((self.config.mixers[1], lr, seed))
            return super().run(lr, seed, *rest)
    monkeypatch.setattr(recall, "Trainer", Counting)
    tiny = dataclasses.replace(TINY, epochs=1)

    def work():
        calls.clear()
        runs = recall.all_runs(["elu d16"], tiny)
        recall.work(recall.Worker(0, runs, tiny, tmp_path, "cpu", None, "fp32", False, torch.get_num_threads(), math.inf), [0])
        return list(calls)
    assert work() == [("linear", 1e-2, 0), ("linear", 3e-2, 0)]
    assert work() == []
    path = recall.run_file(tmp_path, "elu d16", 3e-2, 0)
    path.unlink()
    assert work() == [("linear", 3e-2, 0)] and path.exists()
    first = recall.run_file(tmp_path, "elu d16", 1e-2, 0)
    first.write_text(json.dumps(json.loads(first.read_text()) | {"end": "solved"}))
    path.unlink()
    assert work() == []                                                               # could not change the figure
    with pytest.raises(recall.UserError, match="other settings"):
        recall.read_runs(tmp_path, TINY, ["elu d16"])
    first.write_text(first.read_text()[:50])                                          # a damaged one is run again
    assert work() == [("linear", 1e-2, 0), ("linear", 3e-2, 0)]


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_program_leaves_no_worker_running(tmp_path):
    program = subprocess.Popen([sys.executable, "-m", "experiments.recall", f"--out_dir={tmp_path}", "--only=elu d32,window16",
                                "--epochs=10000", "--workers=2"], cwd=ROOT, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    workers = []
    while len(workers) < 2:                                                           # and the resource tracker
        assert program.poll() is None
        time.sleep(0.1)
        workers = [child for child in children(program.pid)
                   if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    time.sleep(1)
    program.send_signal(signal.SIGKILL)
    program.wait()
    while any(map(running, workers)):                                                 # however long they take
        time.sleep(0.1)


def test_runs_are_spread_over_the_gpus_and_all_rates_of_one_stay_together(monkeypatch, tmp_path):
    monkeypatch.setattr(recall, "visible_gpus", lambda device: ["0", "5"])
    args = recall.RecallConfig(workers=5)
    workers = recall.plan(list(FULL.models), FULL, tmp_path, torch.device("cuda"), "bf16", args, math.inf)
    assert [worker.gpu for worker in workers] == ["0", "5", "0", "5", "0"]
    runs = [run for worker in workers for run in worker.runs]
    assert len(runs) == len({*runs}) == 4 * (2 * 12 + 3)
    for worker in workers:
        mine = {(name, seed) for name, _, seed in worker.runs}
        assert len(worker.runs) == 4 * len(mine)
        assert [lr for _, lr, _ in worker.runs] == [lr for lr in FULL.lrs for _ in mine]  # all of them at one rate first


def test_names_and_families_may_be_picked():
    models = FULL.models
    assert recall.pick_names("", models) == list(models)
    assert recall.pick_names("deltanet,elu d128", models) == ["deltanet d64", "deltanet d128", "elu d128"]
    for bad in ("elu,nothing", ",", "elu d64,"):
        with pytest.raises(recall.UserError, match="names no configuration"):
            recall.pick_names(bad, models)


def test_labels_in_the_picture_cover_no_other_and_ticks_can_be_read():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, panel = pyplot.subplots()
    panel.set(xscale="log", xlim=(5e3, 2e6), ylim=(0, 1.05))
    recall.readable_ticks(panel)
    points = [(1e4, 0.9), (1e4, 0.9), (1.02e4, 0.91), (1e5, 0.5), (1.1e5, 0.5), (1.2e5, 0.52)]
    recall.place_labels(panel, [(x, y, f"based d{i} f16", "C0") for i, (x, y) in enumerate(points)], points)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in panel.texts]
    assert len(boxes) == 6 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    ticks = [label.get_text() for label in panel.get_xticklabels() if label.get_text()]
    assert {"10k", "20k", "50k", "1M"} <= {*ticks}
    pyplot.close(figure)


@pytest.mark.slow
def test_the_program_ends_with_a_table_in_a_given_time_and_refuses_bad_flags_in_one_line(tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, "-m", "experiments.recall", f"--out_dir={tmp_path}", *flags], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    for flags, wanted in ((("--only=elu,windw16 d32",), "'windw16 d32' names no configuration; is it 'window16 d32'?"), (("--full", "--smoke"), "use one of them")):
        bad = run(*flags)
        assert bad.returncode == 2 and wanted in bad.stderr and "Traceback" not in bad.stderr
    (tmp_path / "costs.json").write_text('{"elu d32": {"byt')                         # is measured again
    done = run("--only=elu", "--epochs=1", "--seeds=1", "--workers=1")
    assert done.returncode == 0 and "| elu d32 |" in done.stdout, done.stderr
    assert "costs.json is damaged and will be measured again" in done.stderr
    assert not list(tmp_path.glob("*.tmp")) and len(list(tmp_path.glob("elu-d32-*.json"))) == 1
    late = run("--only=window16 d32", "--epochs=1", "--seeds=1", "--workers=1", "--minutes=0.0001")
    assert late.returncode == 2 and "no run was finished" in late.stderr
