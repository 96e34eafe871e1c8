"""Dataclass defaults + config files + flags -> validated config objects.

    python train.py config/tiny.py --dim=8*16 --lr 3e-4 --compile

A config class is a dataclass called *Config; the comment that ends a field's line is its meaning, shown by --help.
Later values win: defaults, then config files in the order given, then flags. nanoGPT runs its config files with exec,
so a misspelt key passes silently and a file can do anything. Here a config file is data: `key = value` lines that are
parsed and never run; a key that no class has, or a value that is not of the field's type, is an error that says where
and what to write.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import types
import typing
import warnings
from pathlib import Path

LARGEST = 1e100  # of the numbers in settings
# The keys whose values are paths, or may be: there ~ is the user's home.
PATHS = re.compile("(.*_)?(dir|file|state)|init_from|plugin|json|plot|hub|tokenizer|out|root")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
ALLOWED = "a value is a number, string, True, False, None, a list of these, or + - * / // % ** on numbers"

NANOGPT = {"n_layer": "depth", "n_embd": "dim", "n_head": "n_heads", "block_size": "seq_len", "learning_rate": "lr",
           "max_iters": "max_steps", "warmup_iters": "warmup_steps", "eval_iters": "eval_tokens", "dtype": "precision",
           "gradient_accumulation_steps": "grad_accum", "start": "prompt", "batch": "batch_size"}  # its name: ours


class UserError(ValueError):
    """Something the user can fix. The message is one plain sentence that says what is wrong and how to fix it."""
    code = 2  # the exit code


class TooLarge(ValueError):
    """A number that no setting can have."""


class Failed(UserError):
    """The work came to nothing, and nothing the user typed is wrong: a model whose weights are NaN."""
    code = 1


# Values: computed from the syntax tree, so that nothing a user writes is ever run.

def parse(text, mode="exec", name=""):
    """ast.parse that answers every bad text with a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a "\d" in somebody's prompt is not worth a SyntaxWarning
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        raise ValueError(f"{name}:{error.lineno or 1}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # NUL bytes, thousands of nested brackets
        raise ValueError(f"{name}: {str(error) or 'too deeply nested'}") from None


def evaluate(node):
    """The value of a literal, or of arithmetic on numbers; ValueError on anything else. Tuples become lists."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool, type(None)):
        value = node.value
    elif isinstance(node, (ast.List, ast.Tuple)):
        value = [evaluate(item) for item in node.elts]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and is_number(value := evaluate(node.operand)):
        value = -value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        a = evaluate(node.left)
        b = evaluate(node.right)
        if not (is_number(a) and is_number(b)):
            raise ValueError(ALLOWED)
        if isinstance(node.op, ast.Pow) and b * math.log10(abs(a) or 1) > 100:  # 10**10**10 would never end
            raise TooLarge("the number is too large")
        try:
            value = OPERATORS[type(node.op)](a, b)
        except ArithmeticError as error:  # 1 / 0
            raise ValueError(error) from None
    else:
        raise ValueError(ALLOWED)
    if is_number(value) and not abs(value) < LARGEST:  # 1e999 is inf; inf - inf is nan
        raise TooLarge("the number is too large")
    return value


def is_number(value):
    return type(value) in (int, float)  # not isinstance: to Python True is an int, to the user it is not


def show(value, form=repr):
    text = " ".join(form(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# Types: does a value fit a field? Nothing is rounded, cut or guessed.

def fit(value, kind):
    """value as the annotation `kind` wants it (3e8 as an int, 1 as a float), or ValueError."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return first_fit([value], args)
    if origin is typing.Literal and any(type(value) is type(arg) and value == arg for arg in args):
        return value
    if origin is list and type(value) is list:
        return [fit(item, args[0]) for item in value]
    if origin is tuple and type(value) is list and len(value) == len(args):
        return tuple(fit(item, arg) for item, arg in zip(value, args))
    if kind is int and type(value) is float and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind and value != math.inf:
        return value
    raise ValueError(f"{show(value)} is not {wanted(kind)}")


def first_fit(values, kinds):
    for value in values:
        for kind in kinds:
            try:
                return fit(value, kind)
            except ValueError:
                continue
    raise ValueError("none fits")


def fits(values, kind):
    with contextlib.suppress(ValueError):
        first_fit(values, [kind])
        return True
    return False


def wanted(kind):
    """An annotation in words: "a whole number", "a number or None", "'auto', 'fp32' or 'bf16'"."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        words = list(map(repr if origin is typing.Literal else wanted, args))
        return ", ".join(words[:-1]) + " or " * (len(words) > 1) + words[-1]
    words = {type(None): "None", bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind) or (str(kind) if args else kind.__name__)


def choices(kind):
    """The words that an annotation allows, if it allows a few: ["True", "False", "auto"] of bool | Literal["auto"]."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin is typing.Literal:
        return [str(arg) for arg in args]
    if origin in (typing.Union, types.UnionType) and any(typing.get_origin(arg) is typing.Literal for arg in args):
        return [word for arg in args for word in (["True", "False"] if arg is bool else choices(arg))]
    return []


def readings(text):
    """What the text of a flag may mean; the first that fits the field is taken: 8*4 as a number, a,b as a list."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        yield words[text.lower()]
    try:
        value = evaluate(parse(text.strip(), "eval").body)
        if type(value) is not str:  # a string is taken verbatim, quotes and all
            yield value
    except TooLarge:
        yield math.inf  # no field takes it
    except (ValueError, RecursionError):
        pass
    if text in ("0", "1"):
        yield text == "1"
    yield text
    yield text.split(",")


# Sources: each setting is (where, key, what was given, the values it may mean).

def read_config_file(path):
    """The assignments of one config file; `where` is "config/x.py:3: dim"."""
    if Path(path).is_fifo():
        raise UserError(f"{path}: cannot be read as a config file: it is a pipe")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tree = parse(text, name=path)
    except FileNotFoundError:
        presets = sorted(p.as_posix() for p in Path("config").glob("*.py"))
        near = difflib.get_close_matches(path, presets, n=1) or presets
        raise UserError(f"{path}: no such config file" + f"; is it {' or '.join(near)}?" * bool(near)) from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read as a config file: {reason}") from None
    except ValueError as error:
        raise UserError(f"{error} (a config file holds only `key = value` lines)") from None
    settings = []
    lines = {}
    for node in tree.body:
        place = f"{path}:{node.lineno}"
        source = show(text.split("\n")[node.lineno - 1].strip(), str)
        if node is tree.body[0] and ast.get_docstring(tree) is not None:
            continue
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{place}: `{source}` is not allowed: a config file holds only `key = value` lines")
        key = node.targets[0].id
        if key in lines:
            raise UserError(f"{place}: {key} is already set in line {lines[key]}; keep one of the two")
        lines[key] = node.lineno
        try:
            value = evaluate(node.value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: `{source}` cannot be computed: {error}") from None
        settings.append((f"{place}: {key}", key, value, [value]))
    return settings


def joined(argv, *classes):
    """argv with `--key value` as `--key=value`. A key that stands without a value takes only a word that fits it."""
    kinds = [typing.get_type_hints(cls) for cls in classes]
    words = []
    for word in argv:
        before = words[-1] if words else ""
        if before.startswith("--") and "=" not in before and not word.startswith("--"):
            key = before[2:]
            takes = [kind[key] for kind in kinds if key in kind]
            if not any(fits([True], kind) for kind in takes) or any(fits(readings(word), kind) for kind in takes):
                words[-1] = f"{before}={word}"
                continue
        words.append(word)
    return words


def read_arguments(argv, legal, config_file):
    """The settings in the config files, then those in the flags; a flag without "=" means True."""
    from_files = []
    from_flags = []
    for argument in argv:
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if equals:
                from_flags.append((f"--{key}", key, text, readings(text)))
            else:
                from_flags.append((f"--{key}", key, True, [True]))
        elif argument.endswith(".py") and config_file:
            from_files += read_config_file(argument)
        else:
            rule = "a flag is written --key=value, in quotes where it has spaces"
            fix = meant(argument, argv, legal) or rule + "; a config file ends in .py" * config_file
            raise UserError(f"{show(argument)} is not understood: {fix}")
    return from_files + from_flags


def meant(word, argv, legal):
    """The flag that a word without a key stands for, or "": a folder of a run, a file to read, a prompt."""
    path = Path(word)
    preset = Path("config", f"{word}.py")
    if "max_steps" in legal and preset.is_file():
        return f"write {preset.as_posix()}"
    likely = {"init_from": path.suffix == ".pt", "out_dir": path.parts[:1] == ("out",) or (path / "ckpt.pt").exists(),
              "data_files": path.exists(), "file": path.is_file(), "prompt": not word.startswith("-")}
    given = {flag[2:].partition("=")[0] for flag in argv}
    if "data_files" in given and path.exists():  # the shell has expanded a pattern that was not quoted
        return "write all files in one flag, in quotes: --data_files='texts/*.txt'"
    keys = [key for key, fits in likely.items() if fits and key in legal - given]
    return f"write --{keys[0]}={shell(word)}" if keys else ""


def unknown_key(where, key, legal, settings):
    """Why a key is none of this program's, and what to type instead: of its own keys only one that is near."""
    plain = key.replace("-", "_").lower()
    near = difflib.get_close_matches(plain, sorted(legal), 1)
    near = near or [name for name in sorted(legal) if len(plain) > 2 and name.startswith(plain)]
    if NANOGPT.get(plain) in legal:
        near = [NANOGPT[plain]]
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("train.py", "model.py")]
    if plain not in legal and plain in {name for text in texts for _, name, _, _ in settings_in(text)}:
        file = where.partition(":")[0]
        folders = [value for place, other, value, _ in settings if other == "out_dir" and place.startswith(f"{file}:")]
        fix = f"; to use the model that it trained: --out_dir={folders[0]}" if folders else ""
        return f"{where} is a setting of train.py" + fix
    hint = f"; the nearest is {near[0]}, and --help lists all" if near else "; --help lists all"
    return f"{where} is not a known key{hint}"


