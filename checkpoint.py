"""Checkpoints, the one format of a trained model: whole or not there, written and read here alone.

In out_dir, ckpt.pt is the latest state and best.pt that of the lowest validation loss. train.py writes them; sample.py,
eval.py and the experiments read them.
"""
import dataclasses
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import traceback
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

from configurator import Failed, UserError
from support.dataset import load_tokenizer, tokenizer_id                          # support comes before torch
from support.files import replacing
from support.machine import autocast, pick_device, pick_precision

import torch

from model import LM, ModelConfig

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


def load_plugin(path):
    """Runs a Python file of the user's own, which may add to model.MIXERS and model.FEATURE_MAPS; "" is none.

    Only a path that the user gave on the command line or in a config file ever comes here, none from a checkpoint.
    """
    if not path:
        return
    file = Path(path).resolve()
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
    except Exception as error:  # whatever is wrong in it
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"the plugin {path} fails{where}: {type(error).__name__}: {error}") from None


def load_weights(model, checkpoint):
    weights = checkpoint["model"]
    if any(name.endswith(".mixer.both.weight") for name in weights):
        raise UserError("the checkpoint has `conv` layers of an earlier version, which model.py no longer has (they are "
                        "now as published): train it again")
    for name, weight in model.state_dict().items():
        if name.endswith(".mixer.conv.weight") and name not in weights:
            # Softmax and window layers had no convolution whatever short_conv said: this one changes nothing.
            weights[name] = torch.zeros_like(weight)
            weights[name][0] = 1
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint holds a model of another shape: "
                        f"{' '.join(str(error).split())[:200]}") from None


def load_model(checkpoint, device):
    """The model of a checkpoint, as it was."""
    model = LM(ModelConfig(**checkpoint["model_config"] | {"tokenizer": tokenizer_id(checkpoint["data"])})).to(device)
    load_weights(model, checkpoint)
    return model


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


def checkpoint_in(out_dir):
    """out_dir, or UserError if it holds no checkpoint."""
    if not any(Path(out_dir, name).exists() for name in ("best.pt", "ckpt.pt")):
        raise UserError(f"no checkpoint {out_dir}/ckpt.pt: train first, or name its folder with --out_dir")
    return out_dir


def open_model(source, device="auto", precision="auto"):
    """The model that `source` names, ready to be read from, and its tokenizer. inference(model) runs it as fast as it can.

    Args: source, an out_dir, a checkpoint file, a folder of save_pretrained, or an id of the Hugging Face hub.
    Raises: UserError for no such model, another tokenizer than here, or weights that are not numbers.
    """
    device = pick_device(device)
    model = load_pretrained(source, device).eval()
    name, _, digest = model.config.tokenizer.partition(":")
    tokenizer = load_tokenizer(name)
    if tokenizer.hash != digest:
        raise UserError(f"the {name} tokenizer here is not the one the model was trained with")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise Failed(f"the weights of {source} hold NaN or inf: its training diverged; take an earlier checkpoint")
    if device.type == "cuda" or precision != "auto":                              # steps are small: fp32 elsewhere
        precision = pick_precision(precision, device)
    if precision == "bf16":                                                       # cast once, not at every token
        for p in model.parameters():
            p.data = p.data.bfloat16() if p.dim() == 2 else p.data
    return model, tokenizer


def inference(model):
    """The autocast to run an opened model in: that of its weights."""
    weight = model.embed.weight
    return autocast(weight.device, "bf16" if weight.dtype == torch.bfloat16 else "fp32")
