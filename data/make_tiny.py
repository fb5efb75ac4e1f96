"""Writes the four miniature tasks (data/*.jsonl) and pre-trains the tiny base model (data/tiny/).

    python data/make_tiny.py     # rebuilds this; ten minutes on one core

RL can only sharpen what the base model sometimes does. So it is **diverse and half right**:
prompts of its corpus have many right answers, some far more popular (Zipf), and 30-50 % wrong,
as those of real models. Test prompts combine parts anew, hard ones rare parts.
"""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.tasks import WORDS

w = SimpleNamespace(**WORDS)

SEED, STEPS, LR = 0, 1500, 3e-3
SHARE = dict(instruct=10, summarize=72, story=24, reason=44)  # responses per step


def zipf(rng, items, skew=1.2):
    """One of them, the i-th with a weight of 1 / (i + 1)^skew."""
    return rng.choices(items, [1 / (i + 1) ** skew for i in range(len(items))])[0]


def task_row(prompt, answer, test, hard=False):
    return {"prompt": prompt, "answer": answer,
            "split": "hard" if hard else "test" if test else "train"}


# ---- instruct
LINES = (HERE / "categories.txt").read_text("utf-8").splitlines()
CATEGORIES = {category: members.split() for category, members in (x.split(": ") for x in LINES)}


def instruct_rows():
    """Every third category is hard: three verbs test it, one or two train it."""
    for c, (category, names) in enumerate(CATEGORIES.items()):
        hard, others = c % 3 == 2, 1 + c // 3 % 2
        for v, verb in enumerate(w.ask):
            if not hard or v < 3 + others:
                yield task_row(f"{verb} {category}", names, not hard and v == c % 6,
                               hard and v < 3)


def instruct_answer(rng, row):
    mistake = rng.random()
    if mistake < 0.30:  # a wrong fact: something of another category
        return zipf(rng, rng.choice(list(CATEGORIES.values())))
    right = zipf(rng, row["answer"])
    if mistake < 0.45:  # cannot stop: a second one
        return f"{right} {zipf(rng, row['answer'])}"
    return right


# ---- summarize
WEATHER = dict(
    rain="it rained all day", cold="it was very cold", wind="there was a strong wind",
    heat="the sun was burning", crowd="the streets were full")


def summarize_rows(rng, count):
    for i in range(count):
        who, friend = rng.sample(w.names, 2)
        facts = dict(
            who=who, what=rng.choice(w.things), color=rng.choice(w.colors),
            where=rng.choice(w.shops), when=rng.choice(w.days), weather=rng.choice(list(WEATHER)))
        story = [
            f"on {facts['when']} {who} went to the {facts['where']}",
            f"{friend} stayed at home",
            f"{who} {rng.choice(w.bought)} a {facts['color']} {facts['what']} there",
        ]
        story.insert(rng.randrange(4), WEATHER[facts["weather"]])
        yield {"prompt": "summarize : " + " . ".join(story) + " .", "answer": facts}


def summary(rng, who, what, color, where, when, weather):
    """A right phrasing."""
    thing = f"a {color} {what}" if rng.random() < 0.4 else f"a {what}"
    day = f"on {when}" if rng.random() < 0.4 else ""
    despite = f"despite the {weather}" if rng.random() < 0.4 else ""
    place = f"{zipf(rng, ['at', 'in'])} the {where}"
    verb, form = zipf(rng, w.bought), zipf(rng, range(4))
    if rng.random() < 0.7:
        core = f"{who} {verb} {thing}"
    else:
        core = f"{thing} was {'bought' if verb == 'got' else verb} by {who}"
    parts = [
        [core, place, day, despite],
        [f"{place} ,", core, day, despite],
        [day and f"{day} ,", core, place, despite],
        [despite and f"{despite} ,", core, place, day],
    ][form]
    return " ".join(x for x in parts if x) + " ."


def summarize_answer(rng, row):
    facts, mistake = dict(row["answer"]), rng.random()
    if mistake < 0.06:
        facts["who"] = rng.choice(w.names)
    elif mistake < 0.12:
        facts["where"] = rng.choice(w.shops)
    text = summary(rng, **facts)
    if 0.12 < mistake < 0.26:  # drops the place
        for preposition in "at", "in":
            text = text.replace(f" {preposition} the {facts['where']}", "")
    if 0.26 < mistake < 0.42:  # invents a detail
        text = text[:-1] + rng.choice(["and went home .", "and paid too much .", "for a friend ."])
    return text


# ---- story
def story_rows():
    for i, subject in enumerate(w.subjects):
        for j, place in enumerate(w.places):
            a, b = (subject, place) if (i + j) % 2 else (place, subject)
            prompt = f"tell a story with {a} and {b}"
            yield task_row(prompt, [subject, place], (i * 7 + j * 3) % 16 == 0)


def story_answer(rng, row):
    def perhaps(chance, words):
        return [zipf(rng, words)] if rng.random() < chance else []

    (subject, place), mistake = row["answer"], rng.random()
    if mistake < 0.10:
        subject = rng.choice(w.subjects)
    elif mistake < 0.20:
        place = rng.choice(w.places)
    words = ["the", *perhaps(0.7, w.adjectives), subject, zipf(rng, w.verbs)]
    words += perhaps(0.4, w.adverbs)
    words += [zipf(rng, w.prepositions), "the", *perhaps(0.4, w.adjectives), place, "."]
    if 0.20 < mistake < 0.32:  # drops a word
        words.pop(rng.randrange(1, len(words) - 1))
    if 0.32 < mistake < 0.40:  # unfinished
        words = words[:-2]
    if 0.40 < mistake < 0.48:  # cannot stop
        words += words[:rng.randrange(1, 4)]
    return " ".join(words)


