"""Bad input of every kind: one line that says what is wrong, and nothing is left behind."""

import ast
import hashlib
import http.server
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from helpers import CONFIGS, SIZE, make_chat_model

import eval as evaluation
import train
from reward import InputError, ask_reward

ROOT = Path(train.__file__).parent
LINE = '{"question": "1+1?", "answer": "2"}\n'
FILES = {
    "plain.jsonl": "".join(LINE.replace("1+1", f"1+{n}") for n in range(20)),
    "one.jsonl": LINE,
    "cut.jsonl": LINE[:20],
    "blank.jsonl": "\ufeff\r\n \n",
    "unanswered.jsonl": '{"question": "2+2?"}\n' * 2,
    "long.jsonl": LINE.replace("1+1", "1+1" * 4000),
    "wrong.py": "def length(\n",
    "quits.py": "raise SystemExit(0)",
    "number.py": "length = 3",
    "taken/file": "mine",
    "broken/run.json": "{",
    "a.json": '{"questions": ["a"], "measures": {}}',
    "b.json": '{"questions": ["b"], "measures": {}}',
    "null.json": '{"questions": ["a"], "measures": null}',
    "few.json": '{"questions": ["a", "b"], "measures": {"greedy": [1]}}',
    "none.json": '{"questions": [], "measures": {"greedy": []}}',
    "list/run.json": '{"config": ["lr"]}',
    "typed/run.json": json.dumps({"config": {**vars(train.Config()), "lr": [0.5]}}),
    "odd/run.json": json.dumps({"config": {"max_new_tokens": "many", "eval_problems": 3}}),
    "run/run.json": json.dumps({"config": {**vars(train.Config()), "lr": 0.5, "out": "run"}}),
}
# A line of a file of problems, and what is said about it.
LINES = {
    "{nope": "Expecting property name",
    '{"question": " ", "answer": "2"}': "no question",
    '{"question": 5, "answer": "2"}': "no question",
    '{"messages": [{"role": "system", "content": "s"}], "answer": "2"}': "no question",
    '{"messages": [{"role": "user"}], "answer": "2"}': "content",
    '{"question": "\\ud83d?", "answer": "2"}': "surrogates not allowed",
    '["question", "answer"]': "'list' object has no attribute 'get'",
    "[" * 10**5: "recursion",
    "\udce9": "'utf-8' codec can't decode byte 0xe9",  # é in Latin-1
}
for answer in ('["2", "3"]', '{"value": 2}', "true", "NaN", "1e999"):
    LINES[f'{{"question": "a", "answer": {answer}}}'] = (
        "an answer that is neither text nor a number"
    )