def configure(argv, *classes, config_file=True, inherit=None):
    """One validated instance of each dataclass, from its defaults, the config files and the flags in argv.

    Args: argv, sys.argv[1:]; classes, dataclasses (a key that several have sets them all); config_file, whether the
    program takes config files; inherit, a function of the instances so far that gives defaults {key: value} for the
    next class.
    Returns: a tuple of instances, in the order of classes.
    Raises: UserError for an unknown key, an ill-typed or missing value, an unreadable file, and with the text of any
    ValueError that a __post_init__ raises.
    """
    kinds = {cls: typing.get_type_hints(cls) for cls in classes}
    fields = {cls: {field.name: field for field in dataclasses.fields(cls) if field.init} for cls in classes}
    legal = {key for cls in classes for key in fields[cls]}
    given = {cls: {} for cls in classes}
    settings = read_arguments(joined(argv, *classes), legal, config_file)
    for where, key, value, values in settings:
        if key not in legal:
            raise UserError(unknown_key(where, key, legal, settings))
        values = list(values)
        for cls in classes:
            if key in fields[cls]:
                given[cls][key] = expand_home(key, value_of(where, value, values, kinds[cls][key]))
    configs = []
    for cls in classes:
        defaults = {}
        if inherit and configs:
            defaults = inherit(*configs)
        given[cls] = {key: value for key, value in defaults.items() if key in fields[cls]} | given[cls]
        for key, field in fields[cls].items():
            if key not in given[cls] and field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"--{key}=... is needed: it must be {wanted(kinds[cls][key])}")
        try:
            configs.append(cls(**given[cls]))
        except ValueError as error:
            raise UserError(str(error)) from None
    return tuple(configs)


