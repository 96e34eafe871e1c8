"""support/report.py: who watches a run sees all of it and changes nothing; a picture that cannot be drawn fails no run."""
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import train
from checkpoint import load_checkpoint
from configurator import UserError
from support import report
from support.report import check_picture, picture, plot_losses
from test_train import as_it_was, at_step, contents, data, records, refusal, run, same  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent


def test_any_log_is_drawn_and_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    tmp_path /= "\udc80 $b{$"
    tmp_path.mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": null}\n{"step": 2, "tokens": 16, "lo')
    with monkeypatch.context() as patch:
        patch.setattr(report, "say", lambda line: None)                             # capsys cannot hold this name
        plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_losses(tmp_path / "nowhere")
    assert "no loss.png: pip install matplotlib to draw it\n" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_that_is_not_here_does_not_keep_a_picture_from_being_drawn(tmp_path, backend):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0}\n')
    script = f"from pathlib import Path; from support.report import plot_losses; plot_losses(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env=os.environ | {"MPLBACKEND": backend})
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_picture_has_the_format_of_its_ending_and_may_be_drawn_again(tmp_path, ending, begins):
    path = tmp_path / f"a.{ending}"
    for _ in range(2):
        check_picture(path)
        picture(path, lambda axes: axes.plot([1, 2]))
        assert path.read_bytes().startswith(begins)


def test_no_picture_is_drawn_over_another_file_or_without_a_known_ending(tmp_path):
    for name in ("photo.png", "thesis.pdf"):
        (tmp_path / name).write_bytes(b"\x89PNG of a camera")
        with pytest.raises(UserError, match=f"{name} exists, and --plot wrote no such file: use another --plot"):
            check_picture(tmp_path / name)
    with pytest.raises(UserError, match="loss.jpeg2 must end in .png or .pdf or .svg"):
        check_picture(tmp_path / "loss.jpeg2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png", "thesis.pdf"]


@pytest.mark.parametrize("name, text", [("metrics.jsonl", '{"loss": 1.0, "epoch": 3}\n'), ("metrics.jsonl", "notes"),
                                        ("metrics.jsonl", "a\nb\nc\n"), ("loss.png", "a photo")])
def test_a_run_does_not_write_over_the_users_own_files_of_its_names(run, tmp_path, name, text):
    out = tmp_path / "run/out"
    out.mkdir(parents=True)
    (out / name).write_text(text)
    result = run("--max_steps=2")
    assert result.code == 2 and f"out/{name} is not the lo" in result.err.splitlines()[-1]
    assert [path.read_text() for path in out.iterdir()] == [text]
    (out / name).unlink()
    assert run("--max_steps=2").code == 0


def test_a_log_that_was_cut_in_its_first_line_is_that_of_a_run(run, tmp_path):
    (tmp_path / "run/out").mkdir(parents=True)
    for cut in ("{", '{"step": 1, "lo'):
        (tmp_path / "run/out/metrics.jsonl").write_text(cut)
        assert run("--max_steps=2", "--resume=false").code == 0


def test_a_picture_that_cannot_be_written_fails_no_run(run, monkeypatch):
    monkeypatch.setattr(train, "plot_losses", plot_losses)
    run("--max_steps=3")
    Path("out/loss.png").unlink()
    Path("out/loss.png").mkdir()
    result = run("--max_steps=6", "--resume=changed")
    assert result.code == 0 and "no loss.png: cannot write out/loss.png" in result.err


def test_early_in_a_run_it_is_said_how_long_it_will_take(run, monkeypatch):
    for log_interval in (1, 2, 9):
        err = run("--max_steps=6", f"--log_interval={log_interval}", "--resume=false").err
        speed, = re.findall(r"for the 3 steps left, at ([\d,]+) tokens/s\n", err)
        assert 10 < int(speed.replace(",", "")) < 10**6
    assert "for the 1 step left, at" in run("--max_steps=4", "--resume=false").err
    clock = itertools.count(0, 50)
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    line = next(line for line in run("--max_steps=6", "--resume=false", "--log_interval=9").err.splitlines() if "steps left" in line)
    assert "for the 5 steps left" in line and line.endswith("if later steps take as long as the first")


def test_the_time_left_leaves_out_the_first_step_and_follows_the_speed_slowly(monkeypatch):
    now = 0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    pace = report.Pace(0, 0, 100)
    left = []
    for step, seconds in enumerate((60, 1, 1, 1, 6), 1):                          # compiling; a step that is held up
        now += seconds
        pace.tokens_per_s(step, 8 * step)
        pace.forecast(step, 8 * step)
        left.append(pace.seconds_left(step))
    assert math.isnan(left[0]) and left[1:] == pytest.approx([98, 97, 96, 95 * 2])


