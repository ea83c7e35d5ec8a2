"""Bad input of every kind: one line that says what is wrong, exit status 1, and nothing is left behind."""

import ast
import hashlib
import http.server
import json
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, MambaConfig, MambaForCausalLM

import eval as evaluation
import train
from eval import DOWNLOADS, build_prompt, fetch, load_model, load_problems
from helpers import CHAT_TEMPLATE, make_chat_model

LINE = '{"question": "1+1?", "answer": "2"}\n'
FILES = {
    "plain.jsonl": "".join(LINE.replace("1+1", f"1+{n}") for n in range(20)),
    "one.jsonl": LINE,
    "empty.jsonl": "",
    "blank.jsonl": "\ufeff\r\n \n",
    "json.jsonl": LINE * 2 + "{nope\n",
    "cut.jsonl": LINE + '{"question": "a", "ans',
    "unasked.jsonl": LINE + '\n{"answer": "2"}\n',
    "silent.jsonl": LINE + '{"question": " ", "answer": "2"}\n',
    "asked5.jsonl": LINE + '{"question": 5, "answer": "2"}\n',
    "list.jsonl": LINE + "[1, 2]\n",
    "number.jsonl": LINE + "7\n",
    "pair.jsonl": LINE + '["question", "answer"]\n',
    "word.jsonl": LINE + '"text"\n',
    "null.jsonl": LINE + "null\n",
    "deep.jsonl": LINE + "[" * 10**5 + "\n",
    "answers.jsonl": LINE + '{"question": "a", "answer": ["2", "3"]}\n',
    "true.jsonl": LINE + '{"question": "a", "answer": true}\n',
    "half.jsonl": LINE + '{"question": "\\ud83d?", "answer": "2"}\n',
    "unanswered.jsonl": '{"question": "2+2?"}\n' * 2,
    "chat.jsonl": LINE + '{"messages": [], "answer": "2"}\n',
    "long.jsonl": LINE.replace("1+1", "1+1" * 4000),
    "latin.jsonl": (LINE + '{"question": "où?", "answer": "2"}\n').encode("latin-1"),
    "utf16.jsonl": LINE.encode("utf-16"),
    "own.py": "def length(prompts, completions, answer):\n    return [1.0 for _ in completions]\n",
    "wrong.py": "def length(\n",
    "taken/file": "mine",
    "norun/other.txt": "",
    "broken/run.json": "{",
    "foreign/run.json": '{"config": {"no_such_option": 1}}',
    "run/run.json": json.dumps(
        {"config": {**vars(train.Config()), "lr": 0.5, "out": "run"}, "data": 0}
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, chat_folder):
    """A folder with all files and models of the table."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def model(
        name, **changes
    ):  # a copy of the good folder, in which texts of files are replaced; None: removed
        shutil.copytree(chat_folder, folder / name)
        for file, change in changes.items():
            (path,) = (folder / name).glob(f"{file}.*")
            if change is None:
                path.unlink()
            else:
                assert change[0] in path.read_text(errors="replace")
                path.write_text(path.read_text(errors="replace").replace(*change))

    good = (chat_folder / "config.json").read_text()
    model("chat")
    model("textless", tokenizer=None, tokenizer_config=None)
    model("endless", tokenizer_config=('"eos_token": "<|endoftext|>",', '"eos_token": null,'))
    model("torn")
    (folder / "torn" / "model.safetensors").write_bytes(
        (chat_folder / "model.safetensors").read_bytes()[:20_000]
    )
    model("emptied")
    (folder / "emptied" / "model.safetensors").unlink()
    model("typeless", config=('"model_type": "qwen2"', '"model_type": "no_such_type"'))
    model("misshapen", config=('"hidden_size": 64', '"hidden_size": 32'))
    model("wordy", config=('"hidden_size": 64', '"hidden_size": "x"'))
    model("raising", chat_template=("{% for", "{{ raise_exception('no') }}{% for"))
    model("unclosed", chat_template=("{% endfor %}", ""))
    assert good == (folder / "chat" / "config.json").read_text()
    make_chat_model(folder / "small", vocab_size=300)  # its tokenizer has more
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    for name, built in {
        "encoder": BertModel(
            BertConfig(
                vocab_size=400,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            )
        ),
        "headless": evaluation.AutoModelForCausalLM.from_pretrained(
            chat_folder, tie_word_embeddings=False
        ).base_model,
        "mamba": MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)),
    }.items():
        built.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


# Arguments of train.py, and what the one line says.
FLAGS = {
    "--group-size 1": "--group-size must be finite and at least 2, not 1",
    "--temperature 0": "--temperature must be finite and above 0, not 0.0",
    "--steps -1": "--steps must be finite and at least 0, not -1",
    "--seed -1": "--seed must be finite and at least 0, not -1",
    "--lr nan": "--lr must be finite and above 0, not nan",
    "--kl-beta inf": "--kl-beta must be finite and at least 0, not inf",
    "--save-every -5": "--save-every must be finite and at least 0, not -5",
    "--steps many": "invalid int value: 'many'; see train.py --help",
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1; see train.py --help",
    "--aggregate mean": "invalid choice: 'mean'",
    "--supervision process --advantage indicator": "--advantage indicator knows no steps: leave it out, or --supervision process",
    "--sample-from nobody": "invalid choice: 'nobody'",
    "--reward-size 0": "--reward-size must be finite and at least 1, not 0",
    "--device mps": "take cpu, or cuda with a GPU (no MPS)",
    "--out taken": "--out taken is a file or not empty, and nothing is overwritten",
    "--out plain.jsonl": "--out plain.jsonl is a file or not empty",
    "--out plain.jsonl/run": "Not a directory: 'plain.jsonl/run'",
    "--reward nowhere.py:length": "--reward nowhere.py:length: FileNotFoundError",
    "--reward own.py:width": "--reward own.py:width: KeyError",
    "--reward own.py": "want FILE.py:FUNCTION",
    "--reward wrong.py:length": "--reward wrong.py:length: SyntaxError",
    "--problems gsm8k": "--problems gsm8k needs a --model; without one: arithmetic, or arithmetic-LONGEST-LARGEST, of 6 to 29",
    "--eval-problems arithmetic,nothing": "no nothing test: take a file, gsm8k train,.*mgsm_zh test, or in, out, sft, train of arithmetic or",
    "--problems arithmetic-30-99": "--problems arithmetic-30-99 needs a --model; without one: arithmetic, or",
    "--model chat --size 2": "--size is that of the model made without --model: leave out one of them",
    "--size 9": "argument --size: invalid choice: 9",
    "--size 0": "argument --size: invalid choice: 0",
    "--resume nowhere": "--resume nowhere: no run to go on with",
    "--resume norun": "--resume norun: no run to go on with, for it has no run.json of ours",
    "--resume broken": "--resume broken: no run to go on with",
    "--resume foreign": "no run to go on with, for it has no run.json of ours (.*no_such_option",
    "--resume run --lr 0.1": "--lr 0.1 contradicts the run's 0.5: leave it out, or start another run",
    "--resume run --out other": "--out other contradicts the run's run",
}
# Problems files, given with a good model.
PROBLEMS = {
    "nothing.jsonl": "no nothing.jsonl train: take a file",
    "taken": "no taken train: take a file",
    "cmath": "no cmath train: take a file",
    "empty.jsonl": "empty.jsonl is empty or has no answers",
    "blank.jsonl": "blank.jsonl is empty or has no answers",
    "unanswered.jsonl": "unanswered.jsonl is empty or has no answers",
    "one.jsonl": "one.jsonl is too small to hold some out",
    "json.jsonl": "json.jsonl, line 3: want .*found: Expecting property name",
    "cut.jsonl": "cut.jsonl, line 2: want .*found: Unterminated string",
    "unasked.jsonl": "unasked.jsonl, line 3: want .*found: no question",
    "silent.jsonl": "silent.jsonl, line 2: want .*found: no question",
    "chat.jsonl": "chat.jsonl, line 2: want ",
    "asked5.jsonl": "asked5.jsonl, line 2: want .*found: no question",
    "answers.jsonl": "answers.jsonl, line 2: want .*found: no question, or an answer that is neither text nor a number",
    "true.jsonl": "true.jsonl, line 2: want .*found: no question, or an answer that is neither text nor a number",
    "list.jsonl": "list.jsonl, line 2: want .*found: 'list' object has no attribute 'get'",
    "number.jsonl": "number.jsonl, line 2: want .*found: 'int' object has no attribute 'get'",
    "word.jsonl": "word.jsonl, line 2: want .*found: 'str' object has no attribute 'get'",
    "null.jsonl": "null.jsonl, line 2: want .*found: 'NoneType' object has no attribute 'get'",
    "pair.jsonl": "pair.jsonl, line 2: want .*found: 'list' object has no attribute 'get'",
    "deep.jsonl": "deep.jsonl, line 2: want .*found: maximum recursion",
    "half.jsonl": "half.jsonl, line 2: want .*surrogates not allowed",
    "latin.jsonl": "latin.jsonl, line 2: want .*'utf-8' codec can't decode",
    "utf16.jsonl": "utf16.jsonl, line 1: want .*'utf-8' codec can't decode",
    "long.jsonl": "no prompt fits into the 512 tokens that --max-new-tokens 512 leaves of the model's context: lower it",
    "plain.jsonl --max-new-tokens 1024": "no prompt fits into the 0 tokens",
    "plain.jsonl --sft-steps 5": "--sft-steps needs worked solutions; plain.jsonl has none",
}
MODELS = {
    "/nowhere": "--model /nowhere: no folder or hub name to load",
    "nobody/no-such-model": "no folder or hub name to load",
    "plain.jsonl": "no folder or hub name to load",
    "taken": "no folder or hub name to load",
    "typeless": "no folder or hub name to load .*no_such_type",
    "torn": "no folder or hub name to load .*SafetensorError",
    "emptied": "no folder or hub name to load",
    "misshapen": "no folder or hub name to load",
    "wordy": "no folder or hub name to load",
    "textless": "no folder or hub name to load|its tokenizer is missing",
    "endless": "its tokenizer is missing, or has no EOS token to end a completion",
    "small": "its tokenizer has more tokens than the model .*300",
    "encoder": "weights are missing; was it saved as a causal language model? .*cls.predictions",
    "headless": "weights are missing; was it saved as a causal language model? .*lm_head.weight",
    "raising": "its chat template fails .*no",
    "unclosed": "its chat template fails .*endfor",
    "mamba": "does not run here; take a decoder with a KV cache, like Qwen, that fits into memory",
}
EVAL = {
    "--problems arithmetic": "the following arguments are required: --model; see eval.py --help",
    "--model chat": "--problems or --ask is required: chat has no run.json",
    "--comp a b": "the following arguments are required: --model",
    "--model chat --problems arithmetic --limit -1": "--limit, --samples must be at least 0",
    "--model chat --problems arithmetic --samples two": "invalid int value: 'two'",
    "--model chat --problems arithmetic --temperature 0": "--temperature above 0",
    "--model chat --problems arithmetic --out plain.jsonl": "--out plain.jsonl exists, and nothing is overwritten",
    "--model chat --problems arithmetic --split test": "no arithmetic test: take a file,",
    "--model chat --problems arithmetic --device mps": "no MPS",
    "--model chat --problems plain.jsonl --max-new-tokens 1020": "no prompt fits into the 4 tokens",
    "--model /nowhere --problems arithmetic": "no folder or hub name to load",
}
TABLE = (
    [(train.main, flags, message) for flags, message in FLAGS.items()]
    + [
        (train.main, f"--model chat --problems {name}", message)
        for name, message in PROBLEMS.items()
    ]
    + [
        (train.main, f"--problems plain.jsonl --model {name}", message)
        for name, message in MODELS.items()
    ]
    + [(evaluation.main, flags, message) for flags, message in EVAL.items()]
)


def the_line(main, arguments, monkeypatch):
    """What the command prints as it exits with status 1. Any other end, a traceback say, fails the test."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments.split()])
    monkeypatch.setattr(
        sys.stdout, "reconfigure", lambda **options: None, raising=False
    )  # pytest's has none
    with pytest.raises(SystemExit) as stop:
        evaluation.run_cli(main)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith(
        "error: "
    )  # printed on stderr; the status is 1
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("main, arguments, message", TABLE, ids=[row[1] for row in TABLE])
def test_bad_input_is_one_line_and_leaves_nothing(main, arguments, message, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*") if path.is_file()}
    line = the_line(main, arguments, monkeypatch)
    assert re.search(re.escape(message).replace(r"\.\*", ".*").replace(r"\|", "|"), line), line
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*") if path.is_file()} == before


# --- Downloads --------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves LINE in several broken ways, and well."""

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(LINE)))
        self.end_headers()
        if self.path == "/stall":
            time.sleep(3)  # longer than the client of the test waits
        elif self.path == "/slow":
            self.wfile.write(LINE[:10].encode())
            time.sleep(0.3)
            self.wfile.write(LINE[10:].encode())
        else:
            body = {"/corrupt": LINE.replace("2", "3"), "/cut": LINE[:20]}.get(self.path, LINE)
            self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SHA256 = hashlib.sha256(LINE.encode()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and a client that waits for half a second."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        socket,
        "setdefaulttimeout",
        lambda seconds, original=socket.setdefaulttimeout: original(0.5),
    )
    yield tmp_path / "minimal-grpo"
    monkeypatch.undo()
    socket.setdefaulttimeout(None)