def value_of(where, given, values, kind):
    """The first of the values that fits the kind; UserError that names where it was given."""
    try:
        return first_fit(values, [kind])
    except ValueError:
        got = show(given)
        if where.startswith("--") and given is True:
            got = f"no value: write {where}=VALUE"
        if any(is_number(value) and abs(value) > 2**53 for value in values):
            got += ", which is too large"
        raise UserError(f"{where} must be {wanted(kind)}, got {got}") from None


def expand_home(key, value):
    """~/x as /home/me/x where the key is that of a path: no shell does so in --out_dir=~/x."""
    return os.path.expanduser(value) if type(value) is str and PATHS.fullmatch(key) else value


# Help: read from the source of a program, so that nothing is imported, and `python -OO` has it too.

def help_first(name, *sources, config_file=True):
    """Answers --help and ends the program `name`: called before it imports torch, which takes seconds.

    Where what every program needs is not installed, it says so instead.
    """
    if name != "__main__":
        return
    if {"--help", "-h"} & {*sys.argv[1:]}:
        command(lambda: print(help_text(sources, config_file), flush=True))
        sys.exit(0)
    command(check_installed)


def check_installed():
    missing = [package for package in ("numpy", "tqdm") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed in {sys.executable}: run `source .venv/bin/activate` "
                        "in the project's folder, or pip install -r requirements.txt")


def help_text(sources, config_file=True):
    """The docstring of the first source file, the usage, and every setting of the *Config classes in all of them."""
    texts = [Path(__file__).parent.joinpath(source).read_text(encoding="utf-8") for source in sources]
    program = Path(sys.argv[0])
    name = program.name
    if program.with_name("__init__.py").exists():
        name = f"-m {program.parent.name}.{program.stem}"
    usage = f"usage: python {name}{' [config/NAME.py ...]' * config_file} [--key=value ...]"
    page = [ast.get_docstring(ast.parse(texts[0]), clean=False).strip(), "", usage]
    width = max(50, min(120, shutil.get_terminal_size().columns))
    shown = {}
    for group, key, default, meaning in itertools.chain.from_iterable(map(settings_in, texts)):
        if key in shown:
            continue
        if group not in shown.values():
            page += ["", f"{group}:"]
        shown[key] = group
        page += textwrap.wrap(meaning, width, initial_indent=f"  --{key}={default}".ljust(29) + " ",
                              subsequent_indent=" " * 30)
    return "\n".join(page)