# ---- reason
def reason_rows():
    """Every third target is hard, too."""
    for v, verb in enumerate(w.make):
        for n in range(10, 40):
            if n % 3 or v < 4 + n // 3 % 2:
                yield task_row(f"{verb} {n}", n, n % 3 != 0 and v == n % 6,
                               n % 3 == 0 and v < 3)


def expression(rng, n):
    pairs = [(a, n // a) for a in range(2, n) if n % a == 0]
    form = zipf(rng, ["+", "-", "*", "*+"] if pairs else ["+", "-", "*+"], 0.6)
    if form == "+":  # round numbers first
        a = zipf(rng, sorted(range(1, n), key=lambda a: (a % 5, abs(a - n / 2))), 0.6)
        return [a, "+", n - a]
    if form == "-":
        b = zipf(rng, sorted(range(1, 13), key=lambda b: (b % 5, b)), 0.6)
        return [n + b, "-", b]
    if form == "*":
        a, b = rng.choice(pairs)
        return [a, "*", b]
    a, b = rng.choice([(a, b) for a in (2, 3) for b in range(2, 10) if a * b < n])
    return [a, "*", b, "+", n - a * b]


def reason_answer(rng, row):
    mistake = rng.random()
    words = expression(rng, row["answer"])
    if mistake < 0.08:  # a slip
        words[-1] += rng.choice([-1, 1])
    elif mistake < 0.20:  # unfinished
        words = words[:-1]
    elif mistake < 0.34:  # cannot stop
        words += [rng.choice("+-"), rng.randrange(1, 10)]
    elif mistake < 0.40:  # wrong operator
        words[-2] = rng.choice([o for o in "+-*" if o != words[-2]])
    return " ".join(map(str, words))


# ---- corpus
ANSWER = dict(instruct=instruct_answer, summarize=summarize_answer, story=story_answer,
              reason=reason_answer)


def for_rl(task, i, row):
    """RL sees about a hundred train rows per task, pre-training all."""
    chosen = dict(story=(i // len(w.places) + i) % 4 < 2, summarize=i % 5 != 4)
    return row["split"] != "train" or chosen.get(task, True)


def write_tasks(rng):
    """Returns {task: train rows} and all test prompts."""
    summaries = enumerate(summarize_rows(rng, 160))
    tasks = dict(
        instruct=list(instruct_rows()),
        summarize=[task_row(**row, test=i % 5 == 0) for i, row in summaries],
        story=list(story_rows()),
        reason=list(reason_rows()))
    train, test = {}, set()
    for task, rows in tasks.items():
        kept = [json.dumps(row) + "\n" for i, row in enumerate(rows) if for_rl(task, i, row)]
        (HERE / f"{task}.jsonl").write_text("".join(kept), "utf-8")
        train[task] = [row for row in rows if row["split"] == "train"]
        test |= {row["prompt"] for row in rows if row["split"] != "train"}
    return train, test


def corpus(rng, train, test):
    """(task, prompt, response), as many as training consumes. Summaries get new facts each time, so
    that it learns to copy."""
    fresh = (row for row in summarize_rows(rng, 10 ** 9) if row["prompt"] not in test)
    for task, rows in train.items():
        for _ in range(STEPS * SHARE[task]):
            row = next(fresh) if task == "summarize" else rng.choice(rows)
            yield task, row["prompt"], ANSWER[task](rng, row)


# ---- the model
def make_tokenizer(texts):
    words = sorted({word for text in texts for word in text.split()})
    words += [str(n) for n in range(100) if str(n) not in set(words)]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *words]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=128,
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} :")


def tokenized(tokenizer, pairs):
    """{task: [(prompt ids, response ids)]}"""
    by_task = {}
    for task, prompt, answer in pairs:
        prompt = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(prompt, return_dict=False)
        answer = tokenizer(answer, add_special_tokens=False).input_ids + [2]
        by_task.setdefault(task, []).append((prompt, answer))
    return by_task


def loss_of(model, batch):
    """Cross-entropy of the responses. -100 does not count: prompts, padding."""
    tokens = [torch.tensor(prompt + answer) for prompt, answer in batch]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in batch]
    tokens = pad_sequence(tokens, batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    logits = model(tokens, attention_mask=(tokens != 0).long()).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:])


def pretrain(model, by_task):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for step in tqdm(range(STEPS)):
        warmup, cosine = min(1, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LR * warmup * cosine
        # a batch of each task: equal lengths, little padding
        sum(loss_of(model, by_task[task][step * size:(step + 1) * size])
            for task, size in SHARE.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main():
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    train, test = write_tasks(rng)
    pairs = list(corpus(rng, train, test))
    tokenizer = make_tokenizer([f"{p} : {a}" for _, p, a in pairs] + list(test))
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    pretrain(model, tokenized(tokenizer, pairs))
    model.save_pretrained(HERE / "tiny")
    tokenizer.save_pretrained(HERE / "tiny")


if __name__ == "__main__":
    main()
