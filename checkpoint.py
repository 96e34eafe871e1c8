"""Checkpoints, the one format of a trained model: whole or not there, written and read here alone.

In out_dir, ckpt.pt is the latest state and best.pt that of the lowest validation loss. train.py writes them; sample.py,
eval.py and the experiments read them.
"""
import dataclasses
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import re
import shutil
import sys
import traceback
import typing
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

from configurator import Failed, UserError, first_line, fits, shell, show
from support.checks import require                                                # support comes before torch
from support.dataset import load_tokenizer, tokenizer_id
from support.files import leftovers, replacing
from support.machine import RANK, autocast, pick_device, pick_precision, say, whole
from support.measure import cast_for_decoding
from support.optim import OPTIMIZERS, load_named_state, named_state, parameter_groups
from support.report import Log, is_drawn

import torch

from model import LM, ModelConfig

CHECKPOINT = {"model": dict, "model_config": dict, "optimizer": dict, "step": int, "config": dict, "rng": dict,
              "data": dict, "best_loss": float, "recent_losses": list, "skips": list}
KEPT = "ckpt-" + 8 * "[0-9]" + ".pt"                                              # the glob of what keep() keeps
SETTINGS = typing.get_type_hints(ModelConfig)
CHANGED = ("changed", "changed_model")                                             # values of --resume
# Settings of a model whose change leaves its weights their meaning.
SAME_MEANING = {"seq_len", "dropout", "chunk_size", "tied", "vocab_size", "tokenizer"}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save_run(run, path):
    """All that a run needs to resume, to a file that is whole or not there. All processes call it, the first writes."""
    model = whole(run.model.state_dict())
    optimizer = whole(named_state(run.optimizer))
    if RANK:
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:             # given a name, torch writes it inside
        torch.save(plain({
            "model": model,
            "model_config": dataclasses.asdict(run.model_config),
            "optimizer": optimizer,
            "step": run.step,
            "sequences": run.sequences,
            "tokens": run.tokens,
            "best_loss": run.best_loss,
            "recent_losses": list(run.spikes.recent),
            "skips": [run.skips, run.skips_in_a_row],
            "config": dataclasses.asdict(run.config),
            "rng": {"cpu": torch.get_rng_state()},
            "data": run.data.fingerprint,
        }), file)


def keep(latest, step, count):
    """Keeps latest under a second name too, and deletes the oldest such names beyond count - 1 before it."""
    if count == 1:
        return
    name = latest.with_name(f"ckpt-{step:08}.pt")
    with replacing(name) as temporary:
        try:
            temporary.unlink()                                                    # a link takes no name that is there
            os.link(latest, temporary)
        except OSError:                                                           # a file system without hard links
            shutil.copyfile(latest, temporary)
    names = sorted(name.parent.glob(KEPT))
    past = [path for path in names if path <= name]                               # later: before the user went back
    for old in [*past[:-count], *names[len(past):]]:
        old.unlink()


def clear(out_dir, fresh):
    """Removes from out_dir what a killed run left half-written, and where fresh the run itself."""
    picture = out_dir / "loss.png"
    if fresh and picture.is_file() and not is_drawn(picture):
        raise UserError(f"{picture} is not the loss curve of a run: move it away, or use another --out_dir")
    ours = ("ckpt.pt", "best.pt", "loss.png", "metrics.jsonl", "wandb_id", KEPT)
    stale = []
    for name in ours:
        stale += [*leftovers(out_dir, name), *out_dir.glob(name + ".tmp")]        # the second: of earlier versions
    if fresh:
        stale += [out_dir / "ckpt.pt", out_dir / "best.pt", out_dir / "loss.png", *out_dir.glob(KEPT)]
    try:
        for path in stale:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir={out_dir}: {error.strerror}") from None


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
    if not Path(path).is_file():                                                  # a pipe would never end
        Path(path).stat()
        raise OSError(0, "it is not a file")
    with zipfile.ZipFile(path) as archive:                                        # torch.load looks at no checksums
        if bad := archive.testzip():
            raise UserError(f"checksum of {bad} does not match")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:                                                # torch's words say how to run it
        raise UserError("it holds more than tensors and plain values, which is never run") from None


