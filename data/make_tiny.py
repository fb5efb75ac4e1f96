"""Writes the four miniature tasks (data/*.jsonl) and pre-trains the tiny base model (data/tiny/).

    python data/make_tiny.py        # rebuilds everything, seeded; a few minutes on 2 cores

Nobody needs to run this: its output is committed. It is here because a base model is half of every RL result.
RL can only sharpen what the base model already does now and then, so the base is built to be **diverse and half
right**: it learns from a corpus in which every prompt has many right answers, some of them far more popular than
others (Zipf), and in which 30-50 % of the answers are wrong in the ways real models are wrong: a wrong fact, a
dropped word, an invented detail, an unfinished or an overlong answer. That leaves quality to gain and diversity
to lose, which is the experiment.

Test prompts appear neither in this corpus nor in RL training: each is a new combination of known parts.
"""

import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.tasks import ADJECTIVES, ADVERBS, BOUGHT, PREPOSITIONS, SUBJECTS, STORY_PLACES, VERBS  # noqa: E402

WEATHER = {"rain": "it rained all day", "cold": "it was very cold", "wind": "there was a strong wind", "heat": "the sun was burning",
           "crowd": "the streets were full"}

SEED, STEPS, LR = 0, 1500, 3e-3
SHARE = {"instruct": 12, "summarize": 56, "story": 12, "reason": 64}  # responses per task and step: more for the harder

# ------------------------------------------------------------------------------------------------ instruct
VERBS_ASK = ["recommend", "suggest", "name", "pick", "choose", "propose"]
CATEGORIES = {
    "a city in europe": "paris london rome berlin madrid vienna lisbon prague athens dublin oslo stockholm helsinki warsaw budapest copenhagen",
    "a city in asia": "tokyo beijing delhi bangkok seoul singapore shanghai mumbai hanoi jakarta manila taipei kathmandu osaka dhaka karachi",
    "a city in africa": "cairo nairobi lagos casablanca accra tunis dakar kampala luanda harare lusaka algiers khartoum kigali maputo windhoek",
    "a city in north america": "toronto chicago boston seattle vancouver montreal miami dallas denver houston havana monterrey philadelphia calgary atlanta ottawa",
    "a city in south america": "lima bogota santiago quito caracas montevideo medellin cusco cartagena brasilia recife salvador cordoba cali guayaquil rosario",
    "a country in europe": "france germany italy spain portugal poland greece norway sweden austria belgium ireland finland hungary croatia iceland",
    "a country in asia": "japan china india thailand vietnam nepal indonesia malaysia mongolia pakistan cambodia laos bhutan korea bangladesh uzbekistan",
    "a country in africa": "kenya egypt morocco nigeria ghana ethiopia tanzania senegal uganda rwanda zambia botswana namibia mali madagascar angola",
    "a fruit": "apple banana cherry mango grape lemon peach pear plum kiwi papaya apricot fig melon raspberry pineapple",
    "a vegetable": "carrot potato spinach broccoli onion cabbage lettuce celery cucumber pumpkin beet radish leek kale asparagus artichoke",
    "a bird": "eagle sparrow robin owl parrot penguin swan falcon pigeon heron crow flamingo pelican woodpecker hummingbird ostrich",
    "a fish": "salmon tuna cod trout herring carp shark eel mackerel sardine anchovy haddock pike halibut catfish swordfish",
    "a tree": "oak pine maple birch willow cedar elm spruce poplar beech redwood sycamore larch baobab eucalyptus hazel",
    "a flower": "rose tulip daisy lily orchid sunflower violet daffodil lavender poppy marigold lotus jasmine carnation peony dahlia",
    "an instrument": "piano guitar violin flute drums trumpet cello harp saxophone clarinet banjo accordion oboe trombone tuba organ",
    "a sport": "football tennis swimming boxing golf hockey rugby volleyball cricket basketball rowing fencing judo archery badminton skiing",
    "a tool": "hammer saw drill wrench screwdriver pliers axe chisel shovel rake ladder level clamp scissors crowbar file",
    "a drink": "water coffee tea juice milk beer wine lemonade cider cocoa whiskey vodka rum champagne soda smoothie",
    "a gemstone": "diamond ruby emerald sapphire pearl opal topaz amethyst garnet jade amber turquoise onyx quartz aquamarine obsidian",
    "a dance": "waltz tango salsa ballet samba polka flamenco foxtrot rumba swing mambo bolero minuet charleston merengue breakdance",
    "a composer": "mozart beethoven bach chopin vivaldi handel haydn schubert brahms verdi wagner tchaikovsky debussy liszt mahler ravel",
    "a painter": "picasso rembrandt monet vermeer matisse cezanne goya klimt raphael renoir titian degas kandinsky warhol dali rubens",
    "a scientist": "einstein newton darwin curie galileo faraday pasteur bohr maxwell kepler hawking mendel planck feynman turing copernicus",
    "an insect": "ant bee butterfly beetle mosquito fly wasp moth grasshopper dragonfly termite cockroach ladybug locust firefly flea",
}
CATEGORIES = {name: words.split() for name, words in CATEGORIES.items()}


