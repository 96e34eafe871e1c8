"""What a run reports: the log, trackers, tables and pictures."""
import contextlib
import dataclasses
import html
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from configurator import UserError, duration, first_line
from support.files import check_target, replacing
from support.machine import RANK, progress, say


# ----------------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops what a killed run had written after it."""

    def __init__(self, path, step, trackers=(), again=True):
        self.path = path
        self.trackers = trackers
        # An evaluation comes after the checkpoint of its step is saved: `again` if that of `step` will be repeated.
        keep = [r for r in self.read(path) if r["step"] < step or r["step"] == step and ("loss" in r or not again)]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))

    @staticmethod
    def read(path):
        """The records of a metrics.jsonl, without a last line cut by a kill; other bad lines are reported."""
        records = []
        bad = []
        lines = []
        try:
            if path.exists():
                if not path.is_file():
                    raise OSError(0, "it is not a file")                          # a pipe would never end
                lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): fix that, or use another --out_dir") from None
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if type(record["step"]) is not int or type(record["tokens"]) is not int:
                    raise TypeError
                if not all(isinstance(value, (int, float, type(None))) for value in record.values()):
                    raise TypeError
                records.append(record)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                if number < len(lines) or not isinstance(error, ValueError):
                    bad.append(number)
        if lines and not records and (bad or not '{"step": '.startswith(lines[0][:9])):
            raise UserError(f"{path} is not the log of a run: move it away, or use another --out_dir")
        if bad:
            say(f"warning: {path} is damaged: {len(bad)} lines are left out, the first is line {bad[0]}")
        return records

    def write(self, **record):
        """Numbers that JSON does not have (a loss of NaN) become null."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is intact") from None
        for tracker in self.trackers:
            tracker.numbers(record["step"], {k: v for k, v in record.items() if k != "step" and v is not None})


class TensorBoard:
    """What metrics.jsonl gets, under the same names, for `tensorboard --logdir=out`; samples; the loss curve."""

    package = "tensorboard"

    def __init__(self, run, fresh):
        from torch.utils.tensorboard import SummaryWriter
        folder = run.out_dir / "tensorboard"
        for path in folder.glob("events.out.tfevents.*") if fresh else ():        # what else lies there is the user's
            path.unlink()
        self.writer = SummaryWriter(folder, purge_step=run.step + 1)              # drops what a resumed run logs again

    def numbers(self, step, values):
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def text(self, step, text):
        self.writer.add_text("sample", "    " + text.replace("\n", "\n    "), step)  # markdown: as it stands

    def close(self, step, curve):
        if curve.exists():
            import numpy as np
            from PIL import Image                                                 # add_image needs it, too
            self.writer.add_image("loss_curve", np.asarray(Image.open(curve)), step, dataformats="HWC")
        self.writer.close()


class WandB:
    """The same for Weights & Biases, over a step of our own: theirs only grows, and drops what comes at or below it.

    The id in out_dir/wandb_id lets a resumed run continue as the same one there. A run that goes back to an earlier
    checkpoint with changed settings gets a new id, since the steps in between belong to the abandoned run.
    """

    package = "wandb"

    def __init__(self, run, fresh):
        import wandb
        self.wandb = wandb
        path = run.out_dir / "wandb_id"
        went_back = run.config.resume not in (True, False, "auto") and last_step(run.out_dir) > run.step
        again = not fresh and not went_back and path.is_file()
        try:
            self.run = wandb.init(project=run.config.wandb_project, name=run.out_dir.name, dir=str(run.out_dir),
                                  resume="allow", id=path.read_text() if again else None,
                                  config=dataclasses.asdict(run.config) | dataclasses.asdict(run.model_config))
            self.run.define_metric("*", step_metric="step")
        except Exception as error:  # no account, no network, a project that is not theirs: each its own type
            reason = first_line(error)
            raise UserError(f"W&B does not start ({reason}): run `wandb login`, or set WANDB_MODE=offline") from None
        with replacing(path) as temporary:
            temporary.write_text(self.run.id)

    def numbers(self, step, values):
        self.run.log(values | {"step": step})

    def text(self, step, text):
        self.numbers(step, {"sample": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self, step, curve):
        if curve.exists():
            self.numbers(step, {"loss_curve": self.wandb.Image(str(curve))})
        self.run.finish()


def last_step(out_dir):
    """The last step that the log of a run knows."""
    return max((record["step"] for record in Log.read(out_dir / "metrics.jsonl")), default=0)


def wanted_trackers(config):
    """The classes above that the config asks for. UserError where their package is not installed."""
    wanted = [TensorBoard] * config.tensorboard + [WandB] * bool(config.wandb_project)
    for tracker in wanted:
        try:
            importlib.import_module(tracker.package)
        except Exception as error:  # not there, or there and of no use: of another numpy, another Python
            key = "tensorboard" if tracker is TensorBoard else "wandb_project"
            if isinstance(error, ModuleNotFoundError) and error.name == tracker.package:
                raise UserError(f"--{key} needs a package: pip install {tracker.package}, or leave it out") from None
            raise UserError(f"--{key} needs {tracker.package}, which cannot be imported "
                            f"({type(error).__name__}: {error}): fix that, or leave it out") from None
    return wanted


# ----------------------------------------------------------------------------------------------------------------------
# A run while it goes


# Of tqdm; desc is the time left. It fits 80 columns also late in a long run on a fast GPU.
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{desc}{postfix}]"


class Journal:
    """What the first process of a run reports: to the log, the trackers and the terminal."""

    def __init__(self, run, fresh):
        self.steps = run.config.max_steps
        warmup = run.config.warmup_steps
        if warmup >= self.steps:
            say(f"warning: warmup_steps={warmup} covers the whole run (max_steps={self.steps}): the learning rate only "
                f"rises, to {self.steps / (warmup + 1):.0%} of its peak; try --warmup_steps={self.steps // 10}")
        self.log = None
        if RANK == 0:
            trackers = [tracker(run, fresh) for tracker in wanted_trackers(run.config)]
            again = run.step == 0 or run.is_due(run.config.eval_interval)
            self.log = Log(run.out_dir / "metrics.jsonl", run.step, trackers, again)

    @property
    def trackers(self):
        return self.log.trackers if self.log else []

    @contextlib.contextmanager
    def progress(self, step, tokens):
        """A bar on a terminal; it counts steps, as all settings do."""
        size = shutil.get_terminal_size()                                         # tqdm would hide itself at 0 x 0
        self.pace = Pace(step, tokens, self.steps)
        with progress(total=self.steps, initial=step, desc="?", bar_format=BAR, ncols=size.columns,
                      nrows=size.lines) as self.bar:
            yield

    def write(self, step, tokens, **record):
        """One record of a step."""
        if self.log:
            self.log.write(step=step, tokens=tokens, **record)

    def report(self, step, tokens, loss, lr, grad_norm, memory):
        """To the log; to the bar on a terminal, and as a line where the output goes to a file."""
        speed = self.pace.tokens_per_s(step, tokens)
        self.write(step, tokens, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=round(speed),
                   time=round(time.time(), 3))
        left = self.pace.seconds_left(step)
        self.bar.set_description_str(self.bar.format_interval(left) if left >= 0 else "?", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s, {memory / 1e9:.1f} GB")
        if self.bar.disable:
            say(f"step {step}/{self.steps}: loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s, "
                f"{memory / 1e9:.2f} GB" + (f", {duration(left)} left" if left > 0 else ""))

    def text(self, step, text):
        for tracker in self.trackers:
            tracker.text(step, text)

    def close(self, step, out_dir):
        for tracker in self.trackers:
            tracker.close(step, out_dir / "loss.png")


class Pace:
    """The speed of a run, and how long it will take: an estimate early on, then a mean that follows the speed slowly.

    The first step counts for neither: it does what is done once, as compiling.
    """

    def __init__(self, step, tokens, steps):
        self.first = step
        self.steps = steps
        self.told = False
        self.seconds_each = math.nan
        self.restart(step, tokens)

    def restart(self, step, tokens):
        """Measures from here on, so that an evaluation does not count."""
        self.reported = (step, tokens, time.perf_counter())
        self.began = self.reported

    def tokens_per_s(self, step, tokens):
        """Since the last call."""
        now = (step, tokens, time.perf_counter())
        speed, seconds_each = self.between(self.reported, now)
        if math.isnan(self.seconds_each) and step > self.first + 1:
            self.seconds_each = seconds_each
        self.seconds_each += 0.2 * (seconds_each - self.seconds_each)
        self.reported = now
        return speed

    @staticmethod
    def between(start, end):
        """(tokens per second, seconds of a step)."""
        steps, tokens, seconds = (b - a for a, b in zip(start, end))
        seconds = max(seconds, 1e-9)
        return tokens / seconds, seconds / max(1, steps)

    def seconds_left(self, step):
        """NaN until there was a second step."""
        return (self.steps - step) * self.seconds_each

    def is_due(self, step):
        """Whether the forecast uses this step."""
        return not self.told and step - self.first in (1, 3)

    def forecast(self, step, tokens):
        """Says once how long the run will take: by its second and third step, or the first if that took long."""
        if not self.is_due(step):
            return
        now = (step, tokens, time.perf_counter())
        speed, seconds_each = self.between(self.began, now)
        self.began = now
        first = step == self.first + 1
        if first:
            self.reported = now
        if first and seconds_each < 20:
            return
        self.told = True
        left = self.steps - step
        if left > 0:
            steps = f"{left:,} step" + "s" * (left > 1)
            say(f"about {duration(left * seconds_each)} for the {steps} left, at {speed:,.0f} tokens/s"
                + ", if later steps take as long as the first" * first)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and lines of figures


def short(cell):
    if isinstance(cell, (int, float)) and abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def table(title, rows):
    """Prints rows (dicts with the same keys) as a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(short, row.values()))} |")
    sys.stdout.flush()