def load_checkpoint(path, device="cpu"):
    """The dict that Run.save of train.py wrote."""
    try:
        checkpoint = load_file(path, device)
        require(isinstance(checkpoint, dict), f"it holds {show(checkpoint)}")
        missing = CHECKPOINT.keys() - checkpoint.keys()
        settings = checkpoint.get("model_config")
        unknown = settings.keys() - SETTINGS.keys() if isinstance(settings, dict) else set()
        if not missing and not unknown:
            check_contents(checkpoint)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name its folder with --out_dir") from None
    except OSError as error:                                                      # no permission, a folder, a bad disk
        reason = error.strerror or error
        raise UserError(f"cannot read {path} ({reason}): fix that, or use another checkpoint") from None
    except Exception as error:  # a cut zip, a flipped bit, a forbidden pickle: each its own exception type
        raise UserError(f"{path} is damaged or not a checkpoint ({first_line(error)}): use another one, or move it away"
                        ) from None
    if is_state(checkpoint):
        raise UserError(f"{path} is a state, which sample.py takes as {shell(f'--load_state={path}')}; name the folder "
                        "or checkpoint of its model beside it")
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise UserError(f"{path} was made by another version of model.py: its model has {names}")
    return checkpoint


def is_state(content):
    """Whether this is what a file of sample.py's --save_state holds."""
    return isinstance(content, dict) and {"state", "unread", "half", "seed", "rng", "device"} <= content.keys()


def check_contents(checkpoint):
    """ValueError where a checkpoint, whose checksums anyone can make, says what save_run never writes."""
    for key, kind in (CHECKPOINT | {"sequences": int, "tokens": int}).items():
        value = checkpoint.get(key)
        if value is None and key not in ("model", "model_config", "data"):        # a model alone, or an earlier version
            continue
        require(isinstance(value, kind) and type(value) is not bool, f"its {key} is {spoken(value)}")
        require(kind is not int or 0 <= value < 2**53, f"its {key} is {value}")
    weights, settings = checkpoint["model"], checkpoint["model_config"]
    for name, weight in weights.items():
        require(type(name) is str and holds_numbers(weight), f"its model has {show(name)}, which is not a weight")
    for key in settings.keys() & SETTINGS.keys():
        require(fits([settings[key]], SETTINGS[key]), f"its {key} is {spoken(settings[key])}")
    check_sizes(weights, settings)
    require(settings.get("depth", 1) <= len(weights), f"its model has {len(weights)} weights for all its blocks")
    for key in ("tokenizer", "tokenizer_hash"):
        require(type(checkpoint["data"].get(key)) is str, f"its {key} is {spoken(checkpoint['data'].get(key))}")


def spoken(value):
    """What a checkpoint holds somewhere, for a message."""
    return "missing" if value is None else show(value)


def check_sizes(weights, settings):
    """ValueError where the embeddings are not those of the settings, a model of which might take all memory."""
    config = {key: settings.get(key, getattr(ModelConfig, key)) for key in ("vocab_size", "dim", "seq_len", "pos")}
    rows = {"embed.weight": config["vocab_size"]}
    if config["pos"] == "learned":
        rows["embed_pos.weight"] = config["seq_len"]
    for name, least in rows.items():
        shape = weights[name].shape if name in weights else ()
        require(len(shape) == 2 and shape[0] >= least and shape[1] == config["dim"],
                f"its {name} has the shape {tuple(shape)}, not {(least, config['dim'])}")


def holds_numbers(x):
    """Whether x is a tensor of floating-point numbers, all of them there."""
    return torch.is_tensor(x) and x.is_floating_point() and x.layout == torch.strided and not x.is_meta


def is_random_state(x):
    try:
        torch.Generator().set_state(x)
        return True
    except (RuntimeError, TypeError):
        return False