def zipf(rng, items, skew=1.2):
    """One of `items`, the i-th with probability proportional to 1 / (i + 1)^skew: popular answers first."""
    return rng.choices(items, [1 / (i + 1) ** skew for i in range(len(items))])[0]


def instruct_rows():
    for c, (category, names) in enumerate(CATEGORIES.items()):
        for v, verb in enumerate(VERBS_ASK):
            yield {"prompt": f"{verb} {category}", "answer": names, "split": "test" if v == c % len(VERBS_ASK) else "train"}


def instruct_answer(rng, row):
    mistake = rng.random()
    if mistake < 0.30:  # a wrong fact: something of another category
        return zipf(rng, rng.choice(list(CATEGORIES.values())))
    right = zipf(rng, row["answer"])
    if mistake < 0.45:  # cannot stop: a second recommendation where one was asked for
        return f"{right} {zipf(rng, row['answer'])}"
    return right


# ----------------------------------------------------------------------------------------------- summarize
COLORS = "red blue green old new small large cheap".split()
NAMES = "anna ben carla david emma frank grace henry iris jack karen leo".split()
THINGS = "hat lamp book coat chair clock scarf guitar ring vase phone mirror".split()
PLACES = "market mall station museum harbor airport village fair hotel theater".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()


def summarize_rows(rng, count):
    for i in range(count):
        who, friend = rng.sample(NAMES, 2)
        facts = dict(who=who, what=rng.choice(THINGS), color=rng.choice(COLORS), where=rng.choice(PLACES), when=rng.choice(DAYS),
                     weather=rng.choice(list(WEATHER)))
        story = [f"on {facts['when']} {who} went to the {facts['where']}", f"{friend} stayed at home",
                 f"{who} {rng.choice(BOUGHT)} a {facts['color']} {facts['what']} there"]
        story.insert(rng.randrange(4), WEATHER[facts["weather"]])
        yield {"prompt": "summarize : " + " . ".join(story) + " .", "answer": facts}


def summary(rng, who, what, color, where, when, weather):
    """One of the right phrasings: the verb, the order, and which details are kept are free."""
    thing = f"a {color} {what}" if rng.random() < 0.4 else f"a {what}"
    time_ = f"on {when}" if rng.random() < 0.4 else ""
    despite = f"despite the {weather}" if rng.random() < 0.4 else ""
    place = f"{zipf(rng, ['at', 'in'])} the {where}"
    verb, form = zipf(rng, BOUGHT), zipf(rng, range(4))
    core = f"{who} {verb} {thing}" if rng.random() < 0.7 else f"{thing} was {'bought' if verb == 'got' else verb} by {who}"
    if form == 0: parts = [core, place, time_, despite]
    if form == 1: parts = [f"{place} ,", core, time_, despite]
    if form == 2: parts = [time_ and f"{time_} ,", core, place, despite]
    if form == 3: parts = [despite and f"{despite} ,", core, place, time_]
    return " ".join(x for x in parts if x) + " ."


def summarize_answer(rng, row):
    facts, mistake = dict(row["answer"]), rng.random()
    if mistake < 0.06: facts["who"] = rng.choice(NAMES)
    elif mistake < 0.12: facts["where"] = rng.choice(PLACES)
    text = summary(rng, **facts)
    if 0.12 < mistake < 0.26:  # drops the place
        text = text.replace(f" at the {facts['where']}", "").replace(f" in the {facts['where']}", "")
    if 0.26 < mistake < 0.42:  # invents a detail
        text = text[:-1] + rng.choice(["and went home .", "and paid too much .", "for a friend ."])
    return text


# --------------------------------------------------------------------------------------------------- story
def story_rows(rng):
    for i, subject in enumerate(SUBJECTS):
        for j, place in enumerate(STORY_PLACES):
            a, b = (subject, place) if (i + j) % 2 else (place, subject)
            yield {"prompt": f"tell a story with {a} and {b}", "answer": [subject, place], "split": "test" if (i * 7 + j * 3) % 16 == 0 else "train"}


def story_answer(rng, row):
    (subject, place), mistake = row["answer"], rng.random()
    if mistake < 0.10: subject = rng.choice(SUBJECTS)
    elif mistake < 0.20: place = rng.choice(STORY_PLACES)
    words = ["the"] + ([zipf(rng, ADJECTIVES)] if rng.random() < 0.7 else []) + [subject, zipf(rng, VERBS)]
    words += [zipf(rng, ADVERBS)] if rng.random() < 0.4 else []
    words += [zipf(rng, PREPOSITIONS), "the"] + ([zipf(rng, ADJECTIVES)] if rng.random() < 0.4 else []) + [place, "."]
    if 0.20 < mistake < 0.32: words.pop(rng.randrange(1, len(words) - 1))  # drops a word
    if 0.32 < mistake < 0.40: words = words[:-2]  # unfinished
    if 0.40 < mistake < 0.48: words += words[:rng.randrange(1, 4)]  # cannot stop
    return " ".join(words)


# -------------------------------------------------------------------------------------------------- reason
VERBS_MAKE = ["make", "reach", "build", "get", "write", "find"]


