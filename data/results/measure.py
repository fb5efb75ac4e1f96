"""How the runs of make.sh do on test prompts, on hard ones, and on 32 training prompts of a task.

    python data/results/measure.py base    # data/tiny, sampled three times
    python data/results/measure.py RUN     # runs/compare/RUN

writes measured.json into runs/compare/base-s0 to base-s2, or into the run: the results of eval.py
for each split, and under the names `second_...` the same by an encoder that nobody is trained on,
the states of the base model's last layer, averaged over the tokens. Nearly all of its cosines are
above 0.9. So "different" begins where as many pairs of the base model's answers are different as
under the first encoder.
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import dqo
import eval
from data.metrics import effective_diversity
from data.tasks import load_reward, load_rows
from tables import RUNS, SEEDS

DATA = eval.Options.data
N = dict(test=16, hard=32, train=16)  # split: responses per prompt


def base_encoder():
    folder = RUNS / "base-encoder"
    if not folder.exists():
        states = Transformer("data/tiny")
        mean = Pooling(states.get_embedding_dimension(), "mean")
        SentenceTransformer(modules=[states, mean]).save(str(folder))
    return dqo.load_encoder(str(folder))


@functools.cache
def loaded(folder):
    """(model and tokenizer, the encoder that is trained on, the second one)."""
    policy = dqo.load_model(folder)
    eval.use_one_thread(policy[0])
    return policy, dqo.load_encoder(), base_encoder()


def cosines(encoder, group):
    """(n, n) of the responses to one prompt."""
    return dqo.gram(dqo.embed(encoder, [x["response"] for x in group]).double())


def as_different(encoder, second, groups):
    """The cosine below which the second encoder finds as many pairs as the first below 0.9."""
    def pairs(encoder):
        every = [cosines(encoder, group) for group in groups]
        return torch.cat([L[torch.ones_like(L).triu(1).bool()] for L in every])

    return pairs(second).quantile((pairs(encoder) < 0.9).double().mean()).item()


def add_second(results, groups, second, same):
    """Effective diversity by the second encoder. groups: what `evaluate` kept, a list of
    responses per prompt, in the order of the results' tasks."""
    by_task = itertools.groupby(groups, lambda group: group[0]["task"])
    for result, (task, groups) in zip(results, by_task, strict=True):
        assert result["task"] == task
        found = []
        for group in groups:
            correct = [x["quality"] >= result["threshold"] - 1e-6 for x in group]
            found.append(dict(second_effective_diversity=effective_diversity(
                correct, cosines(second, group), same)))
        result.update(eval.over(found, torch.mean))
        result["se"].update(eval.over(found, eval.standard_error))


def measure(model, folder, seed=0):
    """Writes folder/measured.json, unless it is there."""
    path, first = folder / "measured.json", RUNS / f"base-s{SEEDS[0]}" / "measured.json"
    if path.exists():
        return
    policy, encoder, second = loaded(model)
    same = json.loads(first.read_text("utf-8"))["same"] if path != first else None
    measured = {}
    for split, n in N.items():
        rows, groups = load_rows(DATA, split, 32), []
        options = eval.Options(n=n, temperature=1.0, max_new_tokens=24, seed=seed)
        results = eval.evaluate(model, policy, encoder, load_reward(None, rows), rows, options,
                                keep=groups.append)
        same = same or as_different(encoder, second, groups)
        add_second(results, groups, second, same)
        measured[split] = results
        if split == "test":  # of each task the first prompt, eight answers
            firsts = {group[0]["task"]: group[:8] for group in reversed(groups)}
            measured["samples"] = sum(reversed(firsts.values()), [])
    folder.mkdir(exist_ok=True, parents=True)
    new = path.with_suffix(".new")  # renamed: measured.json is whole, or not there
    new.write_text(json.dumps(dict(measured, same=same), indent=1), "utf-8")
    new.replace(path)


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    if name == "base":
        for seed in SEEDS:
            measure("data/tiny", RUNS / f"base-s{seed}", int(seed))
    else:
        measure(str(RUNS / name), RUNS / name)
