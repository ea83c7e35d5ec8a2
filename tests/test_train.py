"""Training: whole steps against a naive loop, the parts of a step, and the files of a run."""

import contextlib
import copy
import io
import itertools
import json
import math
import random
import time
import zlib
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from adapters import STD_EPSILON, bf16_weights, token_logprobs
from helpers import make_chat_model, parity_reward
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import eval as evaluation
import train
from eval import Problem, build_prompt, load_model, pick_device, sample_problems

FLAGS = (
    "--questions 3 --group-size 4 --max-new-tokens 12 --steps 2 --sft-steps 0 --lr 3e-3 "
    "--lr-warmup 0 --lr-end 1 --eval-every 0 --show-every 0 --threads 1"
)
SUMS = "7+5-4+3=11 1+2+3+4=10 9-3-2+1-4=1 8+4-6-5=1 2+9-7+3-1=6 6-5+8+2=11"
PROBLEMS = [Problem(*text.split("="), solution=text) for text in SUMS.split()]
CLOCK = {"eval", "seconds", "tok_s", "t_sample", "t_reward", "t_ref", "t_update"}
GAPS = {"gap", "gap_999", "gap_max"}


def settings(*flags):
    return train.parse_config([*FLAGS.split(), *" ".join(flags).split()])


def tiny():
    """Make the built-in model, untaught. At one token in ten it ends: some rows do, some do not."""
    policy, tokenizer = train.make_tiny_model(0, torch.device("cpu"))
    policy.config.eos_token_id = list(range(1, 12))
    return policy, tokenizer


def run(out, *flags, reward=parity_reward, policy=None, bf16=False):
    """Train on PROBLEMS without evaluation. Returns (rows, policy, states of the checkpoint)."""
    config = settings(*flags)
    pick_device("cpu", config.threads)
    made, tokenizer = tiny()
    policy = policy or made
    rows = []
    out.mkdir(exist_ok=True)
    train.train(policy, tokenizer, PROBLEMS, [], {}, reward, config, out, rows.append, bf16)
    return rows, policy, torch.load(out / "checkpoint.pt", weights_only=True)["states"]


def flat(model):
    """Copy all weights of a model into one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- Whole steps against a naive loop -----------------------------------------------------------


def full_logp(model, prompt, completion, T):
    """Compute the log-probs of the whole vocabulary at each token, without padding or cache."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / T
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]  # (tokens, V)


def naive_step(policy, adam, lr, max_norm):
    """Clip the gradient, and move the weights. Returns the norm of the gradient before."""
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
    for p in policy.parameters():
        p.grad *= min(1.0, max_norm / norm)
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad()
    return norm


def naive_update(policy, reference, rows, old, config):
    """Compute the gradient from rows of (prompt, completion, A, weight). Returns numbers to log.

    old: {(row, token): log-prob}, filled in by the first update.
    """
    log = dict.fromkeys(("loss", "kl", "clip_share", "entropy"), 0.0)
    total = sum(len(completion) * weight for _, completion, _, weight in rows)
    for i, (prompt, completion, A, weight) in enumerate(rows):
        logps = full_logp(policy, prompt, completion, config.temperature)
        refs = full_logp(reference, prompt, completion, config.temperature).detach()
        loss = torch.tensor(0.0)
        for t, token in enumerate(completion):
            logp = logps[t, token]
            ratio = (logp - old.setdefault((i, t), logp.item())).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            surrogate = min(ratio * A, clipped * A)
            log_r = refs[t, token] - logp
            kl = log_r.exp() - log_r - 1
            loss = loss - weight * (surrogate - config.kl_beta * kl)
            log["clip_share"] += weight / total * (surrogate < ratio * A).item()
            log["kl"] += weight / total * kl.item()
            log["entropy"] -= weight / total * (logps[t].exp() * logps[t]).sum().item()
        loss.backward()
        log["loss"] += loss.item()
    return log


def naive_rows(prompts, samples, rewards, config):
    """Give each completion its advantage, and each of its tokens a weight."""
    completions = [ids[mask].tolist() for ids, mask in zip(*samples[:2], strict=True)]
    left = [not (config.mask_truncated and cut) for cut in samples.truncated]
    tokens = sum(len(ids) for ids, stays in zip(completions, left, strict=True) if stays)
    rows = []
    for i, ids in enumerate(completions):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        scale = stdev(group) + STD_EPSILON if config.scale_rewards == "std" else 1.0
        count = {"sequence": sum(left) * len(ids), "token": tokens, "constant": sum(left) * 12}
        weight = left[i] / count[config.aggregate]
        rows.append((prompts[i], ids, (rewards[i] - fmean(group)) / scale, weight))
    return rows


