"""Fixtures: small models made on the spot. No download, no GPU unless TEST_DEVICE asks for one."""

import contextlib
import inspect
import itertools
import json
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy CPU, threads wait for each other
if os.environ.get("TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs on a GPU would not be the same to the bit
sys.path.insert(0, str(Path(__file__).parents[1]))

import adapters
import pytest
import torch
import transformers
from helpers import DEVICE, make_chat_model, tiny_model

if DEVICE.type not in ("cpu", "cuda") or DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.exit(f"TEST_DEVICE={DEVICE}: use cpu, or cuda with a GPU", returncode=1)
transformers.utils.logging.disable_progress_bar()


class OnDevice(torch.overrides.TorchFunctionMode):
    """Make the tensors of tests on DEVICE: one that the code makes without device= then fails."""

    makers = {
        torch.arange,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.tensor,
        torch.zeros,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        here = Path(sys._getframe(1).f_code.co_filename).parent == Path(__file__).parent
        device = {"device": DEVICE} if function in self.makers and here else {}
        return function(*args, **device | (kwargs or {}))


@pytest.fixture(autouse=True)
def on_device():
    with OnDevice() if DEVICE.type != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(params=["llama", "gpt2", "gemma3", "opt"])
def any_model(request):
    """Models of rotary positions, absolute ones, sliding windows, absolute ones with an offset."""
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A Qwen2-shaped model folder with a BPE tokenizer and a chat template."""
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def story_file(tmp_path_factory):
    """Twelve problems in the format of GSM8K, written for these tests."""
    path = tmp_path_factory.mktemp("problems") / "stories.jsonl"
    lines = []
    for n, m in itertools.product((2, 5, 9), (1, 2, 4, 7)):
        question = f"Ada has {n} pens and buys {m} boxes with 3 pens each. How many has she now?"
        work = f"She buys 3*{m} = <<3*{m}={3 * m}>>{3 * m} pens.\nNow she has {n + 3 * m} pens.\n"
        lines.append(json.dumps({"question": question, "answer": f"{work}#### {n + 3 * m}"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def prompts():
    """Three prompts of 2, 4 and 5 tokens, padded on the left: ids and mask, both (3, 5)."""
    ids = torch.tensor([[0, 0, 0, 5, 6], [0, 7, 8, 9, 10], [11, 12, 13, 14, 15]])
    return ids, (ids > 0).long()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by `-m slow` only")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Print below a failure what the functions that the test calls have to do: adapters.py. In a
    fork of make_assignment.py, a test is skipped that meets a function which is still blank.
    """
    report = (yield).get_result()
    # Not the whole report: it quotes the test, and tests that speak of blanks could never fail.
    raised = call.excinfo and not isinstance(call.excinfo.value, AssertionError)
    seen = str(call.excinfo.value) if raised else report.capstdout  # doctest prints what was raised
    if report.failed and (blank := re.search(r"\w+ is yours to write", seen)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"Skipped: {blank[0]}")
    if report.failed:
        source = inspect.getsource(item.function)
        for name in re.findall(r"\b(\w+)\(", source):  # helpers of the same file may call them, too
            helper = getattr(item.module, name, None)
            if inspect.isfunction(helper) and helper.__module__ == item.module.__name__:
                source += inspect.getsource(helper)
        for name, function in inspect.getmembers(adapters, inspect.isfunction):
            if re.search(rf"\b{name}\(", source):
                report.sections.append((f"the contract of {name}", inspect.getdoc(function)))