@pytest.mark.parametrize(
    "path, message",
    {
        "/cut": "invalid hash value|IncompleteRead",
        "/corrupt": "invalid hash value",
        "/stall": "timed out",
        "/missing": "404",
        "refused": "Connection refused",
        "/stale": "the file there does not have SHA-256",
    }.items(),
)
def test_a_download_that_fails_says_what_to_do(path, message, address, cache, inputs, monkeypatch):
    url = "http://127.0.0.1:1/" if path == "refused" else address + path
    monkeypatch.setitem(DOWNLOADS, "gsm8k train", (url, SHA256))
    if path == "/stale":
        cache.mkdir()
        (cache / "gsm8k-train.jsonl").write_text("an older one\n")
    line = the_line(
        train.main, f"--model {inputs / 'chat'} --out {cache.parent / 'run'}", monkeypatch
    )
    assert (
        re.search(message, line) and f"put {url} at {cache / 'gsm8k-train.jsonl'} by hand" in line
    )
    assert not (cache.parent / "run").exists()
    assert [file.name for file in cache.iterdir()] == (
        ["gsm8k-train.jsonl"] if path == "/stale" else []
    )


def test_two_that_fetch_at_once_both_get_the_whole_file(address, cache):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(fetch(address + "/slow", SHA256, "p.jsonl").read_text())
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [LINE] * 3 and [path.name for path in cache.iterdir()] == ["p.jsonl"]


