"""measure.py MODEL_FOLDER: samples 16 responses for each test prompt and for 32 training prompts of
each task, measures them with the encoder that is trained on and with a second one, and writes
MODEL_FOLDER/measured.json. The base, data/tiny, is sampled three times, for base-s0.json to
base-s2.json in runs/compare.

The second encoder shares nothing with the first: the states of the base model's last layer,
averaged over the tokens. Nearly all of its cosines are above 0.9, so "different" begins where as
many pairs of the base model's answers are different as under the first encoder at 0.9."""

import functools
import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))
from data.metrics import cosine_distance, effective_diversity, mean_and_se, vendi
from data.models import load_encoder, load_model
from data.prompts import TASKS, load_rows
from data.runs import write_whole
from data.scoring import load_reward
from dqo import embed, gram, log_det
from eval import Judges, Sampling, evaluate
from tables import RUNS, SEEDS

N, DATA = 16, ",".join(TASKS)


def base_encoder():
    folder = RUNS / "base-encoder"
    if not folder.exists():
        states = Transformer("data/tiny")
        mean = Pooling(states.get_embedding_dimension(), "mean")
        SentenceTransformer(modules=[states, mean]).save(str(folder))
    return load_encoder(str(folder))


@functools.cache
def loaded(folder):
    """(model and tokenizer, the encoder that is trained on, the second one)."""
    return load_model(folder), load_encoder(), base_encoder()


def responses(folder, split, seed):
    """(eval.py's results on one split, the responses that they are about)."""
    kept = []
    policy, encoder, _ = loaded(folder)
    judges = Judges(encoder, load_reward(None, DATA))
    records = load_rows(DATA, split, 32)
    drawn = Sampling(N, 24, seed=seed)
    results = evaluate(folder, policy, judges, records, drawn, kept)
    return results, kept


def cosines(encoder, kept, n=N):
    """Of all pairs within the groups of n."""
    phi = embed(encoder, [x["response"] for x in kept])
    upper = torch.ones(n, n).triu(1).bool()
    return gram(phi.view(-1, n, phi.shape[1]))[:, upper].flatten()


def as_different(encoder, second, kept, n=N):
    """The cosine below which the second encoder finds as many pairs as the first below 0.9."""
    share = (cosines(encoder, kept, n) < 0.9).float().mean()
    return cosines(second, kept, n).quantile(share).item()


def with_second(results, kept, second, same, n=N):
    """The results, each with a dict `second`: the semantic metrics under the second encoder."""
    by_task = {}
    for i in range(0, len(kept), n):
        group = kept[i:i + n]
        phi = embed(second, [x["response"] for x in group])
        correct = [x["quality"] >= 1 for x in group]
        by_task.setdefault(group[0]["task"], []).append(dict(
            cosine_distance=cosine_distance(phi),
            vendi=vendi(phi),
            log_det=log_det(phi.double()).item(),
            effective_diversity=effective_diversity(correct, phi, same),
        ))
    return [dict(r, second=mean_and_se(by_task[r["task"]])[0]) for r in results]


def measure(folder, path, seed=0):
    """Writes what was measured of a model to `path`, unless it is there."""
    if path.exists():
        return
    (_, encoder, second), first = loaded(folder), RUNS / f"base-s{SEEDS[0]}.json"
    test, train = (responses(folder, split, seed) for split in ("test", "train"))
    if path == first:
        same = as_different(encoder, second, test[1])
    else:
        same = json.loads(first.read_text("utf-8"))["same"]
    result = dict(
        test=with_second(*test, second, same),
        train=with_second(*train, second, same),
        same=same,
    )
    write_whole(path, json.dumps(result, indent=1))


def main(folder):
    if folder != "data/tiny":
        return measure(folder, Path(folder) / "measured.json")
    for seed in SEEDS:
        measure(folder, RUNS / f"base-s{seed}.json", seed)


if __name__ == "__main__":
    main(sys.argv[1])
