"""sample.py: the same seed writes the same text, whole characters only, in memory that does not grow."""
import contextlib
import fcntl
import io
import itertools
import math
import os
import re
import select
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import model
import sample
from configurator import command
from model import LM, ModelConfig
from support.dataset import load_tokenizer

PROGRAM, BYTES = Path(sample.__file__), load_tokenizer("bytes")


def write_checkpoint(folder, vocab_size=257, tokenizer_hash=BYTES.hash, scale=0.2, **options):
    """What train.py would leave in folder, of a model that has not learned anything."""
    torch.manual_seed(0)
    config = {"vocab_size": vocab_size, "dim": 16, "depth": 2, "n_heads": 2, "seq_len": 16, "mixers": "linear window"}
    config |= {"window": 4} | options
    lm, data = LM(ModelConfig(**config)), {"tokenizer": "bytes", "tokenizer_hash": tokenizer_hash}
    torch.nn.init.normal_(lm.embed.weight, std=scale)                              # not quite uniform
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict.fromkeys(checkpoint.CHECKPOINT) | {"model": lm.state_dict(), "model_config": config, "data": data},
               folder / "ckpt.pt")


@pytest.fixture(autouse=True)
def one_thread():
    """With more, a machine that is busy waits a time slice at every operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """write(*flags) is `python sample.py` on an untrained model, within this process: code, out, err."""
    def write(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--out_dir=out", "--max_new_tokens=30", "--device=cpu", *flags])
        capsys.readouterr()
        code = 0
        try:
            command(sample.main)
        except SystemExit as error:
            code = error.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out")
    return write


@pytest.fixture
def refusal(write):
    def refusal(*flags):
        result = write(*flags)
        assert result.code == 2 and result.out == "" and result.err.count("\n") == 1, result
        assert result.err.startswith("sample.py: ")
        return result.err
    return refusal


@pytest.fixture
def scripted(monkeypatch):
    """Makes the model write these tokens; one list per sample."""
    def scripted(*texts):
        def generate(self, idx, max_new_tokens, *args, **options):
            for tokens in list(zip(*texts))[:max_new_tokens]:
                yield torch.tensor(tokens), {"tokens": torch.tensor(3), "S": torch.zeros(1)}
        monkeypatch.setattr(LM, "generate", generate)
    return scripted


def test_the_same_seed_writes_the_same_text_and_another_seed_another(write):
    first = write("--prompt=abc")
    assert first.code == 0 and first.out.startswith("abc") and len(first.out) > 10
    assert write("--prompt=abc").out == first.out != write("--prompt=abc", "--seed=2").out


def test_the_step_of_a_token_is_compiled_where_asked_and_for_long_texts_on_a_gpu(write, monkeypatch):
    seen = []
    generate = LM.generate

    def noted(self, *args, compiled, **options):
        seen.append(compiled)
        return generate(self, *args, **options)
    monkeypatch.setattr(LM, "generate", noted)
    assert "compiling" not in write("--prompt=abc", "--max_new_tokens=50001").err
    assert "about a minute" in write("--prompt=abc", "--compile=True").err
    assert seen == [False, True]


def test_temperature_zero_and_top_k_one_and_a_small_top_p_take_the_likeliest(write):
    greedy = write("--prompt=abc", "--temperature=0").out
    for flags in (["--temperature=0", "--seed=2"], ["--top_k=1"], ["--top_p=1e-6"], ["--temperature=0.001"]):
        assert write("--prompt=abc", *flags).out == greedy
    wild = (["--top_k=5"], ["--top_p=0.5"], ["--temperature=2"], [])
    assert len({write("--prompt=abc", *flags).out for flags in wild}) == 4


def test_a_prompt_is_the_same_from_a_flag_a_file_and_stdin(write, monkeypatch):
    prompt = "Füße\n  def f():"
    Path("prompt.txt").write_text(prompt, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    texts = [write(flag).out for flag in (f"--prompt={prompt}", "--prompt_file=prompt.txt", "--prompt_file=-")]
    assert texts[0].startswith(prompt) and texts[0] == texts[1] == texts[2]


def test_a_byte_order_mark_is_no_part_of_a_prompt(write):
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig"), ("wide", "utf-16")):
        Path(name).write_text("Füße", encoding=encoding)
    assert len({write(f"--prompt_file={name}").out for name in ("plain", "marked", "wide")}) == 1


def test_a_state_is_written_beside_the_users_files(write, refusal):
    Path("a.state.tmp").write_text("mine")
    Path("b.state.tmp").symlink_to("a.state.tmp")
    for name in ("a.state", "b.state"):
        assert write(f"--save_state={name}").code == write(f"--save_state={name}").code == 0
    assert Path("a.state.tmp").read_text() == "mine" and Path("b.state.tmp").is_symlink()
    assert sorted(path.name for path in Path().iterdir()) == ["a.state", "a.state.tmp", "b.state", "b.state.tmp", "out"]
    assert "cannot write /proc/a.state" in refusal("--save_state=/proc/a.state")   # before any text is made


def test_a_character_of_several_tokens_is_printed_whole_as_soon_as_it_is_complete(write, scripted, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *args, **options: pieces.extend(args))
    scripted([*"é€😀".encode(), 0x80, *"x€".encode()[:3]])
    write()
    assert [piece for piece in pieces if piece][:-1] == ["é", "€", "😀", "\ufffd", "x", "\ufffd"]


def test_a_terminal_that_lacks_a_character_shows_a_question_mark(write, scripted, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    scripted("aé".encode())
    assert write().code == 0 and stdout.buffer.getvalue() == b"a?\n"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bf16_on_a_cpu_writes_without_a_warning_of_torch(write, tmp_path, norm):
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)                                                   # not only the first time
    write_checkpoint(tmp_path / "out", mixers="linear window conv", depth=3, normaliser="rms", short_conv=True, norm=norm)
    result = write("--prompt=abc", "--precision=bf16")
    torch.set_warn_always(before)
    assert result.code == 0, result


def test_a_text_ends_at_its_end_of_text_token(write, scripted):
    scripted([*b"yes", BYTES.eot, *b"no"])
    result = write()
    assert result.out == "yes\n" and "text: 3 tokens in" in result.err
    assert "yesno" in write("--stop=false").out


def test_several_samples_differ_and_each_ends_on_its_own(write, scripted):
    texts = write("--num_samples=3", "--prompt=abc").out.split("--- ")[1:]
    assert all(text.startswith(f"{i} of 3\nabc") for i, text in enumerate(texts, 1))
    assert len({text[10:] for text in texts}) == 3
    scripted([*b"ab", BYTES.eot, *b"no"], [*b"abcde"])
    assert write("--num_samples=2").out == "--- 1 of 2\nab\n--- 2 of 2\nabcde\n"


def test_speed_and_state_size_go_to_stderr_and_the_state_does_not_grow(write):
    def kilobytes(*flags):
        line = write("--stop=false", *flags).err.splitlines()[-1]
        speed = r"(\d+) tokens? in [\d.]+ s( \([\d,]+ tokens/s\))?"
        found = re.fullmatch(rf"prompt: {speed}; text: {speed}; the state is ([\d.,]+) kB per text", line)
        lengths.append((int(found[1]), int(found[3])))
        return float(found[5])
    lengths = []
    assert kilobytes("--max_new_tokens=10") == kilobytes("--max_new_tokens=1000") == kilobytes("--prompt=" + "x" * 999)
    assert lengths == [(1, 10), (1, 1000), (999, 30)]
    assert 0 < kilobytes("--num_samples=3") == pytest.approx(kilobytes(), abs=0.1)


def test_the_speed_of_writing_leaves_out_the_reading_of_the_prompt(write, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: next(now)))  # a clock that each look moves
    read = sample.read_prompt

    def slow(*args):
        for _ in range(1000):
            next(now)
        return read(*args)
    monkeypatch.setattr(sample, "read_prompt", slow)
    line = write("--prompt=abc", "--max_new_tokens=1").err.splitlines()[-1]
    reading, writing = map(float, re.findall(r"tokens? in ([\d.]+) s", line))
    assert (reading, writing) == (1001, 1)


def test_a_shared_folder_writes_the_text_of_its_checkpoint(write, refusal, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm = checkpoint.load_pretrained("out")
    lm.save_pretrained("shared")
    again = LM.from_pretrained("shared")
    assert again.unembed.weight is again.embed.weight and again.config == lm.config != ModelConfig()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lm.parameters(), strict=True))
    for source in ("out", "out/ckpt.pt", "shared", "shared/model.safetensors"):
        assert write(f"--init_from={source}", "--out_dir=none", "--prompt=abc").out == write("--prompt=abc").out
    weights = Path("shared/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    for source in ("shared", "nobody/nothing", "."):
        assert f"{source} is neither a folder with" in refusal(f"--init_from={source}")
    monkeypatch.setattr(LM, "from_pretrained", pytest.fail)                       # a misspelt folder is not asked for
    assert "there is no shared/typo: train first" in refusal("--init_from=shared/typo")


def test_the_hub_library_logs_no_lines_beside_ours(tmp_path):
    pytest.importorskip("safetensors")
    result = subprocess.run([sys.executable, PROGRAM, "--init_from=.", "--device=cpu"], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and ". is neither a folder with" in result.stderr


@pytest.mark.parametrize("options", [
    {}, {"mixers": "softmax conv"}, {"mixers": "linear", "decay": "gated", "normaliser": "rms", "short_conv": True, "pos": "none"}])
def test_a_text_in_two_runs_is_the_text_of_one(write, tmp_path, options):
    write_checkpoint(tmp_path / "out", **options)
    whole = write("--prompt=abc", "--max_new_tokens=60", "--stop=false").out
    for cut in (1, 30, 41):
        first = write("--prompt=abc", f"--max_new_tokens={cut}", "--stop=false", "--save_state=a.state")
        second = write(f"--max_new_tokens={60 - cut}", "--stop=false", "--load_state=a.state")
        assert (first.code, second.code) == (0, 0) and first.out + second.out == whole
    assert write("--load_state=a.state", "--stop=false", "--seed=2").out != write("--load_state=a.state", "--stop=false").out


def test_a_text_continued_without_a_prompt_is_said_to_come_after_its_tokens(write):
    write("--prompt=abc", "--max_new_tokens=5", "--stop=false", "--save_state=a.state")
    assert write("--load_state=a.state").err.splitlines()[-1].startswith("after 8 tokens; text: ")
    assert write("--load_state=a.state", "--prompt=x").err.splitlines()[-1].startswith("prompt: 1 token in ")


def test_without_a_checkpoint_the_models_trained_last_are_named_newest_first(refusal, tmp_path):
    for time, name in enumerate(["a", "b c", "d", "e"]):
        write_checkpoint(tmp_path / "runs" / name)
        os.utime(f"runs/{name}/ckpt.pt", (time, time))
    assert refusal("--out_dir=runs/none").endswith(
        "a trained model, --out_dir=runs/e or --out_dir=runs/d or --out_dir='runs/b c' (4 in all)\n")
    for name in ("d", "e"):
        shutil.rmtree(f"runs/{name}")
    assert refusal("--out_dir=runs/none").endswith("a trained model, --out_dir='runs/b c' or --out_dir=runs/a\n")
    assert refusal("--out_dir=none/none").endswith("name the folder of a trained model, --out_dir=...\n")


def test_a_character_cut_by_the_end_of_a_run_is_written_whole_by_the_next(write, scripted):
    scripted("é".encode()[:1])
    assert write("--save_state=a.state").out == ""
    scripted("é".encode()[1:])
    assert write("--load_state=a.state").out == "é\n"
    scripted("é".encode()[1:], "é".encode()[1:])
    assert write("--load_state=a.state", "--num_samples=2").out == "--- 1 of 2\né\n--- 2 of 2\né\n"


def test_a_carried_state_reads_a_further_prompt_and_serves_several_texts(write):
    greedy = ("--temperature=0", "--stop=false")
    write("--prompt=abc", "--max_new_tokens=5", "--save_state=a.state", *greedy)
    one = write("--load_state=a.state", "--prompt=xyz", *greedy).out
    assert one.startswith("xyz")
    assert write("--load_state=a.state", "--prompt=xyz", "--num_samples=2", *greedy).out.split("--- ")[2] == f"2 of 2\n{one}"


def test_a_state_given_as_a_model_is_named_with_the_flag_that_takes_it(write, refusal):
    write("--save_state=my a.state")
    said = refusal("--init_from=my a.state")
    assert "my a.state is a state, which sample.py takes as '--load_state=my a.state'; name the folder or" in said


def test_a_state_is_refused_by_another_model_and_when_damaged(write, refusal, tmp_path):
    write("--save_state=a.state")
    whole = Path("a.state").read_bytes()
    i = whole.index(b"unread")
    assert "no state none" in refusal("--load_state=none")
    write_checkpoint(tmp_path / "other", window=3)
    assert "the state of another model (window was 4, here 3): use" in refusal("--load_state=a.state", "--out_dir=other")
    write_checkpoint(tmp_path / "other", scale=0.3)
    assert "another model (its weights differ): use" in refusal("--load_state=a.state", "--out_dir=other")
    assert "another model (precision was fp32, here bf16): use" in refusal("--load_state=a.state", "--precision=bf16")
    older = torch.load("a.state")
    del older["settings"]                                                         # as before they were kept
    torch.save(older, "older.state")
    assert write("--load_state=older.state").out == write("--load_state=a.state").out
    assert "another model (in settings, weights or" in refusal("--load_state=older.state", "--out_dir=other")
    for damaged in (b"", whole[:-9], whole[:i] + b"U" + whole[i + 1:]):
        Path("a.state").write_bytes(damaged)
        assert "a.state is damaged or not a state" in refusal("--load_state=a.state")
    os.mkfifo("pipe")
    for path in ("none/a.state", "pipe"):                                         # found before any text is made
        result = write(f"--save_state={path}")
        assert f"save_state={path} must be a file in an existing folder" in result.err and not result.out
    for path in ("a.state", "out/ckpt.pt"):                                       # damaged; a checkpoint
        before = Path(path).read_bytes()
        assert f"{path} exists, and --save_state wrote no such file" in refusal(f"--save_state={path}")
        assert Path(path).read_bytes() == before
    assert "out/ckpt.pt is a checkpoint, not a state: use --init_from=out/ckpt.pt" in refusal("--load_state=out/ckpt.pt")
    torch.save({"state": 5, "unread": []}, "a.state")
    assert "a.state is damaged or not a state" in refusal("--load_state=a.state")
    write_checkpoint(tmp_path / "out", pos="learned")
    Path("a.state").unlink()
    write("--max_new_tokens=9", "--stop=false", "--save_state=a.state")            # 1 + 8 read, 1 to read
    assert "would have 17: use --max_new_tokens=6" in refusal("--load_state=a.state", "--max_new_tokens=7")
    assert write("--load_state=a.state", "--max_new_tokens=6").code == 0


GREEDY = {"max_new_tokens": 30, "temperature": 0, "stop": False}


def test_from_python_a_kept_state_continues_a_text_as_one_run_would_and_as_often_as_wanted(write):
    opened = checkpoint.open_model("out", "cpu")
    whole, _ = sample.generate_text(*opened, "abc", **GREEDY | {"max_new_tokens": 60})
    assert "abc" + whole + "\n" == write("--prompt=abc", "--temperature=0", "--stop=false", "--max_new_tokens=60").out
    first, state = sample.generate_text(*opened, "abc", **GREEDY)
    rest, end = sample.generate_text(*opened, state=state, **GREEDY)
    other, _ = sample.generate_text(*opened, "xyz", state, **GREEDY)
    again, _ = sample.generate_text(*opened, state=state, **GREEDY)
    assert first + rest == whole and rest == again != other
    assert (state.tokens, end.tokens) == (33, 63) and state.nbytes == end.nbytes > 0
    read = sample.read_prompt(*opened, "abc" + first)
    assert "".join(sample.stream_text(*opened, read, **GREEDY)) == rest and read.tokens == 63


def test_answers_to_lines_from_a_pipe_can_be_told_apart(write, scripted, monkeypatch):
    scripted(b"two\n\nlines")
    monkeypatch.setattr(sample, "read_prompt", lambda *args: sample.TextState(unread=[1]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert write("--interactive").out == "--- 1\ntwo\n\nlines\n--- 2\ntwo\n\nlines\n"


def test_a_conversation_is_one_text_read_through_one_state_of_one_size(write, monkeypatch):
    lines = ["ab", "Füße", "", "x"]
    opened = checkpoint.open_model("out", "cpu")
    answers, state, sizes = [], None, []
    for turn, line in enumerate(lines):
        line = "\n" * bool(turn and line) + line
        answer, state = sample.generate_text(*opened, line, state, **GREEDY)
        answers.append(answer)
        sizes.append(f"[{state.tokens} tokens so far; the state is {state.nbytes / 1e3:.1f} kB; cut at max_new_tokens=30, "
                     "an empty line continues]")
    for first in ([], ["--prompt=ab"]):
        text = "\n".join(lines[len(first):])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        result = write("--interactive", "--temperature=0", "--stop=false", *first)
        assert (result.code, result.out) == (0, "".join(f"--- {i}\n{answer}\n" for i, answer in enumerate(answers, 1)))
        assert result.err.splitlines() == sizes and len({line.split(";")[1] for line in sizes}) == 1


@pytest.mark.parametrize("mixers, length, words", [("linear window", 2, " and full at 4 tokens"), ("linear window", 9, ""),
                                                   ("window softmax", 9, " and grows: softmax layers keep all tokens")])
def test_a_conversation_says_of_a_state_that_is_not_of_fixed_size_yet_or_never_will_be(write, tmp_path, monkeypatch,
                                                                                        mixers, length, words):
    write_checkpoint(tmp_path / "out", mixers=mixers)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a" * (length - 1))))
    note = write("--interactive", "--stop=false", "--max_new_tokens=1").err
    assert re.fullmatch(rf"\[{length} tokens so far; the state is [\d.]+ kB{words}; cut at .*\]\n", note)


def test_an_answer_that_ends_on_its_own_is_not_said_to_be_cut(write, scripted, monkeypatch):
    scripted([*b"yes", BYTES.eot])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a")))
    assert "cut" not in write("--interactive", "--max_new_tokens=4").err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a")))
    assert "cut at max_new_tokens=3" in write("--interactive", "--max_new_tokens=3").err


def test_a_closed_standard_input_is_said_to_be_closed(refusal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refusal("--interactive")


def test_a_conversation_goes_on_from_a_saved_state_and_ends_where_learned_positions_do(write, monkeypatch, tmp_path):
    def talk(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return write("--interactive", "--temperature=0", "--stop=false", *flags)
    both = talk("abc\nxyz\n").out
    first = talk("abc\n", "--save_state=a.state").out
    second = talk("xyz\n", "--load_state=a.state").out
    assert first + second.replace("--- 1\n", "--- 2\n") == both
    write_checkpoint(tmp_path / "out", pos="learned")
    result = talk("abc\nx\n")
    assert result.code == 2 and "\nsample.py: the model's learned positions end at 16" in result.err
    assert result.err.startswith("[16 tokens so far")


def test_without_learned_positions_no_length_is_too_long(write, monkeypatch):
    monkeypatch.setattr(sample, "stream_tokens", lambda *args, **options: iter([]))
    assert write("--max_new_tokens=10**30").code == 0


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_program(tmp_path):
    pty = pytest.importorskip("pty")
    write_checkpoint(tmp_path / "out")
    terminal, inside = pty.openpty()
    program = subprocess.Popen([sys.executable, PROGRAM, "--out_dir=out", "--device=cpu", "--interactive", "--stop=false",
                                "--max_new_tokens=10**9"], cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside,
                               start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(inside)
    seen = b""

    def wait_for(*words):
        nonlocal seen
        while not all(word in seen for word in words):
            seen += os.read(terminal, 1 << 16)
        seen = b""
    wait_for(b"Ctrl-D the program", b"> ")
    for _ in range(2):
        os.write(terminal, b"abc\n")
        wait_for(b"abc\r\n")
        while len(seen) < 100:                                                    # an answer is under way
            seen += os.read(terminal, 1 << 16)
        os.write(terminal, b"\x03")
        wait_for(b"tokens so far; the state is ", b"> ")
    os.write(terminal, b"not meant")
    while b"> " not in seen:                                                      # at the prompt it discards the line
        for keys in (b"\x03" * 20, b" "):                                         # readline can miss it until a key comes
            os.write(terminal, keys)
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 1 << 16)
    with contextlib.suppress(OSError):                                            # until the terminal has no other end
        while True:
            os.write(terminal, b"\x15\x04")                                       # an end is one of an empty line
            if select.select([terminal], [], [], 1)[0]:
                os.read(terminal, 1 << 16)
    assert program.wait() == 0
    os.close(terminal)


def test_a_model_with_parts_of_the_users_own_needs_its_plugin(write, refusal, monkeypatch):
    plugin = "import model\nmodel.FEATURE_MAPS['mine'] = model.FEATURE_MAPS['elu']\nmodel.MIXERS['own'] = model.MIXERS['linear']"
    Path("mine.py").write_text(plugin)
    maps, mixers = model.FEATURE_MAPS, model.MIXERS
    monkeypatch.setattr(model, "FEATURE_MAPS", maps | {"mine": maps["elu"]})
    monkeypatch.setattr(model, "MIXERS", mixers | {"own": mixers["linear"]})
    write_checkpoint(Path("out"), feature_map="mine", mixers="own window")
    monkeypatch.setattr(model, "FEATURE_MAPS", dict(maps))
    monkeypatch.setattr(model, "MIXERS", dict(mixers))
    assert refusal("--prompt=abc").count("--plugin=FILE") == 1
    monkeypatch.setitem(model.FEATURE_MAPS, "mine", maps["elu"])
    assert refusal("--prompt=abc").endswith("(one of your own needs --plugin=FILE)\n")
    monkeypatch.delitem(model.FEATURE_MAPS, "mine")
    assert write("--prompt=abc", "--plugin=mine.py").code == 0
    Path("broken.py").write_text("import model\nmodel.MIXER")
    assert "broken.py fails, line 2: AttributeError" in refusal("--plugin=broken.py")
    assert "there is no plugin none.py" in refusal("--plugin", "none.py")


def test_model_py_works_without_huggingface_hub():
    program = ("import sys; sys.modules['huggingface_hub'] = None; import model, torch\n"
               "lm = model.LM(model.ModelConfig(dim=16, depth=1, n_heads=2)); lm(torch.zeros(1, 3, dtype=int))\n"
               "assert not hasattr(lm, 'save_pretrained')")
    subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parent, check=True)


@pytest.mark.parametrize("flags, message", [
    (["--promt=x"], "the nearest is prompt"), (["--top_k=many"], "--top_k must be a whole number"),
    (["--top_p=0"], "top_p must be above 0"), (["--top_p=1e-300"], "at least 1e-9"),
    (["--num_samples=10**30"], "num_samples must be at most"), (["--num_samples=10**9"], "num_samples must be at most"), (["--temperature=-1"], "at least 0"),
    (["--temperature=1e-40"], "temperature must be 0 or"), ([f"--seed={2**64}"], "below 2**63"),
    (["--num_samples=0"], "at least 1"), (["--prompt=a", "--prompt_file=b"], "either prompt or prompt_file"),
    (["--interactive", "--num_samples=2"], "interactive reads"), (["--interactive", "--prompt_file=-"], "leave out"),
    (["--num_samples=2", "--save_state=a"], "save_state keeps one text"),
    (["--prompt_file=none"], "cannot read none: No such file"), (["--prompt_file=out"], "cannot read out: Is a dir"),
    (["--prompt_file=latin.txt"], "latin.txt is not UTF-8"), (["--out_dir=none"], "no checkpoint none/ckpt.pt: train"),
    (["--device=tpu"], "--device=cpu"), (["--out_dir=other"], "tokenizer here is not the one"),
    (["--out_dir=few", "--prompt=az"], "has token 122, and the model only knows those below 100"),
    (["--out_dir=learned", "--prompt=abc"], "learned positions end at 16 tokens, and prompt and text would have 33: "
     "use --max_new_tokens=13"), (["--out_dir=learned", "--prompt=" + "a" * 16], "would have 46: shorten the prompt")])
def test_bad_input_is_one_line_with_exit_code_2(refusal, tmp_path, flags, message):
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    write_checkpoint(tmp_path / "few", vocab_size=100)
    write_checkpoint(tmp_path / "learned", pos="learned")
    write_checkpoint(tmp_path / "other", tokenizer_hash="another")
    assert message in refusal(*flags)


@pytest.mark.parametrize("name, ruin", [("norm.weight", math.nan), ("embed.weight", math.inf), ("norm.weight", 3e38),
                                        ("blocks.0.mixer.qkv.weight", 1e38)])
def test_a_model_whose_weights_are_not_numbers_is_said_to_be_so_with_exit_code_1(write, tmp_path, name, ruin):
    path = tmp_path / "out/ckpt.pt"
    content = torch.load(path)
    content["model"][name][:] = ruin
    torch.save(content, path)
    for flags in ([], ["--temperature=0"], ["--num_samples=2"]):
        result = write(*flags)
        assert (result.code, result.out) == (1, "") and result.err.count("\n") == 1, result
        assert "the weights of out give NaN or inf" in result.err


@pytest.mark.parametrize("flags", [["--top_k=10**30"], ["--temperature=1e99"], ["--num_samples=2", "--max_new_tokens=1"],
                                   ["--top_p=1e-9"]])
def test_extremes_that_mean_something_work(write, flags):
    assert write(*flags).code == 0


def test_learned_positions_allow_exactly_their_number_of_tokens(write, tmp_path):
    write_checkpoint(tmp_path / "out", pos="learned")
    assert write("--prompt=abc", "--max_new_tokens=13", "--stop=false").code == 0


@pytest.mark.slow
def test_the_whole_path_works_with_the_dataset_gone_and_its_reader_gone(tmp_path):
    """prepare, train, then sample | head: text that was learned, and no complaint about the closed pipe."""
    def python(program, *flags):
        subprocess.run([sys.executable, PROGRAM.with_name(program), *flags], cwd=tmp_path, env=env, check=True,
                       capture_output=True)
    (tmp_path / "abc.txt").write_text("abcdefgh " * 2000)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    python("prepare.py", "--dataset=abc", "--data_files=abc.txt", "--tokenizer=bytes", "--processes=1")
    python("train.py", "--dataset=abc", "--dim=32", "--depth=1", "--n_heads=2", "--seq_len=32", "--batch_size=16",
           "--grad_accum=1", "--max_steps=60", "--warmup_steps=5", "--lr=2e-2", "--eval_tokens=256", "--precision=fp32",
           "--device=cpu", "--out_dir=out")
    shutil.rmtree(tmp_path / "data")
    shell = (f"{sys.executable} {PROGRAM} --out_dir=out --prompt=ab --temperature=0 --max_new_tokens=100000"
             " --device=cpu | head -c 20; exit ${PIPESTATUS[0]}")
    result = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("abcdefgh abcdefgh ab", "", 141)