def check_training(checkpoint):
    """As check_contents, for what only a run that resumes needs."""
    for key in CHECKPOINT.keys() | checkpoint.keys() & {"sequences", "tokens"}:
        require(checkpoint[key] is not None, f"its {key} is missing")
    config, optimizer, random = checkpoint["config"], checkpoint["optimizer"], checkpoint["rng"].get("cpu")
    precision, batch_size = config.get("precision"), config.get("batch_size")
    kind = config.get("optimizer", "adamw")                                       # older checkpoints lack it
    require(precision in ("auto", "fp32", "bf16"), f"its precision is {spoken(precision)}, not auto, fp32 or bf16")
    require(kind in OPTIMIZERS, f"its optimizer is {spoken(kind)}, not {' or '.join(OPTIMIZERS)}")
    require(type(batch_size) is int and batch_size > 0, f"its batch_size is {spoken(batch_size)}")
    require(is_random_state(random), "its random numbers are damaged")
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    moments = type(state) is dict and all(type(value) is dict and all(map(holds_numbers, value.values()))
                                          for value in state.values())
    require(moments and type(groups) is list and groups and type(groups[0].get("lr")) in (int, float),
            "its optimizer state is damaged")
    require([type(n) for n in checkpoint["skips"]] == [int, int],
            f"its skips are {show(checkpoint['skips'])}, not two numbers")
    require(all(type(loss) is float for loss in checkpoint["recent_losses"]), "its recent_losses are not numbers")


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load_plugin(path):
    """Runs a Python file of the user's own, which may add to model.MIXERS and model.FEATURE_MAPS; "" is none.

    Only a path that the user gave on the command line or in a config file ever comes here, none from a checkpoint.
    """
    if not path:
        return
    file = Path(os.path.realpath(path))                                           # resolve() fails at a loop of links
    name = f"plugin_{file.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(file):
        return
    if not file.is_file():
        raise UserError(f"there is no plugin {path}: name a Python file")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UserError(f"the plugin {path} must be a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:                                      # whatever is wrong in it
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"the plugin {path} fails{where}: {type(error).__name__}: {error}") from None


def plugin_first(*configs):
    """For configure's `inherit`: loads the plugin that one of the configs names before the next class is checked."""
    for config in configs:
        load_plugin(getattr(config, "plugin", ""))
    return {}


def make_config(settings):
    """The ModelConfig of the settings in a checkpoint."""
    try:
        return ModelConfig(**settings)
    except ValueError as error:                                                   # a mixer that is not here
        raise UserError(f"the model of this checkpoint cannot be made: {error}") from None


def load_weights(model, checkpoint, path=None):
    weights = checkpoint["model"]
    if any(name.endswith(".mixer.both.weight") for name in weights):
        raise UserError("the checkpoint has `conv` layers of an earlier version, which model.py no longer has (they "
                        "are now as published): train it again")
    for name, weight in model.state_dict().items():
        if name.endswith(".mixer.conv.weight") and name not in weights:
            # Softmax and window layers had no convolution whatever short_conv said: this one changes nothing.
            weights[name] = torch.zeros_like(weight)
            weights[name][0] = 1
    check_shared(model, weights, "the checkpoint")
    if unfit := misfits(model.state_dict(), weights):
        way = ""
        if path and all(".mixer." in name for name in unfit):                     # start_from can leave these out
            way = f", or --init_from={shell(str(path))} and another --out_dir to start from what fits"
        raise UserError(f"{path or 'the checkpoint'} holds a model of another shape: {first_of(unfit)} would not fit. "
                        f"Use its settings{way}")
    model.load_state_dict(weights)


def first_of(names):
    """The first of some names, and how many more there are."""
    more = len(names) - 1
    return names[0] + (f" and {more} other{'s' * (more > 1)}" if more else "")


def misfits(mine, theirs):
    """The names, sorted, of what only one of two models has, or has in another shape."""
    fit = {name for name in mine if name in theirs and mine[name].shape == theirs[name].shape}
    return sorted({*mine, *theirs} - fit)


def check_shared(model, weights, source):
    """UserError where one tensor of the model, under two names, would be two different ones of the source."""
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(p, name)
        if not {first, name} <= weights.keys() or weights[first].data_ptr() == weights[name].data_ptr():
            continue
        if not torch.equal(weights[first], weights[name]):
            raise UserError(f"{source} is untied: its {first} and {name} differ, and tied=True would keep one of the "
                            "two: use --tied=False")


class LoadedLM(LM):
    """An LM that knows the checkpoint it came from, all but the weights, for the model card."""

    def __init__(self, config, origin):
        super().__init__(config)
        self.origin = origin

    def generate_model_card(self, **options):                                     # save_pretrained and push_to_hub ask
        return model_card(self, self.origin, **options)


