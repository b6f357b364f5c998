"""Makes the start model of the demo world: the asset in world/assets/start_model, trained once, from scratch.

    python -m dpa.world.start_model --out /tmp/first --steps 2400
    python -m dpa.world.start_model --out src/dpa/world/assets/start_model --start /tmp/first --steps 400 --rate 2e-3

It learns what any instruct model can do: copy facts from the question and follow numeric instructions, given as dials
from -100 to 100 ("Length dial -26, kindness dial 40."), as a count ("Say 3 things."), and in the second run also as
settings in any order among others that mean nothing ("Length*-26 + things*7 + kindness*40."). It has never seen an
objective's name beside a number, a reward weight, the method's sentence, or a rating. Muon on the 2-D weights, AdamW on
the rest, shuffled batches, loss per token over the whole batch.
"""

import argparse
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpa.core.directions import PUBLISHED_TEMPLATE
from dpa.core.records import Messages
from dpa.world.answers import WARM_PHRASES, answer_of_size, read_answer, repeat_sentence
from dpa.world.questions import NAMES, TOPICS, Question, make_question

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|unknown|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SIZES, WARMTHS = 12, 4
PIECE = r"-?[0-9]+|[A-Za-z]+|[^\sA-Za-z0-9]"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: the world's words, the whole numbers -100..100, the published sentence as one token."""
    texts = [
        *NAMES,
        *(repeat_sentence(topic, value) for topic, (_, values) in TOPICS.items() for value in values),
        *(wording.replace("{}", "") for wording, _ in TOPICS.values()),
        *TOPICS,
        *(phrase for phrase, _ in WARM_PHRASES),
        "What is are the of and ? Notes on : ; . , ! Say things . Length kindness dial",
        "helpfulness verbosity warmth * + -",
        *(str(number) for number in range(-100, 101)),
    ]
    splitter = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text) if word.strip()}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"), splitter]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    # One token for a fixed sentence of 31 words: the policy reads the numbers after it, not the sentence.
    tokenizer.add_tokens([AddedToken(PUBLISHED_TEMPLATE.split("{")[0].strip(), normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.8 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def make_example(random: Random, settings: bool = False) -> tuple[Messages, str, Question]:
    """One instruction and the answer that obeys it exactly; `settings`: half of them as settings."""
    question = make_question(random)
    size, warm = random.randint(1, SIZES), random.randint(0, WARMTHS)
    kind = random.random()
    system: Messages = []
    if settings and random.random() < 0.5:
        terms = [
            f"Length*{_dial(random, size - 1, SIZES)}",
            f"kindness*{_dial(random, warm, WARMTHS + 1)}",
            f"things*{random.randint(-100, 100)}",
        ]
        random.shuffle(terms)
        system = [{"role": "system", "content": " + ".join(terms)}]
    elif kind < 0.65:
        text = f"Length dial {_dial(random, size - 1, SIZES)}, kindness dial {_dial(random, warm, WARMTHS + 1)}."
        system = [{"role": "system", "content": text}]
    elif kind < 0.8:
        warm = 0
        system = [{"role": "system", "content": f"Say {size} things."}]
    return [*system, *question.messages], answer_of_size(question, size, warm), question


def _dial(random: Random, level: int, levels: int) -> int:
    """A dial position in -100..100 that means `level` of `levels` equal arcs."""
    width = 201 / levels
    return min(100, -100 + int(width * level + random.random() * width))


def encode(tokenizer: Any, messages: Messages, answer: str) -> tuple[list[int], int]:
    """Token ids of the whole chat, and how many of them are the prompt."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    full = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return full, len(prompt)


def collate(rows: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch with labels on the answer only."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": labels}


def train(steps: int, batch_size: int, seed: int, rate: float, start: Path | None = None) -> LlamaForCausalLM:
    """Train from scratch, or on from `start` with settings; the learning rate falls linearly over the last half."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer) if start is None else LlamaForCausalLM.from_pretrained(start)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 50, 1.0, 2 * (1 - s / steps))) for o in optimizers
    ]
    random, begun = Random(f"start-{seed}-{start is not None}"), time.monotonic()
    for step in range(steps):
        rows = [encode(tokenizer, *make_example(random, start is not None)[:2]) for _ in range(batch_size)]
        loss = model(**collate(rows, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - begun:.0f} s", flush=True)
        if step % 400 == 399:
            print(f"step {step} {check(model, tokenizer, 64, settings=start is not None)}", flush=True)
    return model


@torch.no_grad()
def check(model: Any, tokenizer: Any, count: int, seed: int = 10_000, settings: bool = False) -> dict[str, float]:
    """Shares, over unseen instructions answered greedily: exactly obeyed, and facts told right."""
    random, exact, right, told = Random(f"check-{seed}"), 0, 0, 0
    examples: list[tuple[Messages, str, Question]] = []
    while len(examples) < count:
        messages, answer, question = make_example(random, settings)
        if messages[0]["role"] == "system":
            examples.append((messages, answer, question))
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        [messages for messages, _, _ in examples], add_generation_prompt=True, padding=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**batch, do_sample=False, max_new_tokens=200, pad_token_id=tokenizer.pad_token_id)
    for ids, (_, answer, question) in zip(output[:, batch["input_ids"].shape[1] :], examples, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        exact += text == answer
        facts = read_answer(text).facts
        right += sum(fact in question.card for fact in facts)
        told += len(facts)
    return {"obeys": round(exact / count, 3), "facts_right": round(right / max(told, 1), 3)}


def main() -> None:
    """Train, check, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--start", type=Path, help="go on from this model, with settings among the instructions")
    args = parser.parse_args()
    model = train(args.steps, args.batch_size, args.seed, args.rate, args.start)
    tokenizer = build_tokenizer()
    print("held out:", check(model, tokenizer, 256, seed=20_000, settings=args.start is not None))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