def thirds_reward(prompts, completions, answer):
    """Earn 0, 1 or 2: in a group of 0, 1, 1 and 2 the middle has an advantage of 0."""
    return [float(len(text) % 3) for text in completions]


def naive_steps(policy, tokenizer, config, rates):
    """Do as train.train does with mu = 2, the slow way. Yields the rows of the log."""
    deck = random.Random(f"{config.seed} 0").sample(PROBLEMS, 6)
    adam = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, foreach=False)
    for step, lr in enumerate(rates):
        if step % config.steps == 0:
            reference = copy.deepcopy(policy)
        set_seed(zlib.crc32(f"{config.seed} {step}".encode()))
        asked = deck[3 * step : 3 * step + 3]
        *_, samples, texts = sample_problems(policy, tokenizer, asked, 4, 12, config.temperature)
        prompts = [build_prompt(tokenizer, problem) for problem in asked for _ in range(4)]
        rewards = thirds_reward(None, texts, None)
        rows = naive_rows(prompts, samples, rewards, config)
        old = {}
        logs = []
        for _ in range(2):
            logs.append(naive_update(policy, reference, rows, old, config))
            logs[-1]["grad_norm"] = naive_step(policy, adam, lr, config.max_grad_norm)
        row = {name: fmean((logs[0][name], logs[1][name])) for name in logs[0]}
        row |= {"step": step + 1, "iteration": step // config.steps, "lr": lr}
        row |= {"entropy": logs[0]["entropy"], "truncated": fmean(samples.truncated.tolist())}
        row |= {"reward": fmean(rewards), "length": fmean(len(row[1]) for row in rows)}
        row["zero_var"] = fmean(len(set(rewards[i : i + 4])) == 1 for i in (0, 4, 8))
        yield row


@pytest.mark.parametrize(
    "flags, rates",
    [
        ("--aggregate sequence --steps 2 --lr-end 0.5 --micro-tokens 1", [3e-3, 1.5e-3]),
        # The schedule goes on through two iterations; each has a reference of its own.
        ("--aggregate token --iterations 2 --steps 1 --lr-warmup 3", [1e-3, 2e-3]),
        ("--aggregate constant --mask-truncated --scale-rewards none", [3e-3, 3e-3]),
    ],
)
def test_two_steps_equal_a_naive_loop(flags, rates, tmp_path):
    """In double precision, but for advantages and weights of tokens, which are float32."""
    flags = "--mu 2 --kl-beta 0.3 --clip-low 0.05 --clip-high 0.1 --max-grad-norm 0.3 " + flags
    flags = "--seed 3 --temperature 0.8 --micro-tokens 80 " + flags  # 1 to 4 rows together
    policy, tokenizer = tiny()
    naive = copy.deepcopy(policy.double())
    start = flat(policy)
    rows, _, _ = run(tmp_path, flags, policy=policy, reward=thirds_reward)
    expected = naive_steps(naive, tokenizer, settings(flags), rates)
    for row, wanted in zip(rows[1:], expected, strict=True):
        assert row.keys() - CLOCK - GAPS == wanted.keys()
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert max(row[name] for name in GAPS) < 1e-9
        assert row["clip_share"] > 0.01 and row["kl"] > 1e-3 and row["grad_norm"] > 0.3
        assert 0 < row["truncated"] < 1
    assert 0 < rows[1]["zero_var"] < 1
    assert (flat(policy) - flat(naive)).norm() < 1e-3 * (flat(naive) - start).norm()


def test_the_warm_up_is_cross_entropy_per_token_at_temperature_one(tmp_path):
    """The rate rises for 2 of 22 steps and falls to 0; texts have 3 to 11 characters, and EOS."""
    flags = "--sft-steps 22 --sft-lr 0.01 --max-grad-norm 0.5"
    config = settings(flags, "--temperature 0.5 --micro-tokens 60")
    policy, tokenizer = tiny()
    naive = copy.deepcopy(policy.double())
    start = flat(policy)
    worked = [row._replace(solution=row.solution[: 3 + 2 * i]) for i, row in enumerate(PROBLEMS)]
    train.warm_up(policy, tokenizer, worked, config, tmp_path, contextlib.nullcontext())
    adam = torch.optim.AdamW(naive.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for lr in [0.005, 0.01, *(0.01 * (1 - step / 19) for step in range(20))]:
        logps = []
        for row in worked:
            ids = [*tokenizer(row.solution).input_ids, tokenizer.eos_token_id]
            logp = full_logp(naive, build_prompt(tokenizer, row), ids, 1.0)
            logps += [logp[t, token] for t, token in enumerate(ids)]
        (-sum(logps) / len(logps)).backward()
        norms.append(naive_step(naive, adam, lr, 0.5))
    assert max(norms) > 0.5
    assert (flat(policy) - flat(naive)).norm() < 1e-3 * (flat(naive) - start).norm()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float64)
    assert torch.equal(flat(saved), flat(policy))


# --- Parts of a step, and Algorithm 1 -----------------------------------------------------------


def one_batch(*flags, reward=parity_reward):
    """Sample a batch of three questions. Returns (policy, batch, numbers to log, settings)."""
    config = settings("--kl-beta 0", *flags)
    policy, tokenizer = tiny()
    torch.manual_seed(0)
    batch, _, stats = train.sample_batch(policy, tokenizer, PROBLEMS[:3], reward, config)
    return policy, batch, stats, config


def update(policy, batch, config, lr=0.0):
    """Do train.update by plain gradient steps. Returns the numbers to log."""
    sgd = torch.optim.SGD(policy.parameters(), lr=1.0)
    return train.update(policy, sgd, batch, config, lr, contextlib.nullcontext())


def test_learning_rate_rises_and_falls_linearly():
    rates = [train.learning_rate(step, 12, 1.0, 4, 0.5) for step in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1 - 0.5 * i / 7 for i in range(8)])
    assert [train.learning_rate(step, 3, 2.0, 0, 1.0) for step in range(3)] == [2.0, 2.0, 2.0]