def load_model(checkpoint, device):
    """The model of a checkpoint, as it was."""
    config = make_config(checkpoint["model_config"] | {"tokenizer": tokenizer_id(checkpoint["data"])})
    origin = {key: checkpoint.get(key) for key in ("best_loss", "config", "step", "tokens", "data")}
    model = LoadedLM(config, origin).to(device)
    load_weights(model, checkpoint)
    return model


CARD = """---
license: {license}
library_name: pytorch
pipeline_tag: text-generation
tags: [linear-attention]
---
A linear-attention language model of {parameters:.1f} M parameters (mixers: {mixers}; feature map: {feature_map}),
trained by LAT to step {step}, {tokens:,} tokens of the dataset `{dataset}`.

- Lowest validation loss: {loss} nats per token (tokenizer `{tokenizer}`, vocabulary {vocab_size:,}).
- Data: `{dataset}`; say here what it is, and under which licence.
- Licence: the code is Apache-2.0; the licence of the weights is yours to state above.

With the code of LAT, in its folder:

    python sample.py --init_from=OWNER/NAME --prompt="..."

or in Python:

    from checkpoint import open_model
    from sample import generate_text

    lm, tokenizer = open_model("OWNER/NAME")
    text, state = generate_text(lm, tokenizer, "...")
"""


def model_card(model, checkpoint, license="other", **_):
    """The README.md of a shared model: what it is, how to load it, licence, data, loss."""
    from huggingface_hub import ModelCard
    config = model.config
    best = checkpoint["best_loss"]
    settings = checkpoint["config"] or {"dataset": "unknown"}
    return ModelCard(CARD.format(
        license=license,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        mixers=" ".join(config.mixers),
        feature_map=config.feature_map,
        step=checkpoint["step"],
        tokens=checkpoint["tokens"] or 0,
        dataset=settings["dataset"],
        loss=f"{best:.4f}" if best is not None and math.isfinite(best) else "not evaluated",
        tokenizer=checkpoint["data"]["tokenizer"],
        vocab_size=config.vocab_size,
    ))


def load_pretrained(source, device="cpu"):
    """The model in an out_dir, a checkpoint file, a folder of save_pretrained, or one of the Hugging Face hub."""
    if os.path.basename(source) == "model.safetensors":
        source = os.path.dirname(source) or "."
    path = Path(source)
    files = [path / name for name in ("best.pt", "ckpt.pt") if (path / name).exists()]
    if path.exists() and not path.is_dir():
        files = [path]
    if files:
        return load_model(load_checkpoint(files[0]), device)
    hub_id = source.count("/") == 1 and not path.parent.is_dir() and path.parts[0] != "out"
    if not path.exists() and not hub_id:                                          # out/bsae: the hub isn't asked
        raise UserError(f"there is no {source}: train first, or name the folder of a trained model")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)               # its lines on retries: ours is enough
    try:
        from huggingface_hub import hf_hub_download
        with redirect_stdout(io.StringIO()):                                      # it prints, and samples go to stdout
            settings = path / "config.json"
            local = path.is_dir() or not hub_answers(source)
            if not path.is_dir():
                settings = hf_hub_download(source, "config.json", local_files_only=local)
            # from_pretrained would leave them out
            unknown = json.loads(Path(settings).read_bytes()).keys() - SETTINGS.keys()
            model = LM.from_pretrained(source, strict=True, local_files_only=local).to(device)
    except ImportError:
        raise UserError(f"{source} holds no checkpoint; to read shared models: "
                        "pip install huggingface_hub safetensors") from None
    except Exception as error:  # a missing file, no network, another kind of model: each its own exception type
        kind = type(error).__name__
        reasons = {"LocalEntryNotFoundError": "it does not answer, and no copy is kept here: check the network",
                   "RepositoryNotFoundError": "it has no public model of this name",
                   "FileNotFoundError": "the folder has no best.pt, ckpt.pt or config.json"}
        raise UserError(f"{source} is neither a folder with a checkpoint or a shared model, nor one that the Hugging "
                        f"Face hub gives ({reasons.get(kind) or f'{kind}: {show(str(error), str)}'})") from None
    if unknown:
        raise UserError(f"{source} was made by another version of model.py: its config.json has "
                        f"{', '.join(sorted(unknown))}")
    return model


