"""Small random models, and short runs. By hand, to try train.py on a model without a download:

python tests/helpers.py FOLDER TEXTS.jsonl    Qwen2's shape; a tokenizer trained on TEXTS
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import reward
import train
from eval import pick_device
from reward import load_reward

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))  # of test_objective and test_sampling

# A run of seconds: three questions, four held-out problems, no warm-up.
SHORT = (
    "--sft-steps 0 --steps 2 --questions 3 --group-size 4 --eval-limit 4 --eval-samples 2 "
    "--eval-every 0 --show-every 0 --lr-warmup 0 --threads 1"
)
SIZE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "gpt2": lambda: GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "cohere": lambda: CohereConfig(**SIZE, logit_scale=0.25),
    "gemma2": lambda: Gemma2Config(
        **SIZE, head_dim=8, final_logit_softcapping=5.0, sliding_window=6
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZE, head_dim=8, sliding_window=6, tie_word_embeddings=False
    ),
    "opt": lambda: OPTConfig(**SIZE, ffn_dim=48),
}


def tiny_model(name):
    """Make a random model of a few thousand parameters, whose next tokens are far from uniform."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(DEVICE)


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "Ada has 9 pens and buys 4 more boxes with 3 pens each. How many pens has she now?",
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Now she has 21 pens.",
]


def make_chat_model(folder, texts=TEXTS, chat_template=CHAT_TEMPLATE, **config):
    """Save a small Qwen2-shaped model and a BPE tokenizer trained on `texts`. Returns the path."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(Qwen2Config(**size | config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def short_run(out, *flags, reward=None, log=None, bf16=False):
    """Train the built-in model by train.train for a moment, with plain arguments and no main.

    flags: options of train.py, on top of SHORT. reward: any function; None: that of the flags.
    log: takes the row of each step. Returns (rows, policy): what was logged, and the model.
    """
    config = train.parse_config([*SHORT.split(), *" ".join(flags).split()])
    device, _ = pick_device("cpu", config.threads)
    policy, tokenizer = train.make_tiny_model(config.seed, device)
    problems, worked, held_out = train.gather_problems(config, policy, tokenizer)
    reward = reward or load_reward(config.reward)
    rows = []

    def keep(row):
        rows.append(dict(row))
        if log:
            log(row)

    out.mkdir(parents=True, exist_ok=True)
    train.train(policy, tokenizer, problems, worked, held_out, reward, config, out, keep, bf16)
    return rows, policy


def parity_reward(prompts, completions, answer):
    """A reward that an untaught model earns half of the time: 1.0 for texts of odd length."""
    return [float(len(text) % 2) for text in completions]


def forget():
    """Empty the caches of the grader."""
    for function in vars(reward).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


if __name__ == "__main__":
    print(make_chat_model(sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()))