def test_one_small_step_moves_nearly_all_weights(chat_folder, tmp_path):
    """A folder in bf16 is trained in float32: in bf16, a step of 1e-6 is rounded away."""
    saved = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(tmp_path)
    policy, tokenizer = load_model(str(tmp_path), torch.device("cpu"))
    config = settings("--kl-beta 0")
    batch, *_ = train.sample_batch(policy, tokenizer, PROBLEMS[:3], parity_reward, config)
    moved = []
    for model in (policy, bf16_weights(copy.deepcopy(policy))):
        before = flat(model)
        adam = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        train.update(model, adam, batch, config, 1e-6, contextlib.nullcontext())
        moved.append((flat(model) != before).float().mean().item())
    assert moved[0] > 0.9 and moved[1] < 0.5


def test_each_completion_is_scored_with_its_own_gold():
    """Question-major: the four completions of the first question, then those of the second."""
    seen = []

    def reward(prompts, completions, answer):
        time.sleep(0.3)
        seen.extend(zip(prompts, answer, strict=True))
        return [0, 1, 1, 2] + [5, 5, 5, 5] + [8, 8, 10, 10]

    started = time.perf_counter()
    _, batch, stats, _ = one_batch(reward=reward)
    seconds = time.perf_counter() - started
    assert seen == [row[:2] for row in PROBLEMS[:3] for _ in range(4)]
    # Mean 1, std sqrt(2/3); equal; mean 9, std sqrt(4/3).
    expected = torch.tensor([-1.2247, 0, 0, 1.2247, 0, 0, 0, 0, -0.866, -0.866, 0.866, 0.866])
    torch.testing.assert_close(batch.advantages[:, 0], expected, rtol=0, atol=1e-3)
    assert (stats["reward"], stats["zero_var"]) == (5.0, pytest.approx(1 / 3))
    assert 0.29 < stats["t_reward"] < seconds - stats["t_sample"]


def test_rewards_that_float32_cannot_tell_apart_still_teach():
    def reward(prompts, completions, answer):
        return [1e8 + number for number in parity_reward(prompts, completions, answer)]

    plain = one_batch()[1]
    _, batch, stats, _ = one_batch(reward=reward)
    assert stats["zero_var"] < 1
    assert torch.allclose(batch.advantages, plain.advantages, atol=1e-3)
    assert one_batch("--supervision process", reward=reward)[2]["zero_var"] < 1


