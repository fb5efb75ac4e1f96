"""What is printed of an evaluation and of a run; pictures.py draws.

    table, change                                 of results of eval.py
    introduce, show_group                         of a run of train.py
"""

import dataclasses
import math

from tqdm import tqdm

from data import terminal
from data.metrics import by_model
from data.models import load_encoder
from dqo import BadInput, embed, end_tokens, gram, log_det, marginal_gains

LABELS = dict(
    quality="quality",
    pass_at="pass@",
    max_at="max@",
    distinct_correct="distinct correct",
    distinct_1="distinct-1",
    distinct_4="distinct-4",
    self_bleu_diversity="1 - self-BLEU",
    self_rouge_diversity="1 - self-ROUGE-L",
    correct_distinct_4="distinct-4, correct only",
    correct_self_bleu_diversity="1 - self-BLEU, correct only",
    effective_diversity="effective semantic diversity",
    utility="utility",
    cosine_distance="cosine distance",
    vendi="Vendi score",
    log_det="log det",
    mean_tokens="tokens",
    truncated="truncated",
    nll="nll under the judge",
)


# ------------------------------------------------------------------------------ an evaluation
def measured(result):
    """(label, mean, standard error) of each line of the table, of one result."""
    for key, label in LABELS.items():
        if key not in result:
            continue
        mean, se = result[key], result["se"][key]
        if key == "pass_at":
            for n in mean:
                yield f"{label}{n}", mean[n], se[n]
        elif key == "max_at":  # for graded rewards; for others the last is enough
            for n in list(mean)[-1 if "pass_at" in result else 0:]:
                yield f"{label}{n}", mean[n], se[n]
        else:
            yield label, mean, se


def table(results):
    """A block per task: metrics down, models across."""
    models = by_model(results)
    longest = max(map(len, models))
    width = max(15, min(30, longest + 2))
    lines = []
    for task in zip(*models.values()):  # the results of all models on one task
        first = task[0]
        title = f"\n{first['task']}: {first['prompts']} prompts x {first['n']} responses"
        names = "".join(name[-28:].rjust(width) for name in models)
        lines += [title.ljust(45) + names, *meaning(first)]
        for cells in zip(*map(measured, task)):  # the same metric of all models
            if all(math.isnan(mean) for _, mean, _ in cells):
                continue  # it needs more than one response
            numbers = "".join(f"{mean:.3f} ± {se:.3f}".rjust(width) for _, mean, se in cells)
            label = cells[0][0]
            lines.append(f"  {label}".ljust(44) + numbers)
    return "\n".join(lines)


def meaning(*results):
    """What counts as correct, in a line; none if nothing is said about it."""
    names = []
    for result in results:
        least = result.get("threshold")
        name = "none, see --threshold" if least is None else f"a quality of at least {least:g}"
        if "threshold" in result and name not in names:
            names.append(name)
    return [f"  (correct: {' or '.join(names)})"] if names else []


def change(before, after):
    """The few metrics to judge by, before -> after training: a line per task."""
    (base,), (trained,) = by_model(before).values(), by_model(after).values()
    n = base[0]["n"]
    prompts = sum(result["prompts"] for result in before)
    best = "/".join(sorted({best_at(result)[:-3] for result in base}, reverse=True))
    lines = [
        f"\n{prompts} test prompts, {n} responses each, base -> trained",
        *meaning(*base),
        f"{'task':<20}{'quality':>15}{f'{best}@{n}':>15}{'distinct correct':>18}"
        f"{'effective diversity':>21}",
    ]
    for b, a in zip(base, trained):
        quality = arrow(b, a, "quality")
        best = arrow(b[best_at(b)], a[best_at(b)], str(n))
        distinct = arrow(b, a, "distinct_correct", "%.1f -> %4.1f")
        effective = arrow(b, a, "effective_diversity")
        task = b["task"][:19]
        lines.append(f"{task:<20}{quality:>15}{best:>15}{distinct:>18}{effective:>21}")
    return "\n".join(lines)


def best_at(*results):
    """Without a threshold nothing is correct, and the best of n responses is what there is."""
    return "pass_at" if all("pass_at" in result for result in results) else "max_at"


def arrow(before, after, key, form="%.2f -> %.2f"):
    return form % (before[key], after[key]) if key in before else "-"


# -------------------------------------------------------------------------------------- a run
def introduce(config, model, tokenizer, records, done, reward):
    """What is about to happen, in full: the resolved configuration and the distribution that
    is sampled from."""
    size = f"{model.num_parameters():,} parameters, {model.device}"
    resumed = f", resumed after step {done}" if config.resume else ""
    print(f"{config.objective} on {config.model} ({size}), "
          f"{len(records)} prompts of {config.data}{resumed}")
    shown = []
    for name, value in dataclasses.asdict(config).items():
        if name not in ("model", "data", "objective") and value is not None:
            shown.append(f"{name}={value}")
    print("  ".join(shown))
    ends = tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer).tolist())
    print(f"sampling: temperature {config.temperature}, "
          "full vocabulary (no top-p, no top-k, no penalty), "
          f"at most {config.max_new_tokens} tokens, ended by {' '.join(map(str, ends))}")
    if config.steps * config.prompts < len(records):
        print(f"{config.steps * config.prompts} of {len(records)} prompts will be seen; "
              "the data goes on: --steps")
    if is_unbounded(reward):
        print("the reward has no bounds: alpha and beta are relative to its scale, of which "
              "there is a line after the first step")