def hub_answers(source):
    """Is there a network? Asked before the first download, which would try again for half a minute; a copy that was
    kept needs none. Raises where the hub answers that it has no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import RepositoryNotFoundError
    try:
        HfApi().model_info(source, timeout=10)
    except RepositoryNotFoundError:
        raise
    except Exception:  # each library below has its own types
        return False
    return True


def checkpoint_in(out_dir):
    """out_dir, or UserError if it holds no checkpoint, which names those beside it, the one trained in last first."""
    if any(Path(out_dir, name).exists() for name in ("best.pt", "ckpt.pt")):
        return out_dir
    if Path(out_dir).is_file():
        raise UserError(f"out_dir is the folder of a training: to open a file, --init_from={shell(str(out_dir))}")
    found = sorted(Path(out_dir).parent.glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    flags = [f"--out_dir={shell(str(path.parent))}" for path in found[:3]] or ["--out_dir=..."]
    raise UserError(f"no checkpoint {out_dir}/ckpt.pt: train first, or name the folder of a trained model, "
                    + " or ".join(flags) + f" ({len(found)} in all)" * (len(found) > 3))


def open_model(source, device="auto", precision="auto"):
    """The model that `source` names, ready to be read from, and its tokenizer. inference(model) makes it fast.

    Args: source, an out_dir, a checkpoint file, a folder of save_pretrained, or an id of the Hugging Face hub.
    Raises: UserError for no such model, another tokenizer than here, or weights that are not numbers.
    """
    device = pick_device(device)
    model = load_pretrained(source, device)
    name, _, digest = model.config.tokenizer.partition(":")
    tokenizer = load_tokenizer(name)
    if tokenizer.hash != digest:
        raise UserError(f"the {name} tokenizer here is not the one the model was trained with")
    if device.type == "cuda" or precision != "auto":                              # steps are small: fp32 elsewhere
        precision = pick_precision(precision, device)
    model = cast_for_decoding(model, precision)
    check_numbers(model, source)
    return model, tokenizer


@torch.no_grad()
def check_numbers(model, source):
    """Failed where the weights, or what they make of a token, are NaN or inf: that would generate without an error."""
    with inference(model):
        logits, _ = model(torch.zeros(1, 1, dtype=torch.long, device=model.embed.weight.device))
    if not all(x.isfinite().all() for x in [logits, *model.parameters()]):
        raise Failed(f"the weights of {source} give NaN or inf: its training diverged; use an earlier checkpoint")


def inference(model):
    """The autocast to run an opened model in: that of its weights."""
    weight = model.embed.weight
    return autocast(weight.device, "bf16" if weight.dtype == torch.bfloat16 else "fp32")


# ----------------------------------------------------------------------------------------------------------------------
# Where a run begins: at step 0, with the weights of another model, or where it stopped


def settings_to_start_from(config):
    """Defaults for the model's settings: those of the model that this run starts from or evaluates."""
    load_plugin(config.plugin)                                                    # before the mixers' names are checked
    latest = Path(config.out_dir) / "ckpt.pt"
    if config.eval_only and not config.init_from:
        return load_checkpoint(latest)["model_config"]
    if not config.init_from:
        return {}
    if not config.eval_only:
        source = os.path.realpath(config.init_from)
        if os.path.realpath(config.out_dir) in (source, os.path.dirname(source)):
            raise UserError(f"init_from={config.init_from} lies in out_dir, which the new run will write: "
                            "use another --out_dir")
        if config.resume is not False and latest.exists():                        # started: its source may be gone
            return load_checkpoint(latest)["model_config"]
    return dataclasses.asdict(load_pretrained(config.init_from).config)