def print_json(value):
    """Prints one line of JSON: every digit for a file or a program, five on a terminal."""
    print(json.dumps(rounded(value) if sys.stdout.isatty() else value))


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def spread(*columns):
    widest = max((max(times) - min(times)) / statistics.median(times) for times in columns)
    return f"{widest:.0%}" if widest > 0.1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


PICTURES = (".png", ".pdf", ".svg")


def picture(path, draw, told="wrote", **panels):
    """Writes what draw(axes) draws, in the format of its ending. Where matplotlib is missing or fails, a line says so."""
    try:
        os.environ.pop("MPLBACKEND", None)                                        # a notebook's, which may not be here
        logging.getLogger("matplotlib").setLevel(logging.CRITICAL)                # it warns of its folders at import
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(**panels)
        draw(axes)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        with replacing(path) as temporary:
            temporary.write_bytes(drawn.getvalue())
    except UserError:                                                             # the disk is full
        raise
    except ImportError as error:
        if getattr(error, "name", "") == "matplotlib":
            return say(f"no {path.name}: pip install matplotlib to draw it")
        say(f"no {path.name}: matplotlib cannot be imported ({error})")
    except (Exception, SystemExit) as error:  # a backend, a font, a cache folder: each its own exception type
        say(f"no {path.name}: matplotlib fails ({type(error).__name__}: {first_line(error)})")
    else:
        say(f"{told} {path}")