FLAGS = {  # arguments of train.py, and what the line says
    "--group-size 1": "--group-size must be finite and at least 2 and at most 100000, not 1",
    "--temperature 1e-45": "--temperature must be finite and at least 0.01, not 1e-45",
    "--rows-at-once -5": "--rows-at-once must be finite and at least 1, not -5",
    "--lr nan": "--lr must be finite and at least 1e-12, not nan",
    "--kl-beta inf": "--kl-beta must be finite and at least 0, not inf",
    f"--seed {2**63}": f"--seed must be finite and at least 0, not {2**63}",
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1; see .* --help",
    "--device mps": "argument --device: invalid choice: '?mps'?",
    "--device cuda": "--device cuda needs a GPU with CUDA: use cpu",
    "--supervision process --advantage indicator": "--advantage indicator has no step rewards",
    "--out taken": "--out taken is a file or not empty",
    "--out plain.jsonl": "--out plain.jsonl is a file or not empty",
    "--model chat --problems plain.jsonl --questions 2 --out plain.jsonl/run": "Not a directory",
    "--reward wrong.py:length": "--reward wrong.py:length: SyntaxError",
    "--reward number.py:length": "--reward number.py:length: TypeError.*length is not a function",
    "--reward quits.py:length": "--reward quits.py:length: SystemExit.*want FILE.py:FUNCTION",
    "--questions 20000": "--questions 20000 exceeds the 10000 problems",
    "--questions 100000000000": "--questions must be finite and at least 1 and at most 100000",
    "--resume typed": "in the run's run.json: argument --lr: invalid float value",
    "--problems gsm8k": "--problems gsm8k needs a --model",
    "--model chat --problems plain.jsonl --eval-problems x": "no x test: use a file, gsm8k train",
    "--resume nowhere": "--resume nowhere: no run.json from this version",
    "--resume broken": "--resume broken: no run.json from this version",
    "--resume list": "--resume list: no run.json from this version",
    "--resume run --lr 0.1": "--lr 0.1 contradicts the run's 0.5: leave it out",
    "--tensorboard --out new --model /nowhere": "cannot be used|No module named 'tensorboard'",
    "--resume run --out other": "--out other contradicts the run's run",
}
PROBLEMS = {  # problems, given to train.py with a good model
    "blank.jsonl": "blank.jsonl is empty or has no answers",
    "unanswered.jsonl": "unanswered.jsonl is empty or has no answers",
    "one.jsonl": "one.jsonl is too small to hold any out",
    "long.jsonl": "no question with --max-new-tokens 512 fits into 1024 tokens",
    "plain.jsonl --sft-steps 5": "--sft-steps needs worked solutions; plain.jsonl has none",
}
MODELS = {  # what is said, and of which models
    "": "/nowhere nobody/no-such-model plain.jsonl textless",
    "weights of another shape: model.embed_tokens.weight": "misshapen",
    "no_such_type": "typeless",
    "SafetensorError": "torn",
    "its tokenizer is missing, or has no EOS token to end a completion": "endless",
    "TemplateError, no": "raising",
    "UndefinedError": "choosy",
    "its chat template drops the question; does it want a list of parts?": "parts curt",
    "its tokenizer has more tokens than the model": "small",
    "weights are missing; was it saved as a causal language model?": "encoder headless",
    "its logits are not just the vocabulary head": "cohere gemma2 encoding roberta",
    "it keeps state other than a cache of keys and values": "mamba hybrid",
}
EVAL = {
    "": "--model is required; see .* --help",
    "--model chat": "--problems or --ask is required, as chat is not a run",
    "--model list": "--problems or --ask is required, as list is not a run",
    "--comp a b": "unrecognized arguments: --comp a b",
    "--compare a.json b.json": "two eval.py result files: they are about different problems",
    "--compare run/run.json run/run.json": "wants two eval.py result files: 'questions'",
    "--compare null.json null.json": "'NoneType' object has no attribute 'items'",
    "--compare few.json few.json": "cannot reshape array of size 1",
    "--compare none.json none.json": "they are about different problems, or none",
    "--model run --ask 1+1": "--model run: this run has not finished; resume it",
    "--model odd": "in the run's run.json: .*--max-new-tokens: invalid int value: 'many'",
    f"--model chat --problems arithmetic --seed {10**22}": "--seed must be finite",
    "--model chat --problems arithmetic --temperature 1e-45": "--temperature must be finite",
    "--model chat --problems arithmetic --out one.jsonl": "--out one.jsonl exists, and nothing is",
    "--model chat --problems arithmetic --split test": "no arithmetic test: use a file,",
}
TABLE = [(train.main, flags, message) for flags, message in FLAGS.items()]
TABLE += [(train.main, f"--model chat --problems {name}", text) for name, text in PROBLEMS.items()]
for text, names in MODELS.items():
    for name in names.split():
        said = f"^--model {name} cannot be used: .*{text}"
        TABLE.append((train.main, f"--steps 0 --problems plain.jsonl --model {name}", said))