def find_checkpoint(config, data):
    """The checkpoint of out_dir that this command continues (or evaluates), or None. UserError if it should not."""
    latest = Path(config.out_dir) / "ckpt.pt"
    if config.eval_only and config.init_from:
        return None
    if config.resume is False and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        config.resume = "auto"                                                    # torchrun's restart of our own run
    must_exist = config.eval_only or config.resume is True or config.resume in CHANGED
    if must_exist or config.resume == "auto" and latest.exists():
        checkpoint = load_checkpoint(latest)
        try:
            config.eval_only or check_training(checkpoint)
        except ValueError as error:
            raise UserError(f"{latest} does not hold what a run needs to resume ({error}): use --init_from={latest} "
                            "and another --out_dir to start from its weights") from None
        if config.precision == "auto":                                            # a probe may answer differently today
            config.precision = checkpoint["config"]["precision"]
        if checkpoint["data"]["tokenizer_hash"] != data["tokenizer_hash"]:
            raise UserError(f"{latest} was trained on {checkpoint['data']['tokenizer']} tokens, and this dataset holds "
                            f"{data['tokenizer']} tokens: use --dataset of the same tokenizer")
        return checkpoint
    others = [*latest.parent.glob("best.pt"), *sorted(latest.parent.glob(KEPT))]
    log = Log.read(latest.with_name("metrics.jsonl")) if config.resume == "auto" else []
    if not others and any("val_loss" in record for record in log):                # evaluated is only what was saved
        raise UserError(f"{latest.parent} has no checkpoint, but it has the log of a run that had one: move "
                        "metrics.jsonl away, use another --out_dir, or --resume=false to start over")
    if config.resume == "auto" and others:
        raise UserError(f"there is no {latest}, but there is {others[-1].name}: copy it to ckpt.pt to resume from "
                        "there, or use --resume=false to start over")
    return None