def test_a_resumed_runs_first_report_leaves_out_its_first_step(monkeypatch):
    now = 0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    pace = report.Pace(40, 8 * 40, 100)
    for step in range(41, 51):
        now += 60 if step == 41 else 1
        if pace.is_due(step):
            pace.forecast(step, 8 * step)
    assert pace.tokens_per_s(50, 8 * 50) == 8 and pace.seconds_left(50) == 50


def test_the_bar_fits_80_columns_late_in_a_long_run_on_a_fast_gpu():
    bar = tqdm.format_meter(19990, 20000, 5 * 3600, ncols=80, prefix=tqdm.format_interval(20 * 3600),
                            postfix="loss 3.633, 1,170,000 tok/s, 70.4 GB", bar_format=report.BAR)
    assert len(bar) == 80 and bar.endswith("19990/20000 [5:00:00<20:00:00, loss 3.633, 1,170,000 tok/s, 70.4 GB]")


def test_durations_are_said_in_the_unit_that_suits_them():
    assert [report.duration(seconds) for seconds in (0.2, 100, 400, 9000, 200000, 1e7)] == [
        "1 second", "100 seconds", "6.7 minutes", "2.5 hours", "2.3 days", "116 days"]


@pytest.mark.parametrize("package", ["matplotlib/__init__.py", "matplotlib/pyplot.py"])
@pytest.mark.parametrize("error", ["AttributeError", "SystemExit"])
def test_a_matplotlib_that_fails_is_one_line_and_fails_no_run(tmp_path, package, error):
    """Not there, of another numpy, or with a backend that does not start: the run that asked for a picture goes on."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("def use(backend): pass")
    (tmp_path / package).write_text(f"raise {error}('_ARRAY_API not found')")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0}\n')
    script = f"from pathlib import Path; from support.report import plot_losses; plot_losses(Path({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
                            env=os.environ | {"PYTHONPATH": str(tmp_path)})
    line = f"no loss.png: matplotlib fails ({error}: _ARRAY_API not found)\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, "", line)


def test_what_matplotlib_says_of_its_folders_and_settings_is_not_said_by_us(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0}\n')
    (tmp_path / "rc").write_bytes(b"\xe0\n")
    script = f"from pathlib import Path; from support.report import plot_losses; plot_losses(Path({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
                            env=os.environ | {"MPLCONFIGDIR": "/proc/nope", "MATPLOTLIBRC": str(tmp_path / "rc")})
    assert result.returncode == 0 and result.stderr.count("\n") == 1, result.stderr


def test_a_font_that_fails_is_not_told_as_a_full_disk(tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")

    def fails(*args, **options):
        raise RuntimeError("no such font")
    monkeypatch.setattr(figure.Figure, "savefig", fails)
    plot_losses(tmp_path)
    assert capsys.readouterr().err == "no loss.png: matplotlib fails (RuntimeError: no such font)\n"


def test_damaged_lines_of_the_log_are_named_and_left_out(tmp_path, capsys):
    good, path = '{"step": 1, "tokens": 8, "loss": 3.0}', tmp_path / "metrics.jsonl"
    path.write_text("\n".join([good, good.replace("1", '"1"'), good.replace("tokens", "tokenz"), "{", good, "{"]))
    assert report.Log.read(path) == [json.loads(good)] * 2
    assert "3 lines are left out, the first is line 2" in capsys.readouterr().err


def without_wall_clock(values):
    return {key: value for key, value in values.items() if key not in ("tokens_per_s", "time")}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for W&B, whose runs drop what comes at or below their own last step, as W&B's do."""
    class Run:
        def __init__(self, **options):
            world.starts.append(options)
            self.id, self.finish = options["id"] or f"id{len(world.starts)}", lambda: world.finished.append(self.id)

        def define_metric(self, name, step_metric):
            world.axes.append((name, step_metric))

        def log(self, values):
            world.logged.append((self.id, values))
    world = SimpleNamespace(starts=[], finished=[], axes=[], logged=[])
    module = SimpleNamespace(init=lambda **options: Run(**options), Html=lambda text: ("html", text), Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(train, "plot_losses", plot_losses)
    return world


def test_wandb_gets_every_record_samples_and_the_curve_and_a_resumed_run_goes_on_as_the_same(run, tmp_path, monkeypatch, wandb):
    """Over a step of our own: also the evaluation that was due when the run was stopped."""
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("--wandb_project=mine", "--seed=3").code == 143
    assert run("--wandb_project=mine", "--seed=3").code == 0
    starts = wandb.starts
    assert [start["id"] for start in starts] == [None, "id1"] and all(start["resume"] == "allow" for start in starts)
    assert starts[0]["project"] == "mine" and starts[0]["config"]["seed"] == 3 and starts[0]["config"]["dim"] == 16
    logged = [values for _, values in wandb.logged]
    assert wandb.finished == ["id1", "id1"] and logged.pop() == {"step": 12, "loss_curve": ("image", "out/loss.png")}
    assert set(wandb.axes) == {("*", "step")}
    texts = [values for values in logged if "sample" in values]
    assert [values["step"] for values in texts] == [6, 12]
    assert all(kind == "html" and len(text) > 60 for kind, text in (values["sample"] for values in texts))
    numbers = [without_wall_clock(values) for values in logged if "sample" not in values]
    assert numbers == records(tmp_path / "run") and len(numbers) == 14
    run("--wandb_project=mine", "--seed=3", "--resume=false")
    assert starts[-1]["id"] is None and Path("out/wandb_id").read_text() == "id3"


def test_going_back_to_an_earlier_checkpoint_with_other_settings_is_a_new_run_there(run, wandb):
    run("--wandb_project=mine", "--keep_last=9")
    Path("out/ckpt-00000006.pt").rename("out/ckpt.pt")
    assert run("--wandb_project=mine", "--keep_last=9", "--lr=1e-3", "--resume=changed").code == 0
    assert run("--wandb_project=mine", "--keep_last=9", "--lr=1e-3", "--resume=changed", "--max_steps=15").code == 0
    assert [start["id"] for start in wandb.starts] == [None, None, "id2"]


def test_samples_change_nothing_of_the_run(run, tmp_path, monkeypatch):
    class Tracker(SimpleNamespace):
        package, numbers, text, close = "json", lambda *args: None, lambda *args: texts.append(args[2]), lambda *args: None

        def __init__(self, *args):
            pass
    texts = []
    run("--dropout=0.2", at="without")
    monkeypatch.setattr(report, "TensorBoard", Tracker)
    run("--dropout=0.2", "--tensorboard", at="with")
    assert len(texts) == 2 and all(texts)
    mine, theirs = (contents(tmp_path / at) for at in ("with", "without"))
    assert mine["metrics.jsonl"] == theirs["metrics.jsonl"]
    mine, theirs = (load_checkpoint(tmp_path / at / "out/ckpt.pt") for at in ("with", "without"))
    assert same(mine["model"], theirs["model"]) and same(mine["optimizer"], theirs["optimizer"])


@pytest.mark.parametrize("flag, package", [("--tensorboard", "tensorboard"), ("--wandb_project=mine", "wandb")])
def test_a_tracker_that_is_not_installed_is_named_before_training(refusal, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}, or leave it out" in refusal(flag)


def test_a_tracker_that_is_there_but_fails_says_what_failed(refusal, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("import no_such_thing")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "wandb, which cannot be imported (ModuleNotFoundError: No module named 'no_such" in refusal("--wandb_project=x")


def test_a_tracker_that_does_not_start_is_one_line(run, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured\nand more")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    result = run("--wandb_project=mine")
    assert result.code == 2 and "W&B does not start (api_key not configured): run `wandb login`" in result.err.splitlines()[-1]


def test_tensorboard_holds_the_records_of_metrics_jsonl(run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setattr(train, "plot_losses", plot_losses)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run("--tensorboard")
    run("--tensorboard")
    events = EventAccumulator("out/tensorboard").Reload()
    for key in ("loss", "grad_norm", "lr", "tokens", "val_loss", "bits_per_byte"):
        theirs = [(event.step, event.value) for event in events.Scalars(key)]
        mine = [(r["step"], r[key]) for r in records(tmp_path / "run") if key in r]
        assert [value for _, value in sorted(set(theirs))] == pytest.approx([value for _, value in sorted(set(mine))], rel=1e-6)
    assert len(events.Tensors("sample/text_summary")) == 2 and len(events.Images("loss_curve")) == 1


def test_wandb_offline_takes_both_parts_of_a_resumed_run(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("--wandb_project=mine").code == 143
    time.sleep(1.1)                                                               # W&B names its folders by the second
    assert run("--wandb_project=mine").code == 0
    name = Path("out/wandb_id").read_text()
    parts = sorted(Path("out/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(parts) == 2
    logged = [values for part in parts for values in histories(part)]
    for record in map(json.loads, Path("out/metrics.jsonl").read_text().splitlines()):
        assert record in logged                                                   # the due evaluations among them


def histories(path):
    """What was logged to a .wandb, one dict a call: records in blocks of 32 KB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record
    data = path.read_bytes()
    at = 7
    whole = b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:                                                # what no header fits into
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                                                        # all of a record, or its last part
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                          for item in record.history.item}
                yield {key: value for key, value in values.items() if not key.startswith("_")}