TABLE += [(evaluation.main, flags, message) for flags, message in EVAL.items()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, chat_folder):
    """A folder with all files and models of the tables."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    changes = {  # copies of a good model, in whose files a text is replaced
        "typeless": ("config.json", '"model_type": "qwen2"', '"model_type": "no_such_type"'),
        "misshapen": ("config.json", '"hidden_size": 64', '"hidden_size": 32'),
        "endless": ("tokenizer_config.json", '"eos_token": "<|endoftext|>",', '"eos_token": null,'),
        "raising": ("chat_template.jinja", "{% for", "{{ raise_exception('no') }}{% for"),
        "parts": ("chat_template.jinja", "{{ m.content }}", "{{ m.content[0].text }}"),
        "curt": ("chat_template.jinja", "{{ m.content }}", "{{ m.content[:9] }}"),
        "choosy": ("chat_template.jinja", "{% endfor", "{{ m.a.b if m.role != 'user' }}{% endfor"),
    }
    for name, (file, old, new) in changes.items():
        path = shutil.copytree(chat_folder, folder / name) / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    for name in ("chat", "torn"):
        shutil.copytree(chat_folder, folder / name)
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    shutil.copytree(chat_folder, folder / "textless", ignore=shutil.ignore_patterns("tokenizer*"))
    make_chat_model(folder / "small", vocab_size=300)  # its tokenizer has more
    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1}
    bert = transformers.BertConfig(**sizes, num_attention_heads=2, intermediate_size=16)
    layers = {"layer_types": ["conv", "full_attention"]}
    configs = {"encoding": bert, "mamba": transformers.MambaConfig(**sizes)}
    configs |= {"hybrid": transformers.Lfm2Config(**SIZE, **layers)}
    configs |= {"roberta": transformers.RobertaConfig(**SIZE, is_decoder=True)}
    configs |= {"cohere": CONFIGS["cohere"](), "gemma2": CONFIGS["gemma2"]()}
    models = {"encoder": transformers.BertModel(bert)}
    models["headless"] = transformers.AutoModel.from_pretrained(chat_folder)
    models["headless"].config.tie_word_embeddings = False
    for name, config in configs.items():
        config.vocab_size = 400
        models[name] = transformers.AutoModelForCausalLM.from_config(config)
    for name, model in models.items():
        model.save_pretrained(shutil.copytree(chat_folder, folder / name))
    return folder


def snapshot(folder):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("main, arguments, message", TABLE, ids=[row[1] for row in TABLE])
def test_bad_input_is_one_line_and_leaves_nothing(main, arguments, message, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = snapshot(inputs)
    with pytest.raises((InputError, OSError, ModuleNotFoundError), match=message) as caught:
        main(arguments.split())
    assert "\n" not in str(caught.value)
    assert snapshot(inputs) == before


def test_a_bad_line_of_a_problems_file_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    for line, message in LINES.items():
        path.write_bytes(f"{LINE}\n{line}\n".encode(errors="surrogateescape"))
        want = re.escape(f'{path}, line 3: want {{"question": "1+1?", "answer": "2"}}, found: ')
        with pytest.raises(InputError, match=f"^{want}.*{message}") as caught:
            evaluation.load_problems(str(path), "")
        assert "\n" not in str(caught.value)


def test_commands_end_with_one_line_on_stderr_and_status_1(inputs):
    before = snapshot(inputs)
    commands = ["train.py --problems plain.jsonl --model torn", "eval.py --compare run taken"]
    commands.append("eval.py --ask 1+1 --model misshapen")  # of which the library says more
    for command in commands:
        program = [sys.executable, *f"{ROOT}/{command}".split()]
        run = subprocess.run(program, cwd=inputs, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (1, "")
        assert re.fullmatch("error: .*\n", run.stderr), run.stderr
    assert snapshot(inputs) == before


def test_errors_that_a_user_can_mend_become_one_line():
    memory = "error: out of memory; lower --rows-at-once, or in training --micro-tokens"
    ends = {
        torch.OutOfMemoryError("CUDA out of memory.\nTried to"): memory,
        MemoryError(): memory,
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"): memory,
        InputError("--lr"): "error: --lr",
        OSError(28, "disk full"): "error: [Errno 28] disk full",
        FloatingPointError("nan"): "error: nan",
        ModuleNotFoundError("no x", name="x"): "error: no x; pip install x",
        KeyboardInterrupt(): 130,
    }
    for error, code in ends.items():
        with pytest.raises(SystemExit) as stop:
            evaluation.run_cli(Mock(side_effect=error))
        assert stop.value.code == code
    with pytest.raises(RuntimeError, match="shape"):  # a mistake of ours stays one
        evaluation.run_cli(Mock(side_effect=RuntimeError("shape of memory")))


def untidy(prompts, completions, answer):
    for texts in (prompts, completions, answer):
        texts.sort()
        texts.pop()
    return torch.tensor([1, 0.5])


def test_a_reward_gets_copies_of_the_lists_and_fails_in_one_line():
    lists = [["b", "a"], ["d", "c"], ["f", "e"]]
    assert ask_reward(untidy, *lists) == [1.0, 0.5]
    assert lists == [["b", "a"], ["d", "c"], ["f", "e"]]
    for rewards in ([1.0], [1.0, math.nan], [1.0, -math.inf], [1.0, 1e39], [0.0] * 3):
        with pytest.raises(InputError, match=r"^--reward: want 2 finite numbers, not \["):
            ask_reward(Mock(return_value=rewards), *lists)
    for error in (None, ["right", "wrong"], OSError("two\nlines"), SystemExit("Error")):
        with pytest.raises(InputError, match="^--reward failed: .*Error.*$"):
            ask_reward(Mock(side_effect=[error]), *lists)


DOWNLOADS = {  # a file that the server has or has not, and what is said
    "plain.jsonl": "invalid hash value",
    "cut.jsonl": "invalid hash value",
    "missing.jsonl": "404",
    "stalled": "timed out",
    "refused": "Connection refused",
    "stale": "the file there does not have SHA-256",
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_that_fails_says_what_to_do(name, inputs, tmp_path, monkeypatch):
    files = partial(http.server.SimpleHTTPRequestHandler, directory=inputs)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    silent = socket.create_server(("127.0.0.1", 0))  # it accepts, and never answers
    ports = {"refused": 1, "stalled": silent.getsockname()[1]}
    url = f"http://127.0.0.1:{ports.get(name, server.server_port)}/{name}"
    sha256 = hashlib.sha256(LINE.encode()).hexdigest()
    monkeypatch.setitem(evaluation.DOWNLOADS, "gsm8k train", (url, sha256))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(0.5))
    file = tmp_path / "minimal-grpo" / "gsm8k-train.jsonl"
    if name == "stale":
        file.parent.mkdir()
        file.write_text("an older one\n")
    with pytest.raises(InputError, match=DOWNLOADS[name]) as caught:
        train.main(f"--model {inputs / 'chat'} --out {tmp_path / 'run'}".split())
    assert f"save {url} as {file} by hand" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.rglob("*.*")] == ([file] if name == "stale" else [])
    set_timeout(None)
    server.shutdown()
    silent.close()


def test_an_added_token_that_no_prompt_has_needs_no_row(tmp_path):
    """Gemma 3 has one for images, and one row less."""
    folder = make_chat_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, tokenizer = evaluation.load_model(str(folder), torch.device("cpu"))
    assert len(tokenizer) == len(model.get_input_embeddings().weight) + 1


def test_nothing_that_a_model_or_a_file_says_is_run():
    """No eval, exec or compile, no pickle, no shell, no code of the hub; torch.load of weights."""
    modules = {"pickle", "dill", "joblib", "shelve", "marshal"}
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "input"}
    calls |= {"numpy.load", "np.load", "torch.hub.load", "spec.loader.exec_module"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        compiles = path.name in ("test_mutants.py", "make_assignment.py")  # changed copies of ours
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not modules & names, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert name not in calls or compiles and name == "compile", where
                assert not {"trust_remote_code", "allow_pickle", "shell"} & options.keys(), where
                assert name != "torch.load" or options.get("weights_only", "True") == "True", where