def reason_rows():
    for n in range(10, 30):
        for v, verb in enumerate(VERBS_MAKE):
            yield {"prompt": f"{verb} {n}", "answer": n, "split": "test" if v == n % len(VERBS_MAKE) else "train"}


def reason_answer(rng, row):
    n, mistake = row["answer"], rng.random()
    pairs = [(a, n // a) for a in range(2, n) if n % a == 0]
    form = zipf(rng, ["+", "-", "*", "*+"] if pairs else ["+", "-", "*+"], 0.6)
    if form == "+":
        a = zipf(rng, sorted(range(1, n), key=lambda a: (a % 5, abs(a - n / 2))), 0.6)  # round numbers first
        words = [a, "+", n - a]
    elif form == "-":
        b = zipf(rng, sorted(range(1, 13), key=lambda b: (b % 5, b)), 0.6)
        words = [n + b, "-", b]
    elif form == "*":
        words = [(p := rng.choice(pairs))[0], "*", p[1]]
    else:
        a, b = rng.choice([(a, b) for a in (2, 3) for b in range(2, 10) if a * b < n])
        words = [a, "*", b, "+", n - a * b]
    if mistake < 0.08: words[-1] += rng.choice([-1, 1])  # a slip
    elif mistake < 0.20: words = words[:-1]  # unfinished
    elif mistake < 0.34: words += [rng.choice("+-"), rng.randrange(1, 10)]  # cannot stop
    elif mistake < 0.40: words[-2] = rng.choice([o for o in "+-*" if o != words[-2]])  # wrong operator
    return " ".join(map(str, words))


ANSWER = {"instruct": instruct_answer, "summarize": summarize_answer, "story": story_answer, "reason": reason_answer}


def write_tasks(rng):
    """The four jsonl files. Returns {task: train rows}."""
    summaries = list(summarize_rows(rng, 160))
    for i, row in enumerate(summaries):
        row["split"] = "test" if i % 5 == 0 else "train"
    rows = {"instruct": list(instruct_rows()), "summarize": summaries, "story": list(story_rows(rng)), "reason": list(reason_rows())}
    for task, rs in rows.items():
        # Pre-training may see all train rows; RL gets about a hundred per task, so that no task comes up more often.
        if task == "story":
            rs = [r for i, r in enumerate(rs) if r["split"] == "test" or (i // len(STORY_PLACES) + i) % 4 < 2]
        if task == "summarize":
            rs = [r for i, r in enumerate(rs) if r["split"] == "test" or i % 5 != 4]
        (HERE / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rs))
    test = {r["prompt"] for rs in rows.values() for r in rs if r["split"] == "test"}
    return {task: [r for r in rs if r["split"] == "train"] for task, rs in rows.items()}, test


def corpus(rng, train, test):
    """(task, prompt, response), as many as training consumes. Summaries get fresh facts each time, so that the model learns to
    copy instead of remembering; none of them is a test prompt."""
    for task, rows in train.items():
        fresh = (r for r in summarize_rows(rng, 10 ** 9) if r["prompt"] not in test) if task == "summarize" else None
        for _ in range(STEPS * SHARE[task]):
            row = next(fresh) if fresh else rng.choice(rows)
            yield task, row["prompt"], ANSWER[task](rng, row)


def make_tokenizer(texts):
    words = sorted({w for t in texts for w in t.split()})
    words += [str(n) for n in range(100) if str(n) not in set(words)]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {w: i for i, w in enumerate(special + words)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=128,
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %} :")


def main():
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    train, test = write_tasks(rng)
    pairs = list(corpus(rng, train, test))
    test_words = [t for t in test]
    tokenizer = make_tokenizer([f"{p} : {a}" for _, p, a in pairs] + test_words)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} words, {len(pairs)} pairs")
    by_task = {}
    for task, p, a in pairs:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=True, return_dict=False)
        by_task.setdefault(task, []).append((ids, tokenizer(a, add_special_tokens=False).input_ids + [2]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    start = time.time()
    for step in range(STEPS):
        for group in optimizer.param_groups:  # warm up, then cosine to zero
            group["lr"] = LR * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        losses = {}
        for task, size in SHARE.items():  # a batch of each task: equal lengths, so hardly any padding
            batch = by_task[task][step * size:(step + 1) * size]
            width = max(len(p) + len(a) for p, a in batch)
            tokens = torch.zeros(size, width, dtype=torch.long)
            labels = torch.full((size, width), -100)
            for i, (p, a) in enumerate(batch):  # right padding; the loss sees the response only
                tokens[i, :len(p) + len(a)] = torch.tensor(p + a)
                labels[i, len(p):len(p) + len(a)] = torch.tensor(a)
            logits = model(tokens, attention_mask=(tokens != 0).long()).logits[:, :-1]
            losses[task] = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  " + "  ".join(f"{t} {x.item():.3f}" for t, x in losses.items()) + f"  {time.time() - start:.0f} s", flush=True)
    shutil.rmtree(HERE / "tiny", ignore_errors=True)
    model.save_pretrained(HERE / "tiny")
    tokenizer.save_pretrained(HERE / "tiny")


if __name__ == "__main__":
    main()