def is_unbounded(reward):
    return getattr(reward, "range", None) == (-math.inf, math.inf)


def after_first_step(metrics, samples, config, reward):
    """What may be wrong with a run shows in its first step: told then, not after a night."""
    signs = []
    if metrics["truncated"] > 0.5:
        signs.append(f"{metrics['truncated']:.0%} of the responses were cut off at "
                     f"--max-new-tokens {config.max_new_tokens}")
    if all_equal(samples, config):
        signs.append("all rewards of a prompt were equal")
    if signs:
        tqdm.write(f"WARNING  In the first step {', and '.join(signs)}: where no response is "
                   "better than another, nothing but diversity is being trained")
    if is_unbounded(reward):
        quality, bonus, penalty = (metrics[f"{x}_std"] for x in ("quality", "bonus", "penalty"))
        scale = max(quality, 1e-9)
        tqdm.write(f"Within a group the reward varies by {quality:.3g} (std), alpha * gain by "
                   f"{bonus / scale:.2g} of that, the KL penalty by {penalty / scale:.2g}: "
                   "choose alpha and beta so that each counts as it should.")


def all_equal(samples, config):
    """Whether no response was better than another that it is compared with."""
    compared = config.k if config.baseline != "none" else len(samples)
    qualities = [sample["quality"] for sample in samples]
    groups = [qualities[i:i + compared] for i in range(0, len(qualities), compared)]
    return all(len(set(group)) == 1 for group in groups)


def show_group(step, samples, metrics):
    """One prompt's group, best advantage first, above the progress bar."""
    prompt = str(samples[0]["prompt"])[-110:]
    distinct = len({sample["response"] for sample in samples})
    title = f"step {step}  {prompt!r}  {distinct} of {len(samples)} distinct"
    beyond = metrics["beyond_window"]
    if beyond:
        title += f"  ({beyond:.0%} of the step's responses exceed the encoder's window)"
    lines = [title, "  quality  gain  advantage"]
    for sample in sorted(samples, key=lambda sample: -sample["advantage"]):
        gain = sample["gain"] + 0.0  # -0.0 becomes 0.0
        lines.append(f"    {sample['quality']:5.2f}  {gain:6.3f}  {sample['advantage']:+6.2f}"
                     f"   {sample['response'][:90]!r}")
    tqdm.write("\n".join(lines))


def share_beyond_window(encoder, texts):
    """Share of texts that are longer than the encoder's window.

    WARNING  It reads only their beginning: if that is alike, they are duplicates to it.
    """
    window = getattr(encoder, "max_seq_length", None) or math.inf
    prompts, name = (getattr(encoder, x, None) for x in ("prompts", "default_prompt_name"))
    if prompts and name in prompts:
        texts = [prompts[name] + text for text in texts]
    # Tokenize only what may be too long: a token is at least a byte, and two are added.
    long = [text for text in texts if len(text.encode(errors="replace")) > window - 2]
    if not long:
        return 0.0
    ids = encoder.tokenizer(long, truncation=False).input_ids
    return sum(len(x) > window for x in ids) / len(texts)


def window_warning(encoder, texts, what):
    """A line on texts that the encoder does not see whole, or None. what: they are, for people."""
    share = share_beyond_window(encoder, texts)
    if not share:
        return None
    return (f"WARNING  {round(share * len(texts))} of {len(texts)} {what} exceed the encoder's "
            f"window of {encoder.max_seq_length} tokens: it reads only their beginning")


# --------------------------------------------------------------------- python dqo.py TEXT TEXT
def show_texts(texts):
    """Gram matrix, log det and marginal gains of some texts, as if they were one group."""
    return terminal.run("dqo.py", lambda: show_volume(texts))


def show_volume(texts):
    if len(texts) < 2:
        raise BadInput('give at least two texts: python dqo.py "one" "another"')
    encoder, k = load_encoder(), len(texts)
    phi = embed(encoder, texts)  # (k, D)
    print("gain    Gram matrix L (cosines)")
    for row, gain, text in zip(gram(phi).tolist(), marginal_gains(phi).tolist(), texts):
        cosines = " ".join(f"{x:5.2f}" for x in row)
        print(f"{gain:.3f}  {cosines}   {text}")
    print(f"log det(L + I) = {log_det(phi):.3f}, between {math.log(1 + k):.3f} (all equal) "
          f"and {k * math.log(2):.3f} (all orthogonal)")
    print(f"a gain lies between {math.log(1 + 1 / k):.3f} and {math.log(2):.3f}")
    warning = window_warning(encoder, texts, "texts")
    if warning:
        print(warning)