def test_old_logprobs_stay_those_before_the_first_update():
    """With mu = 3. What the sampler said is only logged: off by 0.1, twice by 1.1 and 2.1."""
    policy, batch, _, config = one_batch("--mu 3 --group-size 64 --micro-tokens 2000")
    assert 1000 < batch.mask.sum() < 2000  # so that 0.999 of them are all but one
    before, _ = token_logprobs(policy, *batch[:4], 1.0)
    batch.logp_old[batch.mask] -= 0.1
    for i, place in enumerate(batch.mask.nonzero()[[100, 200]].tolist(), start=1):
        batch.logp_old[tuple(place)] -= i
    stats = update(policy, batch, config, lr=0.5)
    torch.testing.assert_close(batch.logp_old, before.detach(), rtol=0, atol=1e-4)
    assert stats["gap"] == pytest.approx(0.1 + 3 / batch.mask.sum().item(), abs=1e-4)
    assert (stats["gap_999"], stats["gap_max"]) == pytest.approx((1.1, 2.1), abs=1e-4)
    assert 0 < stats["clip_share"] < 0.9


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_gradient_that_is_not_finite_stops_and_leaves_the_weights(value):
    policy, batch, _, config = one_batch()
    before = flat(policy)
    batch = batch._replace(advantages=torch.full_like(batch.advantages, value))
    with pytest.raises(FloatingPointError, match="the gradient is inf or nan: try a lower"):
        update(policy, batch, config, lr=0.1)
    assert torch.equal(flat(policy), before)


def test_the_reference_is_the_policy_at_the_start_of_each_iteration(tmp_path):
    """On a CPU the KL is exactly 0 there, and not in between. The same seed gives the same bits."""
    flags = "--steps 3 --iterations 2"
    rows, policy, _ = run(tmp_path / "a", flags)
    assert [row["kl"] == 0.0 for row in rows[1:]] == [True, False, False, True, False, False]
    assert torch.equal(flat(policy), flat(run(tmp_path / "b", flags)[1]))
    assert not torch.equal(flat(policy), flat(run(tmp_path / "c", flags, "--seed 1")[1]))


def test_the_bf16_path(tmp_path):
    """As on a GPU: the policy stays float32; what samples, and the reference, are bf16 copies."""
    policy, _ = tiny()
    dtypes = set()
    policy.register_forward_pre_hook(lambda model, _: dtypes.add(model.dtype))  # copies keep it
    flags = "--steps 3 --iterations 2 --lr 2e-2 --save-every 1"
    rows, _, states = run(tmp_path / "a", flags, policy=policy, bf16=True)
    assert dtypes == {torch.bfloat16} == {weight.dtype for weight in states["reference"].values()}
    assert policy.dtype == states["policy"]["lm_head.weight"].dtype == torch.float32
    assert not torch.equal(flat(policy), flat(policy).bfloat16().float())
    assert all(0 < row["gap"] < 0.1 for row in rows[1:])  # the copy is renewed at every step
    kl = [row["kl"] for row in rows[1:]]
    assert max(kl[0], kl[3]) < 1e-3 < 1e-2 < min(kl[2], kl[5])


@pytest.mark.parametrize("source", ["reference", "policy"])
def test_rft_samples_from_the_reference_and_online_rft_from_the_policy(source, tmp_path):
    """RFT knows no ratio: nothing is clipped, even in a second pass. Both pay the bare reward."""
    policy, _ = tiny()
    authors = set()
    policy.register_forward_pre_hook(
        lambda model, _: authors.add(model.lm_head.weight.sum().item())
    )
    flags = f"--advantage indicator --kl-beta 0 --sample-from {source} --steps 3 --mu 2"
    rows, _, states = run(tmp_path, flags, "--clip-high 0", policy=policy)
    assert len(authors) == (1 if source == "reference" else 3)
    assert [row["clip_share"] > 0 for row in rows[1:]] == [source == "policy"] * 3
    assert ("reference" in states) == (source == "reference")  # --kl-beta 0 alone needs none
    assert set(one_batch(flags)[1].advantages.unique().tolist()) == {0.0, 1.0}


def test_shuffle_gives_every_problem_once_per_epoch():
    deck = list(itertools.islice(train.shuffle(range(9), 0), 27))
    assert [sorted(deck[i : i + 9]) for i in (0, 9, 18)] == [list(range(9))] * 3
    assert deck[:9] != deck[9:18] != deck[18:]
    assert deck[:9] != list(itertools.islice(train.shuffle(range(9), 1), 9))