def check_picture(path, flag="plot"):
    """UserError where picture() could not draw to path, or would replace a file that is no picture of matplotlib's."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--{flag} needs a package: pip install matplotlib, or leave it out")
    check_target(path, flag, is_drawn)
    if Path(path).suffix not in PICTURES:
        raise UserError(f"--{flag}={path} must end in {' or '.join(PICTURES)}")


def is_drawn(path):
    """Whether matplotlib, which signs its pictures, drew this one."""
    return b"atplotlib" in path.read_bytes()


def plot_losses(out_dir):
    """loss.png from metrics.jsonl. The run is done, so a failure here is only reported."""
    def draw(axes):
        records = Log.read(out_dir / "metrics.jsonl")
        for key, style in (("loss", {"linewidth": 1, "alpha": 0.7}), ("val_loss", {"marker": "o", "markersize": 3})):
            points = [(r["tokens"], r[key]) for r in records if key in r]
            axes.plot(*zip(*points), label=key, **style) if points else None
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        title = str(out_dir).encode(errors="replace").decode()                    # names may hold broken characters, $
        axes.set_title(title, parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        picture(out_dir / "loss.png", draw, told="loss curve:", figsize=(7, 4))
    except UserError as error:                                                    # the disk is full
        say(f"no loss.png: {error}")