def changes(checkpoint, config, model_config, data):
    """{setting: "setting was this, now that"} between a checkpoint and the run that wants to continue it."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    before = defaults | checkpoint["config"] | settings_of(checkpoint) | checkpoint["data"]
    now = dataclasses.asdict(config) | dataclasses.asdict(model_config) | data
    changed = {}
    for key, value in now.items():
        if key not in config.FREE and before.get(key) != value:
            changed[key] = f"{key} was {before.get(key)}, now {value}"
    if "sha256" in changed:
        changed["sha256"] = "the files of the dataset have changed"
    return changed


def refuse_changes(path, checkpoint, config, model_config, data):
    """UserError that names what differs between a checkpoint and the run that wants to continue it."""
    if changed := changes(checkpoint, config, model_config, data):
        raise UserError(f"{path} belongs to another run: {'; '.join(changed.values())}. Use another --out_dir, the "
                        "earlier settings, --resume=changed to resume with the new ones, or --resume=false to start "
                        "over")


def is_finished(config, step):
    """Is the last step made, and its evaluation, which comes after the save, in the log?"""
    records = Log.read(Path(config.out_dir, "metrics.jsonl"))
    return step >= config.max_steps and any(r["step"] == step and "val_loss" in r for r in records)


def check_meaning(path, checkpoint, model):
    """UserError where settings changed that give the weights another meaning."""
    before = settings_of(checkpoint)
    changed = [f"{key} was {before[key]}, now {value}" for key, value in dataclasses.asdict(model.config).items()
               if value != before[key] and key not in SAME_MEANING]
    if changed:
        fits = not misfits(model.state_dict(), checkpoint["model"])
        way = ", or use --resume=changed_model to do so on purpose" * fits
        raise UserError(f"the weights in {path} would mean something else: {'; '.join(changed)}. Leave that out{way}")


def loss_of_best(path, config, model_config, data):
    """That of best.pt, which may be of an evaluation after ckpt.pt was saved; infinity where ours are of others."""
    if not path.exists():
        return math.inf
    best = load_checkpoint(path)
    same = (best["data"] == data and best["config"].get("eval_tokens") == config.eval_tokens
            and best["model_config"]["seq_len"] == model_config.seq_len)
    return best["best_loss"] if same else math.inf


def settings_of(checkpoint):
    """The settings of its model; those that are newer than it have their defaults."""
    return dataclasses.asdict(make_config(checkpoint["model_config"]))


def position_names(checkpoint):
    """The names of the parameters in the order in which its optimiser counted them."""
    with torch.device("meta"):                                                    # the model as it was, without numbers
        model = LM(make_config(checkpoint["model_config"]))
    groups = parameter_groups(model, checkpoint["config"].get("optimizer", "adamw"))
    return [name for group in groups.values() for name in group if name in checkpoint["model"]]


def check_evaluation(source, model, wanted):
    """UserError where a model is to be evaluated with settings that are not its own; its seq_len may be another."""
    theirs = dataclasses.asdict(model.config)
    free = SAME_MEANING - {"tied"}
    changed = [f"{key} is {theirs[key]}, not {value}" for key, value in dataclasses.asdict(wanted).items()
               if value != theirs[key] and key not in free]
    if changed:
        raise UserError(f"eval_only evaluates {source} as it is, and its {', its '.join(changed)}: leave that out")
    if theirs["pos"] == "learned" and wanted.seq_len > theirs["seq_len"]:
        raise UserError(f"{source} has learned positions, which end at seq_len={theirs['seq_len']}: use no larger one")


def start_from(model, source, name):
    """Copies the weights of source into model, and says what changed.

    Outside the mixers everything must fit. In a mixer what has the same name and shape is kept and the rest stays new,
    so that another mixer can start from what a trained one has learned: qkv and out mean the same in all attentions.
    """
    mine, theirs = model.state_dict(), source.state_dict()
    differ = misfits(mine, theirs)
    kept = mine.keys() - differ
    here, there = (dataclasses.asdict(m.config) for m in (model, source))
    changed = "; ".join(f"{key} was {there[key]}, now {here[key]}" for key in here if here[key] != there[key])
    if unfit := [key for key in differ if ".mixer." not in key]:
        raise UserError(f"{name} holds a model of another shape ({changed}): {first_of(unfit)} would not fit; "
                        "leave out what is set differently here")
    check_shared(model, theirs, name)
    model.load_state_dict({key: theirs[key] for key in kept}, strict=False)

    def names(keys):
        return ", ".join(sorted({re.sub(r"blocks\.\d+\.", "", key) for key in keys})) or "nothing"
    say(f"{name}: {changed or 'the same settings'}; kept {len(kept)} of {len(theirs)} tensors; new: "
        f"{names(mine.keys() - kept)}; left out: {names(theirs.keys() - kept)}")


def restore_run(run, checkpoint):
    """Sets a run to where it was when save_run saved it. UserError where its settings now do not allow that."""
    config = checkpoint["config"]
    names = position_names(checkpoint)
    if run.config.resume == "changed":
        check_meaning(run.latest, checkpoint, run.model)
    load_weights(run.model, checkpoint, run.latest)
    if config.get("optimizer", "adamw") != run.config.optimizer:                  # resume=changed
        raise UserError(f"{run.latest} was trained with another optimizer: use --init_from={run.latest} and another "
                        "--out_dir to start from its weights")
    new = load_named_state(run.optimizer, checkpoint["optimizer"], names, checkpoint["step"])
    if new:
        say(f"the optimizer state is reset for {', '.join(new)}")
    run.step = checkpoint["step"]
    run.saved = checkpoint["step"]
    run.sequences = checkpoint.get("sequences", run.step * config["batch_size"])
    run.tokens = checkpoint.get("tokens", run.sequences * checkpoint["model_config"]["seq_len"])
    run.best_loss = checkpoint["best_loss"]
    run.spikes.recent.extend(checkpoint["recent_losses"])
    run.skips, run.skips_in_a_row = checkpoint["skips"]
    torch.set_rng_state(checkpoint["rng"]["cpu"].cpu())                           # for the bytes: steps seed their own
    if run.config.resume in CHANGED:
        adapt(run, checkpoint)


def adapt(run, checkpoint):
    """Says which settings changed, and what that does to the place in the data."""
    changed = changes(checkpoint, run.config, run.model_config, run.data.fingerprint)
    if "init_from" in changed and run.config.init_from:
        raise UserError(f"{run.latest} continues with its own weights: leave --init_from out, or use another --out_dir "
                        f"to start from {run.config.init_from}")
    say(f"resuming with changed settings: {'; '.join(changed.values()) or 'none'}")
    run.skips_in_a_row = 0
    run.best_loss = loss_of_best(run.best, run.config, run.model_config, run.data.fingerprint)
    if "dataset" in changed:
        run.sequences = 0
        say(f"the run continues at the beginning of {run.config.dataset}")
    elif changed.keys() & {"seq_len", "seed", "sha256"}:
        run.sequences = -(-run.tokens // run.model_config.seq_len)
        done = run.sequences % run.windows.total / run.windows.total
        say(f"the text is cut and ordered differently, and the run continues at sequence {run.sequences:,}: {done:.0%} "
            "of the epoch is done; some of it will be read again, and some of the rest left out")
    elif "batch_size" in changed:
        say(f"the run continues at sequence {run.sequences:,}: no text is repeated or skipped")
