"""Claims about configurator.py: what is accepted, and that every mistake is one plain sentence, never a traceback."""
import importlib
import io
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import configurator
import eval
import model
import prepare
import sample
import train
from configurator import UserError, configure

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Model:
    dim: int = 64  # width of the model
    dropout: float = 0.0  # probability # of dropping
    mixers: str | list[str] = "linear"  # pattern over the depth
    pos: Literal["none", "rope"] = "none"  # positions
    window: int | None = None  # tokens in the window
    seed: int = 1  # shared with Train

    def __post_init__(self):
        if self.dim % 8:
            raise ValueError(f"dim must be\n a multiple of 8, got {self.dim}")


@dataclass
class Train:
    lr: float = 3e-4  # peak learning rate
    max_steps: int = 100  # optimiser steps
    compile: bool = False  # torch.compile
    dataset: str = "stdlib"  # folder in data/
    resume: bool | Literal["auto"] = "auto"  # go on
    order: Literal[1, 2] = 2  # of the Taylor map
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    files: list[str] = field(default_factory=list)  # inputs
    seed: int = 1  # shared with Model


def flags(*argv):
    model, train = configure(list(argv), Model, Train)
    return {**vars(train), **vars(model)}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """file(text, *argv) configures from a config file of that text; messages then start with "x.py"."""
    monkeypatch.chdir(tmp_path)

    def read(text, *argv):
        Path("x.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        return flags("x.py", *argv)
    return read


# What is accepted

def test_defaults_stand_when_nothing_is_given():
    assert configure([], Model, Train) == (Model(), Train())


def test_flags_win_over_files_wherever_they_stand_and_later_ones_over_earlier_ones(file, tmp_path):
    (tmp_path / "y.py").write_text("dim = 16\nlr = 0.5")
    assert file("dim = 8\nmax_steps = 3", "y.py")["dim"] == 16
    config = file("dim = 8\nmax_steps = 3", "--dim=24", "--dim=32", "y.py")
    assert (config["dim"], config["max_steps"], config["lr"]) == (32, 3, 0.5)


def test_config_file_may_hold_docstring_comments_literals_and_arithmetic(file):
    config = file('"""Doc."""\n# note\ndim = 8 * (2 + 2)  # width\nlr = -2**-3 % 1\nmixers = ["linear",\n  "window"]\n'
                  "betas = (0.5, 9 / 10)\nwindow = None\ncompile = True\ndataset = 'a' 'b'\nmax_steps = 7 // 2 - 1")
    assert (config["dim"], config["lr"], config["mixers"]) == (32, 0.875, ["linear", "window"])
    assert (config["betas"], config["window"], config["compile"]) == ((0.5, 0.9), None, True)
    assert (config["dataset"], config["max_steps"]) == ("ab", 2)


@pytest.mark.parametrize("flag, key, value", [
    ("--dim=8*4", "dim", 32), ("--dim= 8 ", "dim", 8), ("--order=1", "order", 1),
    ("--max_steps=1e4", "max_steps", 10000), ("--max_steps=-3", "max_steps", -3),
    ("--lr=1", "lr", 1.0), ("--lr=1/4", "lr", 0.25), ("--window=none", "window", None), ("--window=128", "window", 128),
    ("--compile", "compile", True), ("--compile=FALSE", "compile", False), ("--compile=1", "compile", True),
    ("--compile=0", "compile", False), ("--dataset=8*4", "dataset", "8*4"), ("--dataset=true", "dataset", "true"),
    ("--dataset='a'", "dataset", "'a'"), ("--dataset=", "dataset", ""), ("--dataset=a=b\n", "dataset", "a=b\n"),
    ("--dataset=\\d\0\ud800", "dataset", "\\d\0\ud800"), ("--pos=rope", "pos", "rope"),
    ("--betas=0.5,1", "betas", (0.5, 1.0)), ("--mixers=linear window", "mixers", "linear window"),
    ("--files=a,b", "files", ["a", "b"]), ("--resume=auto", "resume", "auto"),
    ("--resume", "resume", True), ("--resume=false", "resume", False),
])
def test_flag_is_read_as_its_field_wants_it(flag, key, value):
    got = flags(flag)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("argv, key, value", [
    ("--dim 8*4", "dim", 32), ("--max_steps -3", "max_steps", -3), ("--dataset a=b", "dataset", "a=b"),
    ("--dataset x.py", "dataset", "x.py"), ("--window none", "window", None), ("--files a,b", "files", ["a", "b"]),
    ("--resume auto", "resume", "auto"), ("--resume --dim 8", "resume", True), ("--compile false", "compile", False),
    ("--compile --dim 8", "compile", True), ("--compile x.py", "compile", True), ("--compile 1 x.py", "compile", True),
    ("--lr 1 --dim=8", "lr", 1.0), ("x.py --lr 1", "lr", 1.0), ("--lr 1 x.py", "lr", 1.0)])
def test_a_value_may_be_the_next_word_of_the_command_line(file, argv, key, value):
    file("seed = 7")
    argv = argv.split()
    got = flags(*argv)
    assert got[key] == value and type(got[key]) is type(value)
    assert got["seed"] == (7 if "x.py" in argv and "--dataset" not in argv else 1)
    assert flags(*configurator.joined(argv, Model, Train)) == got


def test_flag_and_file_give_the_same_value(file):
    for key, text in ("max_steps", "1e4"), ("lr", "3"), ("dim", "2**6"), ("betas", "[1, 0.5]"):
        assert repr(file(f"{key} = {text}")[key]) == repr(flags(f"--{key}={text}")[key])


def test_key_of_several_classes_sets_them_all():
    model, train = configure(["--seed=7"], Model, Train)
    assert model.seed == train.seed == 7


def test_home_is_found_in_every_path_and_in_no_other_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    modules = ["train", "sample", "eval", "prepare", "model"]
    modules += [f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("[a-z]*.py")]
    found = {}
    for module in map(importlib.import_module, modules):
        for cls in [value for name, value in vars(module).items() if name.endswith("Config")]:
            found |= {item.name: cls for item in fields(cls) if item.type is str}
    others = {"dataset", "device", "config", "text_field", "shards", "prompt", "tasks", "wandb_project", "feature_map",
              "parts", "seq_lens", "positions", "decode_batch", "lrs", "presets", "only", "data_files"}  # these are globs
    expanded = {key for key in found if configurator.expand_home(key, "~/x") == f"{tmp_path}/x"}
    assert expanded == found.keys() - others and {"out_dir", "prompt_file", "save_state", "json"} <= expanded
    config, = configure(["--out_dir=~/x", "--prompt=~/x", "--load_state=~no-such-user/x"], sample.SampleConfig)
    assert (config.out_dir, config.prompt, config.load_state) == (f"{tmp_path}/x", "~/x", "~no-such-user/x")


# What is refused, and how

@pytest.mark.parametrize("argv, words", [
    (["--dmi=8"], ["--dmi ", "nearest is dim"]), (["--max-steps=8"], ["--max-steps ", "nearest is max_steps"]),
    (["--qqq=8"], ["--qqq is not a known key; --help lists all"]), (["--=8"], ["not a known key"]), (["--"], ["not a known key"]),
    (["--dim=abc"], ["--dim must be a whole number, got 'abc'"]), (["--dim=3.5"], ["must be a whole number, got '3.5'"]),
    (["--dim=true"], ["must be a whole number, got 'true'"]), (["--dim=1e23"], ["must be a whole number"]),
    (["--dim="], ["must be a whole number, got ''"]), (["--dim"], ["--dim must be a whole number, got no value: write --dim="]),
    (["--dim", "--lr", "1"], ["got no value: write --dim="]), (["--dim", "x"], ["--dim must be a whole number, got 'x'"]),
    (["--dmi", "8"], ["--dmi ", "nearest is dim"]), (["--compile", "maybe"], ["'maybe' is not understood"]),
    (["--dim=dim"], ["must be a whole number"]),
    (["--lr=nan"], ["--lr must be a number, got 'nan'"]), (["--lr=inf"], ["must be a number"]),
    (["--lr=1e999"], ["must be a number"]), (["--lr=(-1)**0.5"], ["must be a number"]), (["--lr=1/0"], ["must be a number"]),
    (["--lr=True"], ["must be a number"]),
    (["--compile=2"], ["must be True or False, got '2'"]), (["--compile=yes"], ["must be True or False"]),
    (["--compile=" + "y" * 999], ["got '" + "y" * 56 + "..."]),
    (["--pos=rop"], ["--pos must be 'none' or 'rope', got 'rop'"]), (["--window=x"], ["must be a whole number or None, got 'x'"]),
    (["--betas=1"], ["--betas"]), (["--betas=1,2,3"], ["--betas"]), (["--resume=maybe"], ["True or False or 'auto'"]),
    (["stray"], ["'stray' is not understood", "--key=value"]), (["-x"], ["'-x' is not understood"]),
    (["--dim=9"], ["dim must be", "a multiple of 8, got 9"]),
    (["--dim=10**200"], ["--dim must be a whole number, got '10**200', which is too large"]),
    (["--dim=1e30"], ["got '1e30', which is too large"]), (["--dim=9**99**9"], ["which is too large"]),
    (["--lr=1e300"], ["--lr must be a number, got '1e300', which is too large"]), (["--lr=-1e999"], ["is too large"]),
    (["--window=10**200"], ["a whole number or None, got '10**200', which is too large"]),
])
def test_bad_flag_is_rejected_with_its_reason(argv, words):
    with pytest.raises(UserError) as caught:
        flags(*argv)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("typed, key", configurator.NANOGPT.items())
def test_a_name_of_nanogpt_is_answered_with_ours_by_programs_that_have_it(typed, key):
    classes = [sample.SampleConfig] if key == "prompt" else [train.TrainConfig, model.ModelConfig]
    with pytest.raises(UserError, match=f"^--{typed} is not a known key; the nearest is {key},"):
        configure([f"--{typed}=1"], *classes)
    with pytest.raises(UserError, match="^--n_layer is not a known key; --help lists all$"):
        flags("--n_layer=1")


@pytest.mark.parametrize("argv, message", [
    (["config/tiny.py"], "config/tiny.py:2: dataset is a setting of train.py; to use the model that it trained: "
     "--out_dir=out/wee"),
    (["--temp=1"], "--temp is not a known key; the nearest is temperature, and --help lists all"),
    (["--lr=1"], "--lr is a setting of train.py"), (["--warmup-steps=1"], "--warmup-steps is a setting of train.py"),
    (["out/mine"], "'out/mine' is not understood: write --out_dir=out/mine"),
    (["runs/a"], "'runs/a' is not understood: write --out_dir=runs/a"),
    (["out/mine/best.pt"], "'out/mine/best.pt' is not understood: write --init_from=out/mine/best.pt"),
    (["def read"], "'def read' is not understood: write --prompt='def read'"),
    (["--prompt=def", "read"], "'read' is not understood: a flag is written --key=value, in quotes where it has spaces; "
     "a config file ends in .py")])
def test_what_newcomers_type_to_sample_is_answered_with_what_to_type(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("config", "runs/a"):
        Path(folder).mkdir(parents=True)
    Path("config/tiny.py").write_text("out_dir = 'out/wee'\ndataset = 'stdlib'")
    Path("runs/a/ckpt.pt").touch()
    with pytest.raises(UserError) as caught:
        configure(argv, sample.SampleConfig)
    assert str(caught.value) == message
    with pytest.raises(UserError, match="^'tiny' is not understood: write config/tiny.py$"):
        configure(["tiny"], train.TrainConfig)


def test_a_file_without_a_key_is_the_text_of_programs_that_read_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my text.txt").touch()
    for key, kind in (("file", eval.EvalConfig), ("data_files", prepare.PrepareConfig)):
        with pytest.raises(UserError, match=f"'my text.txt' is not understood: write --{key}='my text.txt'$"):
            configure(["my text.txt"], kind)


@pytest.mark.parametrize("text, message", [
    ("\ndmi = 8", "x.py:2: dmi is not a known key; the nearest is dim"),
    ("dim = 'a'", "x.py:1: dim must be a whole number, got 'a'"),
    ("dim = True + 7", "x.py:1: `dim = True + 7` cannot"), ("order = True", "x.py:1: order must be 1 or 2, got True"),
    ("dim = 3.5", "x.py:1: dim must be a whole number, got 3.5"), ("dim = True", "x.py:1: dim must be a whole number, got True"),
    ("compile = 1", "x.py:1: compile must be True or False, got 1"), ("dataset = 1", "x.py:1: dataset must be text"),
    ("lr = 1e999", "x.py:1: `lr = 1e999` cannot"), ("\ndim = 8\ndim = 16", "x.py:3: dim is already set in line 2"),
    ("import os", "x.py:1: `import os` is not allowed"), ("dim += 1", "x.py:1: `dim += 1` is not"),
    ("dim, lr = 8, 1", "x.py:1: `dim, lr = 8, 1` is not"), ("dim = lr = 8", "x.py:1: `dim = lr = 8` is not"),
    ("dim: int = 8", "x.py:1: `dim: int = 8` is not"), ("if True:\n    dim = 8", "x.py:1: `if True:` is not"),
    ("print(1)", "x.py:1: `print(1)` is not"), ("dim = 8\n'doc'", "x.py:2: `'doc'` is not"),
    ("dim = int(8)", "x.py:1: `dim = int(8)` cannot"), ("lr = 1\ndim = lr", "x.py:2: `dim = lr` cannot"),
    ("dim = (8).real", "x.py:1: `dim = (8).real` cannot"), ("dataset = f'{1}'", "x.py:1: `dataset = f'{1}'` cannot"),
    ("dim = [8][0]", "x.py:1: `dim = [8][0]` cannot"), ("dim = 8 if 1 else 9", "x.py:1: `dim = 8 if 1 else 9` cannot"),
    ("dataset = 'a' * 10**9", "x.py:1: `dataset = 'a' * 10**9` cannot"), ("lr = 1 / 0", "division by zero"),
    ("dataset = b'a'", "x.py:1: `dataset = b'a'` cannot"), ("dim = ", "x.py:1: invalid syntax"),
    (" dim = 8", "x.py:1: "), ("dim = 8\0", "x.py:"),
    (b"dim = 8 # \xff", "x.py: cannot be read as a config file: it is not UTF-8"),
    ("dim = " + "(" * 500 + "8" + ")" * 500, "x.py:"), ("dim = " + "-" * 50_000 + "8", "x.py:"),
    ("dim = " + "1+" * 50_000 + "1", "x.py:"), ("dim = " + "9" * 5000, "x.py:1"),
    ("dim = 0x" + "f" * 5000, "too large"), ("dim = 10.0**30", "1e+30, which is too large"),
])
def test_bad_config_file_is_rejected_with_its_line(file, text, message):
    with pytest.raises(UserError) as caught:
        file(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("number", ["10**10**10", "2**(2**40)", "9**99**99", "1e300**99", "((10**50)**50)**50", 
                                    "7**1e9", "10**99 * 10**99", "(-10)**(10**10)"])
def test_absurd_arithmetic_is_refused_at_once(file, number):
    with pytest.raises(UserError):                                                # computed, it would never end
        file(f"dim = {number}")
    with pytest.raises(UserError):
        flags(f"--dim={number}")


def test_text_that_looks_like_bad_python_gives_no_warning():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UserError):
            flags(r"--window='\d'")
    assert not seen


def test_config_file_is_never_run(file, tmp_path):
    with pytest.raises(UserError):
        file("dim = open('ran', 'w')")
    assert not (tmp_path / "ran").exists()


def test_missing_config_file_is_named_with_the_nearest_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^a.py: no such config file$"):
        flags("a.py")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tiny.py").write_text("")
    (tmp_path / "config" / "base.py").write_text("")
    with pytest.raises(UserError, match=r"config/tinny.py: no such config file; is it config/tiny.py\?"):
        flags("config/tinny.py")
    with pytest.raises(UserError, match=r"zzzzz.py: no such config file; is it config/base.py or config/tiny.py\?"):
        flags("zzzzz.py")
    with pytest.raises(UserError, match="cannot be read as a config file"):
        (tmp_path / "folder.py").mkdir()
        flags("folder.py")
    os.mkfifo("pipe.py")
    with pytest.raises(UserError, match="pipe.py: cannot be read as a config file: it is a pipe"):
        flags("pipe.py")


def test_program_without_config_files_refuses_them():
    with pytest.raises(UserError, match="not understood"):
        configure(["x.py"], Model, config_file=False)


def test_key_without_default_must_be_given():
    @dataclass
    class Needy:
        name: str  # no default

    with pytest.raises(UserError, match="--name=... is needed"):
        configure([], Needy)
    assert configure(["--name=a"], Needy)[0].name == "a"


# The programs around it

PROGRAM = '''
"""What this program does."""
import os
import resource
import sys
from dataclasses import dataclass
import configurator
from configurator import command, configure, help_first

help_first(__name__, __file__)

@dataclass
class ToyConfig:
    dim: int = 64  # width of the model # of features
    fail: str = ""  # how to fail

    def __post_init__(self):
        if self.dim % 8:
            raise ValueError(f"dim must be\\n a multiple of 8")

def main():
    config, = configure(sys.argv[1:], ToyConfig)
    if config.fail == "late":
        print("not yet flushed")
        raise configurator.UserError("cannot write, No space left")
    if config.fail == "ctrl-c":
        raise KeyboardInterrupt
    if config.fail == "model":
        raise configurator.Failed("the weights are not numbers")
    if config.fail == "write":
        with open("written", "w") as file:
            file.write("mine\\n")
            os.write(1, b"printed\\n")
            print("printed", os.fstat(0))
    if config.fail == "log":
        print("log", file=sys.stderr, flush=True)
        return
    if config.fail.startswith("os."):
        eval(config.fail)
    if config.fail:
        open(config.fail)
    for _ in range(config.dim):
        print("x" * 1000)

if __name__ == "__main__":
    command(main)
'''


@pytest.fixture
def program(tmp_path):
    """program(arguments) runs a small program by the shell: (exit code, stdout, stderr)."""
    (tmp_path / "toy.py").write_text(textwrap.dedent(PROGRAM))
    env = {**os.environ, "PYTHONPATH": str(Path(configurator.__file__).parent), "COLUMNS": "80"}
    env.pop("PYTHONUNBUFFERED", None)  # buffered output meets a closed pipe later, at the flush

    def run(arguments):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", f"'{sys.executable}' toy.py {arguments}"],
                              cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    return run


@pytest.mark.parametrize("arguments", ["--dmi=8", "--dim=x", "nowhere.py", "--dim=9", "toy.py", "'a\nb'",
                                       "--dim $'\\xff'"])
def test_mistake_is_exit_code_2_and_one_line_without_traceback(program, arguments):
    code, out, err = program(arguments)
    assert code == 2 and out == ""
    assert err.startswith("toy.py: ") and err.count("\n") == 1 and err.endswith("\n")


def test_success_is_exit_code_0(program):
    code, out, err = program("--dim=8")
    assert (code, out.count("x"), err) == (0, 8000, "")


def test_a_log_on_a_full_disk_fails_no_run(program):
    assert program("--fail=log 2>/dev/full")[0] == 0
    assert program("--dim=9 2>/dev/full")[0] == 2
    assert program("--dim=8 >/dev/full")[0] == 2


def test_a_command_that_is_shown_is_one_word_for_each_to_a_shell():
    words = ["plain", "two words", "it's", "$(x)", "*", "\x1b[2J'\\", "é", os.fsdecode(b"\xff"), "\n", ""]
    shown = configurator.shell(*words)
    assert shown.isprintable() and shown.startswith("plain 'two words' ")
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, check=True).stdout
    assert [os.fsdecode(word) for word in echoed.split(b"\0")[:-1]] == words


@pytest.mark.parametrize("encoding, shown", [("ascii", "$'na\\xc3\\xafve'"), ("cp1252", "'naïve'"), ("utf-8", "'naïve'")])
def test_a_command_that_is_shown_can_be_pasted_back_whatever_the_terminal_can_show(monkeypatch, encoding, shown):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert configurator.shell("naïve") == shown


def test_help_shows_examples_usage_and_every_key_with_default_and_meaning(program):
    code, out, err = program("--dim=oops --help")
    assert (code, err) == (0, "")
    assert out.startswith("What this program does.") and "usage: python toy.py [config/NAME.py ...] [--key=value ...]" in out
    assert "  --dim=64                    width of the model # of features\n" in out and "--fail=  " in out


@pytest.mark.parametrize("optimised", [[], ["-OO"]])
@pytest.mark.parametrize("name", ["train.py", "sample.py", "eval.py", "prepare.py",
                                  "experiments.bench", "experiments.compare", "experiments.recall"])
def test_help_of_every_program_is_whole_and_imports_no_torch(tmp_path, name, optimised):
    root = Path(configurator.__file__).parent
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported, which takes seconds')")
    program = [name] if name.endswith(".py") else ["-m", name]
    done = subprocess.run([sys.executable, *optimised, *program, "--help"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n    python {' '.join(program)}" in done.stdout and f"usage: python {' '.join(program)} [" in done.stdout
    module = importlib.import_module(name.removesuffix(".py"))
    configs = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__name__.endswith("Config")]
    own = [config for config in configs if config.__module__ == name]
    assert "ClassVar" not in done.stdout and "FREE" not in done.stdout
    for config in configs if name in ("train.py", "experiments.bench") else own:
        for one in fields(config):
            line, = (line for line in done.stdout.splitlines() if line.startswith(f"  --{one.name}="))
            assert line.startswith(f"  --{one.name}={one.default}") and len(line) > 30, line


def test_help_wraps_to_the_terminal_and_shows_groups_and_legal_values(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "toy.py").write_text('''"""Doc."""
class ToyConfig:
    # What is trained
    pos: Literal["none", "rope"] = "none"  # positions
    said: Literal["a", "b"] = "a"  # what a and b are
    resume: bool | Literal["auto"] = "auto"  # go on

    # The machine
    window: int | None = None  # a text that is much longer than the line of a terminal
    files: list[str] = field(default_factory=list)  # inputs
    name: str  # no default
    FREE: ClassVar = {"pos"}
''')
    page = configurator.help_text([tmp_path / "toy.py"])
    assert all(len(line) <= 60 for line in page.splitlines() if line.startswith(" "))
    assert [line for line in page.splitlines() if line.endswith(":")] == ["What is trained:", "The machine:"]
    assert "The model:" in configurator.help_text(["train.py", "model.py"]).splitlines()
    assert "positions (none, rope)\n" in page and "go on (True, False, auto)\n" in page
    assert "what a and b are\n" in page                                           # it names them
    assert "  --name=                     no default" in page and "  --files=                    inputs\n" in page
    assert "  --window=None               a text that is much longer\n" + 30 * " " + "than" in page


def test_ctrl_c_is_exit_code_130_and_one_line(program):
    assert program("--fail=ctrl-c") == (130, "", "toy.py: interrupted\n")


def test_closed_pipe_is_quiet(program):
    line = "x" * 1000 + "\n"
    assert program("--dim=8000 | head -1") == (141, line, "")
    assert program("--dim=8 | true") == (141, "", "")
    assert program("--help | true") == (141, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_one_line(program):
    for arguments in ("--dim=8", "--dim=8000", "--help", "--fail=late"):
        code, _, err = program(f"{arguments} > /dev/full")
        assert code == 2 and err.startswith("toy.py: cannot") and "No space left" in err and err.count("\n") == 1


@pytest.mark.parametrize("fail, reason", [
    ("folder", "folder: Is a directory"), ("folder/none", "folder/none: No such file"), ("toy.py/x", "toy.py/x: Not a dir"),
    ("x" * 300, "File name too long"), ("loop", "loop: Too many levels of symbolic links"),
    ("os.mkdir('folder')", "folder: File exists"), ("os.rmdir('full')", "full: Directory not empty"),
    ("os.listdir('toy.py')", "toy.py: Not a directory"), ("os.kill(1, 0)", "Operation not permitted"),
    ("os.open('toy.py', resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)) or 0)", "ulimit -n"),
    ("os.stat('a' + chr(0))", "a NUL character"), ("os.stat(chr(0xd800))", "no file can be named"),
    ("private", "private: Permission denied")])
def test_what_the_system_refuses_is_one_line_with_the_name_of_the_file(program, tmp_path, fail, reason):
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "private").touch(mode=0)
    if fail in ("private", "os.kill(1, 0)") and os.geteuid() == 0:
        pytest.skip("root may do everything")
    code, out, err = program(f"""--fail="{fail}" """)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("toy.py: ") and reason in err, err


def test_a_failure_that_no_other_command_line_mends_is_exit_code_1(program):
    assert program("--fail=model") == (1, "", "toy.py: the weights are not numbers\n")


def test_names_with_control_characters_do_not_reach_the_terminal(program):
    code, _, err = program(r"--fail=$'a\e[2J\e]0;title\ab\xff'")
    assert code == 2 and err.isascii() and err[:-1].isprintable() and r"a\x1b[2J\x1b]0;title\x07b\udcff" in err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_the_null_device_and_no_file_takes_its_place(program, tmp_path, closed):
    assert program(f"--fail=write --dim=8 {closed}")[0] == 2                       # it then opens a file called write
    assert (tmp_path / "written").read_text() == "mine\n"
    assert program(f"--dim=8 {closed}")[0] == 0
    assert program(f"--dim=9 {closed}")[0] == 2


def test_a_terminal_that_lacks_a_character_is_no_reason_to_fail(program):
    shell = f"PYTHONIOENCODING=ascii '{sys.executable}' -c \"import configurator; configurator.command(lambda: print(chr(233)))\""
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=Path(configurator.__file__).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n", "")


# No input gives anything else than a config, a UserError, or help

KEYS = st.sampled_from("dim lr compile mixers pos window betas resume dataset files dmi".split())
VALUES = st.text(max_size=12) | st.text("0123456789.e+-*/%()[],'\" jnaif", max_size=16) | st.sampled_from(
    "True None 1e4 10**10**10 9**9**9**9 [1,'a'] (1,) -1 1j 'a'*9 x 0b1 ... x:=1".split())
ARGUMENTS = st.text(max_size=12) | st.builds("--{}={}".format, KEYS, VALUES) | st.builds("--{}".format, KEYS)
LINES = st.one_of(st.text(max_size=20), st.builds("{} = {}".format, KEYS, VALUES),
                  st.builds("{} = ({}) ** ({})".format, KEYS, VALUES, VALUES))
FILES = st.lists(LINES, max_size=4).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | st.binary()


def is_valid_or_refused(argv):
    try:
        model, train = configure(argv, Model, Train)
    except UserError as error:
        assert str(error).strip()
    else:
        assert type(model.dim) is int and model.dim % 8 == 0 and model.pos in ("none", "rope")
        assert type(train.lr) is float and abs(train.lr) < 1e101 and type(train.compile) is bool
        assert type(train.dataset) is str and train.resume in (True, False, "auto") and len(train.betas) == 2


@settings(max_examples=300, deadline=None)
@given(st.lists(ARGUMENTS, max_size=4))
@example(["--dim=" + "(" * 9000])
@example(["--dim=" + "-" * 90_000 + "1"])
@example(["--lr=1" + "+1" * 30_000])
def test_no_argv_gives_a_traceback(argv):
    is_valid_or_refused(argv)


@settings(max_examples=300, deadline=None)
@given(text=FILES)
def test_no_config_file_gives_a_traceback(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_bytes(text)
    is_valid_or_refused([str(path)])


def test_a_python_without_the_packages_is_told_in_one_line_where_they_are(tmp_path):
    bare = [sys.executable, "-S", "-I", "-c",
            f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['train.py']; "
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"]
    result = subprocess.run(bare, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "not installed" in result.stderr and "source .venv/bin/activate" in result.stderr
