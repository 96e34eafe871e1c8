"""eval.py: every token is predicted once, from all before it; the harness gets the log p of our own forward."""
import gzip
import io
import itertools
import json
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval
from configurator import UserError, command
from model import LM, ModelConfig
from test_sample import BYTES, one_thread, write_checkpoint  # noqa: F401 (a fixture)

SAMPLES = Path(__file__).resolve().parents[2] / "shared/data/eval"
TEXT = "Größe: a text of 63 bytes, to be read in one pass or in windows"


def tiny(**options):
    torch.manual_seed(0)
    fields = {"vocab_size": 257, "dim": 16, "depth": 2, "n_heads": 2, "seq_len": 16, "mixers": "linear window", "window": 4}
    model = LM(ModelConfig(**fields | options)).double().eval()
    torch.nn.init.normal_(model.embed.weight, std=0.5)
    return model


@torch.no_grad()
def log_p(model, tokens):
    """log p of tokens[1:], each from one forward of all before it: the slow definition."""
    logits = (model(torch.tensor([tokens[:i]]))[0][0, -1] for i in range(1, len(tokens)))
    return [float(z.log_softmax(-1)[token]) for z, token in zip(logits, tokens[1:])]


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """measure(*flags) is `python eval.py` on an untrained model, within this process: code, out, err."""
    def measure(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--out_dir=out", "--device=cpu", *flags])
        capsys.readouterr()
        code = 0
        try:
            command(eval.main)
        except SystemExit as error:
            code = error.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "out")
    Path("text.txt").write_text(TEXT)
    return measure


@pytest.mark.parametrize("mixers", ["linear window", "linear conv", "softmax"])
def test_one_pass_in_pieces_of_any_size_predicts_each_token_from_all_before_it(mixers):
    model, tokens = tiny(mixers=mixers), [256, *TEXT.encode()]
    for piece in (1, 7, 4096):
        assert eval.nats(model, tokens, piece=piece) == pytest.approx(-sum(log_p(model, tokens)), abs=1e-9)


