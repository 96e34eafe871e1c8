"""What a run tells: the log, who else watches it, tables and pictures."""
import dataclasses
import html
import importlib
import json
import math
import os
import shutil
import statistics
import sys

from configurator import UserError
from support.files import replacing
from support.machine import say


# ----------------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops what a killed run had written after it."""

    def __init__(self, path, step, trackers=(), again=True):
        self.path, self.trackers = path, trackers
        # An evaluation comes after the checkpoint of its step is saved: `again` if that of `step` will be repeated.
        keep = [r for r in self.read(path) if r["step"] < step or r["step"] == step and ("loss" in r or not again)]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in keep))

    @staticmethod
    def read(path):
        """The records of a metrics.jsonl, without the line in whose middle a kill came; other bad lines are named."""
        records, bad = [], []
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
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
            raise UserError(f"cannot write {self.path}: {error.strerror}; the checkpoint of before is intact") from None
        for tracker in self.trackers:
            tracker.numbers(record["step"], {k: v for k, v in record.items() if k != "step" and v is not None})


class TensorBoard:
    """What metrics.jsonl gets, under the same names, for `tensorboard --logdir=out`; samples; the loss curve."""

    package = "tensorboard"

    def __init__(self, run, fresh):
        from torch.utils.tensorboard import SummaryWriter
        folder = run.out_dir / "tensorboard"
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
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
    """The same for Weights & Biases. The id in out_dir/wandb_id lets a resumed run go on as the same one there."""

    package = "wandb"

    def __init__(self, run, fresh):
        import wandb
        self.wandb, path = wandb, run.out_dir / "wandb_id"
        try:
            self.run = wandb.init(project=run.config.wandb_project, name=run.out_dir.name, dir=str(run.out_dir),
                                  resume="allow", id=path.read_text() if path.exists() and not fresh else None,
                                  config=dataclasses.asdict(run.config) | dataclasses.asdict(run.model_config))
        except Exception as error:  # no account, no network, a project that is not theirs: each its own type
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(f"W&B does not start ({reason}): run `wandb login`, or set WANDB_MODE=offline") from None
        with replacing(path) as temporary:
            temporary.write_text(self.run.id)

    def numbers(self, step, values):
        self.run.log(values, step=step)

    def text(self, step, text):
        self.run.log({"sample": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, step, curve):
        if curve.exists():
            self.run.log({"loss_curve": self.wandb.Image(str(curve))}, step=step)
        self.run.finish()


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
            raise UserError(f"--{key} needs {tracker.package}, which does not import "
                            f"({type(error).__name__}: {error}): mend that, or leave it out") from None
    return wanted


# ----------------------------------------------------------------------------------------------------------------------
# Tables


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


def spread(*columns):
    widest = max((max(times) - min(times)) / statistics.median(times) for times in columns)
    return f"{widest:.0%}" if widest > 0.1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def picture(path, draw, told="wrote", **panels):
    """Writes what draw(axes) draws as a PNG. Where matplotlib is missing or fails, one line says so: no run fails."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(**panels)
        draw(axes)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    except UserError:                                                             # the disk is full
        raise
    except ImportError as error:
        if getattr(error, "name", "") == "matplotlib":
            return say(f"no {path.name}: pip install matplotlib draws it")
        say(f"no {path.name}: matplotlib does not import ({error})")
    except Exception as error:  # a backend, a font, a cache folder: each its own exception type
        say(f"no {path.name}: matplotlib fails ({type(error).__name__}: {(str(error) or 'no word').splitlines()[0]})")
    else:
        say(f"{told} {path}")


def plot_losses(out_dir):
    """loss.png from metrics.jsonl."""
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
    picture(out_dir / "loss.png", draw, told="loss curve:", figsize=(7, 4))