def test_a_tenth_of_a_file_is_held_out(tmp_path):
    """Of 40 lines, each question twice, 4 are held out, and not trained on in the copy either."""
    path = tmp_path / "own.jsonl"
    lines = [{"question": f"{i % 20}+1", "answer": f"so\n#### {i % 20 + 1}"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    held_out = []
    for flags in ("--seed 0", "--seed 1", "--eval-limit 3"):
        config = settings(f"--model m --problems {path}", flags)
        problems, worked, sets = train.gather_problems(config, *tiny())
        hidden = {problem.question for problem in sets["in"]}
        asked = {problem.question for problem in problems}
        assert len(asked) + len(hidden) == len(asked | hidden) == 20
        assert problems == worked and len(problems) == 40 - 2 * len(hidden)
        held_out.append(sets["in"])
    assert held_out[0] == held_out[1] and [len(rows) for rows in held_out] == [4, 4, 3]


# --- The files of a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, story_file):
    """Run train.main once, from a folder whose generation_config is hostile."""
    folder = tmp_path_factory.mktemp("whole")
    eos = list(range(0, 280, 20))  # one token in twenty ends: some rows do, some do not
    make_chat_model(folder / "model", eos_token_id=eos)
    hostile = {"top_k": 1, "temperature": 0.01, "repetition_penalty": 9.0}
    (folder / "model" / "generation_config.json").write_text(json.dumps(hostile))
    reward = "def odd(prompts, completions, answer):\n    return [len(x) % 2 for x in completions]"
    (folder / "own.py").write_text(reward)
    flags = (
        f"{FLAGS} --model {folder}/model --problems {story_file} --reward {folder}/own.py:odd "
        f"--steps 3 --eval-problems arithmetic,{story_file} --eval-every 2 "
        f"--eval-limit 4 --device cpu --out {folder}/run"
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(flags.split())
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return folder / "run", flags.split(), summary, printed.getvalue()


def test_a_run_leaves_complete_files_and_a_summary(whole_run):
    out, argv, summary, printed = whole_run
    run = json.loads((out / "run.json").read_text())
    assert run.keys() == {"command", "config", "conditions"}
    assert run["command"] == ["train.py", *argv]
    assert run["config"] == summary["config"] == vars(train.parse_config(argv))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "eval" in row) for row in rows[:3]] == [(0, True), (1, False), (2, True)]
    for row in rows[1:]:
        assert (CLOCK | GAPS | train.COLUMNS.keys()) - row.keys() <= {"eval", "right", "agree"}
        assert row["gap"] < 1e-4 and row["entropy"] > 1 and 0 < row["truncated"] < 1
    warnings = printed.count("of the completions hit the limit: raise --max-new-tokens?")
    assert warnings == sum(row["truncated"] > 0.5 for row in rows[1:])
    assert list(summary["after"])[:2] == ["arithmetic in", "arithmetic out"]
    assert len(summary["after"]) == 3 == len(summary["before"])
    assert summary.keys() == {"before", "after", "seconds", "seed", "config"}
    assert (summary["before"], summary["after"]) == (rows[0]["eval"], rows[-1]["eval"])
    assert summary["seconds"] == rows[-1]["seconds"] > rows[0]["seconds"] > 0
    *_, last, told, evaluate, ask = printed.splitlines()
    name, scores = list(summary["after"].items())[-1]
    low, high = scores["pass@8_interval"]
    assert last.startswith(name)
    assert last.endswith(f" -> {scores['pass@8']:.3f} ({low:.3f} - {high:.3f})")
    assert told.startswith(f"{summary['seconds']:.0f} s. The model is in {out};")
    assert evaluate == f"  python eval.py --model {out}" and ask == f"{evaluate} --ask 7+5-4"


def test_a_run_is_a_model_folder(whole_run, tmp_path):
    """It loads anywhere; and eval.py finds what the run found, by the settings in run.json."""
    out, _, summary, _ = whole_run
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(out).chat_template
    saved = json.loads((out / "generation_config.json").read_text())
    assert not saved.keys() & {"top_k", "temperature", "repetition_penalty"}
    assert len(saved["eos_token_id"]) > 2
    path = tmp_path / "eval.json"
    evaluation.main(f"--model {out} --limit 4 --device cpu --out {path}".split())
    scores = json.loads(path.read_text())["scores"]
    assert scores == summary["after"]["arithmetic in"] and 0 < scores["sampled_truncated"] < 1


def test_runs_take_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("arithmetic-5", "arithmetic-5-2", "arithmetic-5-3"):
        assert train.choose_folder(settings("--seed 5")) == Path("runs", name)
        Path("runs", name).mkdir(parents=True)


def test_defaults_for_real_models_are_the_papers():
    config = train.parse_config(["--model", "somewhere"])
    assert config == train.Config(model="somewhere")
    assert (config.lr, config.kl_beta, config.mu, config.reward_lr) == (1e-6, 0.04, 1, 2e-5)
    assert vars(train.parse_config([])) == vars(train.Config()) | train.BUILTIN
