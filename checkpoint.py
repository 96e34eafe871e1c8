"""The files of a run, in out_dir: checkpoints that are whole or not there, the log, and who else gets to see it.

ckpt.pt is the latest state, best.pt that of the lowest validation loss, metrics.jsonl has one JSON object per logged
step, loss.png draws it. train.py writes them; sample.py, eval.py and bench.py read checkpoints.
"""
import dataclasses
import html
import importlib
import io
import json
import logging
import math
import os
import shutil
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

from configurator import UserError
from machine import say
from model import LM, ModelConfig
from prepare import replacing

CHECKPOINT = {"model", "model_config", "optimizer", "step", "config", "rng", "data", "best_loss",
              "recent_losses", "skips"}
KEPT = "ckpt-" + 8 * "[0-9]" + ".pt"                                              # the glob of what keep() keeps
SETTINGS = {field.name for field in dataclasses.fields(ModelConfig)}


def keep(latest, step, count):
    """Keeps latest under a second name too, and deletes the oldest such names beyond count - 1 before it."""
    if count == 1:
        return
    name = latest.with_name(f"ckpt-{step:08}.pt")
    with replacing(name) as temporary:
        try:
            os.link(latest, temporary)
        except OSError:                                                           # a file system without hard links
            shutil.copyfile(latest, temporary)
    names = sorted(name.parent.glob(KEPT))
    past = [path for path in names if path <= name]                               # later: before the user went back
    for old in [*past[:-count], *names[len(past):]]:
        old.unlink()


def plain(value):
    """value in dicts, lists and strings made alike: pickle also writes which objects are one, so that without this the
    checkpoints of a resumed and of an undisturbed run would hold the same in different bytes."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value


def load_file(path, device="cpu"):
    """What torch.save wrote. Loads tensors and plain values only: a pickle that would run code is refused."""
    with zipfile.ZipFile(path) as archive:                                        # torch.load looks at no checksums
        if bad := archive.testzip():
            raise UserError(f"checksum of {bad} does not match")
    return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(path, device="cpu"):
    """The dict that Run.save of train.py wrote."""
    try:
        checkpoint = load_file(path, device)
        missing = CHECKPOINT - set(checkpoint)
        unknown = set() if missing else set(checkpoint["model_config"]) - SETTINGS
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name its folder with --out_dir") from None
    except Exception as error:  # a cut zip, a flipped bit, a forbidden pickle: each its own exception type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or not a checkpoint ({reason}): take an older one, or delete it") from None
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    if unknown:
        raise UserError(f"{path} is of another version of model.py: its model has {', '.join(sorted(unknown))}")
    return checkpoint


def load_weights(model, checkpoint):
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint holds a model of another shape: "
                        f"{' '.join(str(error).split())[:200]}") from None


def load_model(checkpoint, device):
    """The model of a checkpoint, as it was."""
    model = LM(ModelConfig(**checkpoint["model_config"] | {"tokenizer": tokenizer_id(checkpoint["data"])})).to(device)
    load_weights(model, checkpoint)
    return model


def tokenizer_id(data):
    return f"{data['tokenizer']}:{data['tokenizer_hash']}"


def load_pretrained(source, device="cpu"):
    """The model in an out_dir, a checkpoint file, a folder of save_pretrained, or one of the Hugging Face hub."""
    path = Path(source)
    files = [path] if path.is_file() else [path / name for name in ("best.pt", "ckpt.pt") if (path / name).exists()]
    if files:
        return load_model(load_checkpoint(files[0]), device)
    hub_id = source.count("/") == 1 and not path.parent.is_dir() and path.parts[0] != "out"
    if not path.exists() and not hub_id:                                          # out/bsae: the hub isn't asked
        raise UserError(f"there is no {source}: train first, or name the folder of a trained model")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)               # its lines on retries: ours is enough
    try:
        from huggingface_hub import hf_hub_download
        with redirect_stdout(io.StringIO()):                                      # it prints, and samples go to stdout
            settings = path / "config.json" if path.is_dir() else hf_hub_download(source, "config.json")
            unknown = json.loads(Path(settings).read_bytes()).keys() - SETTINGS   # from_pretrained would leave them out
            model = LM.from_pretrained(source, strict=True).to(device)
    except ImportError:
        raise UserError(f"{source} holds no checkpoint; to read shared models: "
                        "pip install huggingface_hub safetensors") from None
    except Exception as error:  # a missing file, no network, another kind of model: each its own exception type
        raise UserError(f"{source} is neither a folder with a checkpoint or a shared model, nor one that the Hugging "
                        f"Face hub gives ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if unknown:
        raise UserError(f"{source} is of another version of model.py: its config.json has {', '.join(sorted(unknown))}")
    return model


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
            from matplotlib import image
            self.writer.add_image("loss_curve", image.imread(curve), step, dataformats="HWC")
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


def plot(out_dir):
    """loss.png from metrics.jsonl, when matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        say("no loss.png: pip install matplotlib draws it")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot
    records = Log.read(out_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, style in (("loss", {"linewidth": 1, "alpha": 0.7}), ("val_loss", {"marker": "o", "markersize": 3})):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        axes.plot(*zip(*points), label=key, **style) if points else None
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    title = str(out_dir).encode(errors="replace").decode()                        # names may hold broken characters, $
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(out_dir / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    say(f"loss curve: {out_dir / 'loss.png'}")
