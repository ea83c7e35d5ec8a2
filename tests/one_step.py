"""Draw .github/one-step.svg: what one step of GRPO does to one group of completions.

    python tests/one_step.py runs/arithmetic-0/sft --question 3

The model answers one question, whose group is scored, compared and used for one update, all by
train.py's own functions. Then every token is coloured by how much its log-prob has moved.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import set_seed

import train
from eval import load_model, load_problems, pick_device
from grpo import token_logprobs
from reward import accuracy_rewards

OUT = Path(__file__).parents[1] / ".github" / "one-step.svg"
WIDTH, ROW, CHARACTER = 800, 30, 9.0  # pixels; of the picture, a line, a letter
LEFT, TOP = 20, 110  # of the first completion
REWARD, ADVANTAGE = 600, 760  # where these columns end
GREY = "#808790"  # readable on white and on black: the picture has no background of its own
FULL_COLOUR = 0.3  # nats: a token that moves by so much has the full colour


def take_step(folder, number):
    """Sample one group, and update once. Returns what `draw` takes.

    That is the problem, the tokens (N lists), N rewards, the batch, and the change of the tokens'
    log-probs (N, T).
    """
    device, _ = pick_device("cpu", 1)
    policy, tokenizer = load_model(folder, device)
    config = train.parse_config(["--kl-beta", "0"])
    problem = load_problems("arithmetic", "train")[number]
    set_seed(0)
    batch, texts, _ = train.sample_batch(policy, tokenizer, [problem], accuracy_rewards, config)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    train.update(policy, optimizer, batch, config, config.lr, contextlib.nullcontext())
    with torch.no_grad():
        logp, _ = token_logprobs(policy, *batch[:4], config.temperature, batch.question)
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch.completion_ids.tolist()]
    rewards = accuracy_rewards([""] * len(texts), texts, [problem.answer] * len(texts))
    return problem, tokens, rewards, batch, logp - batch.logp_old


def colour(change):
    """Return a colour from red (less likely) over grey to green (likelier)."""
    strength = min(1.0, abs(change) / FULL_COLOUR)
    red, green, blue = (47, 158, 68) if change > 0 else (224, 49, 49)
    mixed = [round(240 - strength * (240 - part)) for part in (red, green, blue)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def text(x, y, words, fill=GREY, anchor="start", size=15, family="sans-serif"):
    """Return a line of text as SVG."""
    style = f'fill="{fill}" text-anchor="{anchor}" font-size="{size}" font-family="{family}"'
    return f'<text x="{x:.1f}" y="{y}" {style}>{escape(words)}</text>'


def draw_completion(y, tokens, changes):
    """Return a row of coloured tokens as SVG."""
    parts = []
    x = LEFT
    for token, change in zip(tokens, changes, strict=True):
        shown = {"\n": "⏎", "<end>": "■"}.get(token, token)
        width = CHARACTER * len(shown) + 4
        box = f'x="{x:.1f}" y="{y - 17}" width="{width - 1:.1f}" height="23" rx="3"'
        parts.append(f'<rect {box} fill="{colour(change)}"/>')
        parts.append(text(x + width / 2 - 0.5, y, shown, "#111", "middle", 15, "monospace"))
        x += width
    return parts


def draw(problem, tokens, rewards, batch, changes):
    """Return the picture as SVG; the completions from the best to the worst."""
    height = TOP + ROW * len(tokens) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        text(LEFT, 28, f"1. Question: {problem.question}   (the answer is {problem.answer})"),
        text(LEFT, 56, f"2. A group of {len(tokens)} completions"),
        text(REWARD, 56, "3. Reward", anchor="end"),
        text(ADVANTAGE, 56, "4. Advantage", anchor="end"),
        text(LEFT, 80, "5. After the update: likelier tokens green, less likely ones red", size=13),
        text(ADVANTAGE, 80, "(reward - mean) / std", anchor="end", size=13),
    ]
    order = sorted(range(len(tokens)), key=lambda row: -rewards[row])
    for place, row in enumerate(order):
        y = TOP + ROW * place
        length = int(batch.mask[row].sum())
        parts += draw_completion(y, tokens[row][:length], changes[row, :length].tolist())
        parts.append(text(REWARD, y, f"{rewards[row]:.0f}", anchor="end"))
        parts.append(text(ADVANTAGE, y, f"{batch.advantages[row, 0]:+.2f}", anchor="end"))
    mean = sum(rewards) / len(rewards)
    last = f"group: mean {mean:.3f}, std {torch.tensor(rewards).std():.3f}"
    parts.append(text(ADVANTAGE, height - 10, last, anchor="end", size=13))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main():
    """Take one step with the model in a folder, and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the folder of the model after the warm-up")
    parser.add_argument("--question", type=int, default=0, help="its number in the training set")
    args = parser.parse_args()
    OUT.write_text(draw(*take_step(args.model, args.question)), encoding="utf-8")


if __name__ == "__main__":
    main()