@pytest.mark.parametrize("context", [1, 2, 9, 16, 62, 63, 64, 99])
def test_windows_predict_every_token_once_with_half_a_window_before_it(context):
    model, tokens = tiny(pos="learned", seq_len=99), [256, *TEXT.encode()[:63]]
    wanted, done = 0.0, 0
    while done < 63:
        start = max(0, done - context // 2)
        stop = min(63, start + context)
        wanted += sum(log_p(model, tokens[start:stop + 1])[done - start:])
        done = stop
    assert eval.nats(model, tokens, context) == pytest.approx(-wanted, abs=1e-9)


def test_continuations_read_in_batches_have_the_log_likelihood_of_a_forward_each():
    model, words = tiny(), TEXT.split()
    pairs = [(list(" ".join(words[:i]).encode()), list(word.encode())) for i, word in enumerate(words) if i]
    greedy = int(model(torch.tensor([pairs[3][0]]))[0][0, -1].argmax())
    pairs[3] = pairs[3][0], [greedy]
    found = eval.continuations(model, pairs, batch_size=4)
    for (given, answer), (sum_log_p, is_greedy) in zip(pairs, found, strict=True):
        assert sum_log_p == pytest.approx(sum(log_p(model, given + answer)[len(given) - 1:]), abs=1e-5)
        assert is_greedy == (answer == [greedy])
    learned = tiny(pos="learned")                                                 # keeps the 16 tokens that fit
    (found, _), = eval.continuations(learned, [(list(TEXT.encode()), [65, 66])], 1)
    assert found == pytest.approx(sum(log_p(learned, [*TEXT.encode()[-15:], 65, 66])[-2:]), abs=1e-5)


def test_the_program_tells_bits_per_byte_of_a_file_and_says_what_each_token_was_read_from(measure, tmp_path):
    result = json.loads(measure("--file=text.txt").out)
    size = len(TEXT.encode())
    assert (result["tokens"], result["bytes"], result["context"]) == (size, size, "all")
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    assert result["ppl"] == pytest.approx(math.exp(result["loss"])) != pytest.approx(257, rel=1e-3)
    Path("marked.txt").write_text(TEXT, encoding="utf-8-sig")
    assert json.loads(measure("--file=marked.txt").out) == result
    assert json.loads(measure("--file=text.txt", "--context=8").out)["context"] == 8
    assert json.loads(measure("--file=text.txt", "--context=10**30").out)["loss"] == pytest.approx(result["loss"])
    for options in ({"pos": "learned"}, {"mixers": "linear softmax"}):
        write_checkpoint(tmp_path / "out", **options)
        assert json.loads(measure("--file=text.txt").out)["context"] == 16


def test_a_terminal_gets_five_digits_and_a_file_all(measure, monkeypatch):
    exact = json.loads(measure("--file=text.txt").out)
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    measure("--file=text.txt")
    shown = json.loads(terminal.buffer.getvalue())
    assert shown["loss"] == float(f"{exact['loss']:.5g}") != exact["loss"] and shown["tokens"] == exact["tokens"]


@pytest.mark.parametrize("flags, message", [
    ([], "give --file=TEXT, or --tasks"), (["--file=a", "--tasks=b"], "file=a and tasks=b are two measurements: leave out"),
    (["--tasks=a", "--task_dir=none"], "task_dir=none must be a folder"), (["--plugin=none.py"], "give --file"),
    (["--file=none"], "cannot read none"), (["--file=empty"], "empty is empty"),
    (["--file=a", "--limit=-1"], "at least 0"), (["--tasks=piqa"], "pip install lm_eval"),
    (["--file=text.txt", "--out_dir=learned", "--context=17"], "end at 16 tokens")])
def test_bad_input_is_one_line_with_exit_code_2(measure, tmp_path, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)                   # as where it is missing
    Path("empty").write_text("")
    write_checkpoint(tmp_path / "learned", pos="learned")
    result = measure(*flags)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and message in result.err


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
"""
FILTERS = """filter_list:
  - {name: all, filter: [{function: take_first}]}
  - {name: letters, filter: [{function: regex, regex_pattern: '[a-z]+'}, {function: take_first}]}
"""


@pytest.fixture
def harness(measure, tmp_path, monkeypatch):
    """harness(*flags) is `python eval.py`, with lm_eval and without a network: what it prints."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def harness(*flags):
        result = measure(f"--task_dir={tmp_path}", *flags)
        assert result.code == 0, result
        return json.loads(result.out)
    return harness


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no samples of LAMBADA, HellaSwag and PIQA beside the checkout")
def test_lambada_and_multiple_choice_give_the_log_likelihoods_of_our_own_forward(harness, monkeypatch):
    model = eval.open_model("out", "cpu")[0]
    count, given, calls = 12, {}, eval.continuations

    def spy(model, pairs, batch_size):
        answers = calls(model, pairs, batch_size)
        given.update({tuple(map(bytes, pair)): answer for pair, answer in zip(pairs, answers, strict=True)})
        return answers
    monkeypatch.setattr(eval, "continuations", spy)
    tasks = {"lambada_openai": ("loglikelihood", "{{text.split(' ')[:-1]|join(' ')}}", "{{' ' + text.split(' ')[-1]}}",
                                "metric_list: [{metric: perplexity}, {metric: acc}]\n"),
             "hellaswag_val": ("multiple_choice", "{{ctx}}", "{{label|int}}", 'doc_to_choice: "{{endings}}"\n'),
             "piqa_val": ("multiple_choice", "{{goal}}", "label", 'doc_to_choice: "{{[sol1, sol2]}}"\n')}
    for name, (kind, text, target, more) in tasks.items():
        task = TASK.format(name=f"local_{name}", data=SAMPLES / f"{name}.jsonl.gz", kind=kind, text=text, target=target)
        Path(f"{name}.yaml").write_text(task + more)
    found = harness(f"--tasks={','.join(f'local_{name}' for name in tasks)}", f"--limit={count}")

    def score(context, answer):
        """log p by one forward of the whole, and that the harness was given the same."""
        context, tokens = context.encode(), list((context + answer).encode())
        with torch.no_grad():
            log_p = model(torch.tensor([tokens[:-1]]))[0][0].log_softmax(-1)
        mine = sum(float(log_p[i - 1, tokens[i]]) for i in range(len(context), len(tokens)))
        assert given[context, answer.encode()][0] == pytest.approx(mine, abs=1e-3)
        return mine

    def docs(name):
        with gzip.open(SAMPLES / f"{name}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in itertools.islice(file, count)]

    def accuracy(name, question, choices):
        right = []
        for doc in docs(name):
            scores = [score(doc[question], " " + choice) for choice in choices(doc)]
            right.append(scores.index(max(scores)) == int(doc["label"]))
        assert found[f"local_{name}"]["acc"] == pytest.approx(sum(right) / count)
    cuts = [doc["text"].rpartition(" ") for doc in docs("lambada_openai")]
    scores = [score(text, " " + word) for text, _, word in cuts]
    assert found["local_lambada_openai"]["perplexity"] == pytest.approx(math.exp(-sum(scores) / count), rel=1e-4)
    accuracy("hellaswag_val", "ctx", lambda doc: doc["endings"])
    accuracy("piqa_val", "goal", lambda doc: (doc["sol1"], doc["sol2"]))
    assert len(given) == count * (1 + 4 + 2)


@pytest.mark.slow
def test_every_kind_of_task_measures_our_own_forward_and_each_filter_has_its_figure(harness, tmp_path):
    model = eval.open_model("out", "cpu")[0]
    docs = [{"question": f"{a} and {b} are", "choices": [f" {a + b}", f" {a - b}!", f" {a * b}"], "label": (a * b) % 3}
            for a in range(4) for b in range(3)]
    tasks = {"choose": ("multiple_choice", "{{label}}", 'doc_to_choice: "{{choices}}"\n'),
             "predict": ("loglikelihood", "{{choices[0]}}", "metric_list: [{metric: perplexity}, {metric: acc}]\n"),
             "read": ("loglikelihood_rolling", "{{question}}", "metric_list: [{metric: bits_per_byte}]\n"),
             "write": ("generate_until", "{{choices[0]}}", "generation_kwargs: {until: [' '], max_gen_toks: 5}\n"
                       "metric_list: [{metric: exact_match}]\n" + FILTERS)}
    for name, (kind, target, more) in tasks.items():
        data = tmp_path / f"{name}.jsonl"
        task = TASK.format(name=name, data=data, kind=kind, text="{{question}}", target=target)
        Path(f"{name}.yaml").write_text(task + more)
        Path(f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    found = harness("--tasks=choose,predict,read,write")
    assert {"exact_match,all", "exact_match,letters"} <= set(found["write"])

    def score(doc, i):
        given, answer = doc["question"].encode(), doc["choices"][i].encode()
        return sum(log_p(model, [*given, *answer])[len(given) - 1:])
    right = [max(range(3), key=lambda i: score(doc, i)) == doc["label"] for doc in docs]
    assert 0 < sum(right) < len(docs) and found["choose"]["acc"] == pytest.approx(sum(right) / len(docs))
    mean = sum(score(doc, 0) for doc in docs) / len(docs)
    assert found["predict"]["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    texts = [doc["question"].encode() for doc in docs]
    bits = -sum(sum(log_p(model, [256, *text])) for text in texts) / sum(map(len, texts)) / math.log(2)
    assert found["read"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def write(model, **options):
    return eval.write(model, BYTES, "abc", options)


def test_a_generation_task_is_greedy_and_ends_before_the_first_stop():
    model = tiny().float()
    whole = write(model, until=[], max_gen_toks=12)
    tokens = [int(t) for t, _ in model.generate(torch.tensor([list(b"abc")]), 12, temperature=0)]
    assert whole == bytes(tokens).decode(errors="replace")
    stop = bytes(tokens[2:4]).decode("latin-1")
    assert stop.isascii() and write(model, until=[stop, "never"], max_gen_toks=12) == whole[:whole.index(stop)]
    assert write(model, until=stop, max_gen_toks=12) == whole[:whole.index(stop)]
    assert write(model, until=None, max_gen_toks=3) == bytes(tokens[:3]).decode(errors="replace")


def test_a_generation_task_may_say_its_limit_in_all_the_ways_that_the_harness_knows():
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert eval.read_options({name: 7})[0] == 7
    assert eval.read_options({"max_new_tokens": 7, "max_gen_toks": None})[0] == 7
    assert eval.read_options({"max_new_tokens": 7, "max_gen_toks": 8})[0] == 8
    assert eval.read_options({"max_length": 7}, prompt_length=3)[0] == 4
    assert eval.read_options({"max_length": 7, "max_tokens": 5}, prompt_length=3)[0] == 5
    assert eval.read_options({})[0] is None


@pytest.mark.parametrize("options, temperature", [
    ({}, 0), ({"temperature": 1}, 1), ({"temperature": 0.5, "do_sample": True}, 0.5), ({"do_sample": False}, 0),
    ({"temperature": 1, "do_sample": False}, 0), ({"temperature": None}, 0), ({"do_sample": True}, 1),
    ({"temperature": 0.0, "do_sample": True}, 0), ({"temperature": 1, "do_sample": None}, 1)])
def test_a_temperature_means_sampling_unless_the_task_says_otherwise_as_in_the_harness(options, temperature):
    assert eval.read_options(options)[1] == {"temperature": temperature, "top_k": 0, "top_p": 1}
    nulls = {"top_k": None, "top_p": None, "until": None, "max_gen_toks": None}
    assert eval.read_options(options | nulls) == eval.read_options(options)


@pytest.mark.parametrize("options", [{"temperature": "none"}, {"temperature": -1}, {"temperature": math.nan}, {"until": [5]},
                                     {"max_gen_toks": math.inf}, {"max_gen_toks": [7]}, {"top_k": "all"}, {"until": 7}])
def test_a_generation_option_that_means_nothing_is_one_line(options):
    with pytest.raises(UserError, match="^a task's generation_kwargs cannot be read"):
        eval.read_options(options)


def test_generation_options_that_are_not_followed_are_named(monkeypatch, capsys):
    api = types.ModuleType("lm_eval.api.model")
    api.TemplateLM = object
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    harness = eval.harness_model(tiny().float(), BYTES, 0, 1)
    request = types.SimpleNamespace(args=("abc", {"until": [], "max_gen_toks": 2, "num_beams": 4, "stop": ["x"]}))
    harness.generate_until([request, request], disable_tqdm=True)
    assert capsys.readouterr().err == "warning: generation_kwargs that change nothing here: num_beams, stop\n"


@pytest.mark.parametrize("length, options, prompt, text", [
    (3, {}, 3, 13), (40, {}, 8, 8), (12, {}, 8, 8), (40, {"max_gen_toks": 5}, 11, 5), (40, {"max_gen_toks": 14}, 8, 8),
    (40, {"max_gen_toks": 16}, 8, 8), (3, {"max_gen_toks": 999}, 3, 13), (16, {}, 8, 8)])
def test_with_learned_positions_a_generation_task_keeps_half_of_them_for_the_prompt(length, options, prompt, text, monkeypatch):
    model = tiny(pos="learned").float()
    given = []

    def generate(idx, most, *args, calls=model.generate, **options):
        given.append((idx.shape[1], most))
        return calls(idx, most, *args, **options)
    monkeypatch.setattr(model, "generate", generate)
    eval.write(model, BYTES, "x" * length, options)
    assert given == [(prompt, text)]


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", ["{until: [], max_new_tokens: 7}", "{max_new_tokens: 7, temperature: 1, top_k: null}",
                                    "{max_length: 20, do_sample: false}", "{do_sample: true}", "{}"])
@pytest.mark.parametrize("pos", ["rope", "learned"])
def test_generation_kwargs_come_through_the_harness(harness, tmp_path, monkeypatch, kwargs, pos):
    write_checkpoint(tmp_path / "out", pos=pos)
    task = TASK.format(name="write", data=tmp_path / "write.jsonl", kind="generate_until", text="{{question}}", target="4")
    Path("write.yaml").write_text(task + f"generation_kwargs: {kwargs}\nmetric_list: [{{metric: exact_match}}]\n")
    Path("write.jsonl").write_text(json.dumps({"question": "2 and 2 are"}) + "\n")
    read, seen = eval.read_options, []
    monkeypatch.setattr(eval, "read_options", lambda *args: seen.append(read(*args)) or seen[-1])
    assert harness("--tasks=write") == {"write": {"exact_match": 0.0}}
    (limit, sampling, stops), = seen
    assert limit == (7 if "max_new" in kwargs else 9 if "length" in kwargs else None)
    assert sampling["temperature"] == (1 if "temperature: 1" in kwargs or "do_sample: true" in kwargs else 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags, kwargs", [(["--tasks=write"], "{temperature: null}"), (["--tasks=none"], "{}"),
                                           (["--tasks=write", "--limit=10**30"], "{}")])
def test_what_the_harness_refuses_is_one_line_with_exit_code_2(measure, tmp_path, flags, kwargs):
    pytest.importorskip("lm_eval")
    task = TASK.format(name="write", data=tmp_path / "none.jsonl", kind="generate_until", text="{{question}}", target="4")
    Path("write.yaml").write_text(task + f"generation_kwargs: {kwargs}\n")
    result = measure(f"--task_dir={tmp_path}", *flags)
    assert (result.code, result.out) == (2, "") and "\neval.py: lm_eval cannot run" in "\n" + result.err, result


@pytest.mark.parametrize("piece", [1, 7, 512])
def test_log_probs_are_those_of_a_forward_for_each_token(piece):
    model, words = tiny(), list(TEXT.encode())
    found = eval.log_probs(model, BYTES, TEXT, piece=piece)
    assert found.tolist() == pytest.approx(log_p(model, [256, *words]), abs=1e-5)
    part = eval.log_probs(model, BYTES, "more", given=TEXT, piece=piece)
    assert part.tolist() == pytest.approx(log_p(model, [*words, *b"more"])[-4:], abs=1e-5)
    assert eval.log_probs(model, BYTES, "", piece=piece).tolist() == []


def test_a_loss_that_is_not_a_number_is_a_failure_of_the_model_with_exit_code_1(measure, monkeypatch):
    monkeypatch.setattr(eval, "nats", lambda *args: math.nan)
    result = measure("--file=text.txt")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1) and "the loss is nan" in result.err
    with pytest.raises(eval.Failed, match="NaN"):
        model = tiny()
        torch.nn.init.constant_(model.norm.weight, math.nan)
        eval.continuations(model, [([1], [2])], 1)