# --- What is unusual, and right ---------------------------------------------------------------------


def test_a_problems_file_of_every_accepted_form(tmp_path):
    (tmp_path / "forms.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question": "a", "answer": 2}\r\n\r\n{"problem": "b", "answer": 0.5, "level": null}\n \t\n'
        b'{"question": "c", "golden": "3"}\r\n{"messages": [{"role": "user", "content": "d"}], "answer": "4"}\n'
        b'{"question": "e", "answer": "work\\n#### 5"}\n{"question": "\xc3\xa9", "answer": -1e3}'
    )
    problems = load_problems(str(tmp_path / "forms.jsonl"), "")
    assert [(p.question, p.answer, p.line) for p in problems] == [
        ("a", "2", 1),
        ("b", "0.5", 3),
        ("c", "3", 5),
        ("d", "4", 6),
        ("e", "5", 7),
        ("é", "-1000.0", 8),
    ]


def test_a_template_that_rejects_a_system_message_is_fine(tmp_path):
    """There is no system message in our prompts."""
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    _, tokenizer = load_model(
        str(make_chat_model(tmp_path / "model", chat_template=template)), torch.device("cpu")
    )
    assert build_prompt(tokenizer, evaluation.Problem("1+1?", "2"))


def test_several_sets_are_held_out_at_once(tmp_path, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    config = train.parse_config(
        [
            "--model",
            "chat",
            "--problems",
            "plain.jsonl",
            "--eval-problems",
            "one.jsonl,arithmetic,arithmetic-9-40",
        ]
    )
    problems, worked, held_out = train.gather_problems(
        config, *load_model("chat", torch.device("cpu"))
    )
    assert {name: len(rows) for name, rows in held_out.items()} == {
        "one.jsonl": 1,
        **dict.fromkeys(
            ("arithmetic in", "arithmetic out", "arithmetic-9-40 in", "arithmetic-9-40 out"), 200
        ),
    }
    assert (
        len(problems) == 20
        and "boxed" in held_out["one.jsonl"][0].request
        and held_out["arithmetic in"][0].request == ""
    )


# --- Care -------------------------------------------------------------------------------------------


def test_nothing_that_a_model_or_a_file_says_is_run():
    """No eval, exec or compile, no pickle, no shell, no code of the hub; torch.load only of weights."""
    root = Path(train.__file__).parent
    for path in [*root.glob("*.py"), *(root / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not modules & {
                    "pickle",
                    "dill",
                    "joblib",
                    "shelve",
                    "marshal",
                    "importlib.util",
                }, where
            if isinstance(node, ast.Call):
                name, options = (
                    ast.unparse(node.func),
                    {word.arg: word.value for word in node.keywords},
                )
                assert name not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "os.system",
                    "os.popen",
                    "input",
                ), where
                assert not name.endswith(("numpy.load", "np.load", "hub.load")), where
                assert not {"trust_remote_code", "allow_pickle", "shell"} & set(options), where
                if name == "torch.load":
                    assert getattr(options.get("weights_only"), "value", None) is True, where