def settings_in(text):
    """(group, key, default, meaning) of each field of the *Config classes in the text of a source file.

    A comment line above a field begins a group.
    """
    lines = text.split("\n")
    for cls in ast.parse(text).body:
        if not (isinstance(cls, ast.ClassDef) and cls.name.endswith("Config")):
            continue
        group = "Settings"
        for node in cls.body:
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            above = lines[node.lineno - 2].strip()
            if above.startswith("#"):
                group = above.lstrip("# ")
            plain = node.value and not isinstance(node.value, ast.Call)  # not field(default_factory=...)
            default = evaluate(node.value) if plain else ""
            comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
            hints = types.SimpleNamespace(__annotations__={"kind": ast.unparse(node.annotation)})
            kind = typing.get_type_hints(hints, vars(typing))["kind"]
            words = [word for word in choices(kind) if not re.search(rf"\b{word}\b", comment)]
            if words:
                comment = f"{comment} ({', '.join(choices(kind))})".strip()
            yield group, node.target.id, default, comment


# A program's beginning and end.

def command(main):
    """Runs main() as a program, which ends with one line on stderr instead of a traceback.

    Exit code 2 is for a UserError and for what the system refuses, 1 for Failed, 130 for Ctrl-C; `| head` is no error.
    """
    open_closed_streams()
    sys.stdout.reconfigure(errors="replace")  # characters that this terminal lacks
    program = Path(sys.argv[0]).name
    message = ""
    code = 0
    try:
        main()
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except UserError as error:
        message = str(error)
        code = error.code
    except KeyboardInterrupt:
        message = "interrupted"
        code = 130
    except BrokenPipeError:  # the reader has left, and 141 is the shell's SIGPIPE
        code = 141
    except (OSError, ValueError) as error:
        message = refusal(error)
        code = 2
        if not message:
            raise
    try:
        sys.stdout.flush()
    except OSError:  # what is still buffered goes nowhere, or Python would try, and complain, at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        message = printable(message)
        print(f"{program}: {message}", file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's report of 40 lines ends with what it holds
            said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}  # others stop after this
            with contextlib.suppress(OSError):
                Path(report).write_text(json.dumps({"message": said}))
    if code:
        sys.exit(code)


def open_closed_streams():
    """Opens a closed stdin, stdout or stderr on the null device: otherwise the next file would take its number, and
    what is printed would go into that file. sys.stdin stays None, so that a program can say that it is closed.
    A stderr that takes nothing more, as a log on a full disk, fails no run either."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            if name != "stdin":
                setattr(sys, name, open(number, "w"))
    if sys.stderr is sys.__stderr__:
        sys.stderr.write = forgiving(sys.stderr.write)
        sys.stderr.flush = forgiving(sys.stderr.flush)


def forgiving(call):
    """call, but from the first error on, which is not that of a pipe whose reader has left, stderr goes nowhere."""
    def forgiven(*args):
        try:
            return call(*args)
        except BrokenPipeError:
            raise
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return forgiven


def refusal(error):
    """One line for an error of the system, which the user can fix, or "" for any other."""
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"no file can be named {show(error.object)}"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a file name holds a NUL character"
    if not isinstance(error, OSError) or error.strerror is None:
        return ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: raise the limit with `ulimit -n 65536` ({error.filename or 'no file named'})"
    return f"cannot read or write {error.filename or 'what it prints, or a file'}: {error.strerror}"


def printable(text):
    """text on one line, with its control characters escaped: the name of a file could clear the screen."""
    return escape(" ".join(text.split()))


def first_line(error):
    """The first line of what an exception says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def duration(seconds):
    """Seconds in the unit that suits them: "1 second", "6.7 minutes", "25 days"."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:,.0f} {name}" if count >= 10 else f"{count:.2g} {name}"
    return f"{math.ceil(seconds)} second" + "s" * (seconds > 1)


def shell(*words):
    """The words of a command as a shell takes them; what a terminal cannot show as $'\\x1b'."""
    return " ".join(shlex.quote(word) if is_shown(word) else f"$'{in_ascii(word)}'" for word in words)


def is_shown(word):
    """Whether stdout and stderr can show the word as it is."""
    encodings = {getattr(stream, "encoding", None) or "utf-8" for stream in (sys.stdout, sys.stderr)}
    try:
        return word.isprintable() and all(word.encode(encoding) for encoding in encodings)
    except UnicodeEncodeError:
        return False


def in_ascii(word):
    return "".join(chr(c) if 31 < c < 127 and chr(c) not in "'\\" else f"\\x{c:02x}" for c in os.fsencode(word))


def escape(text):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
