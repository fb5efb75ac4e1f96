"""measure.py MODEL_FOLDER: samples 16 responses for each test prompt and for 32 training prompts of each task, measures them
with the encoder that is trained on and with a second one, and writes runs/compare/base.json or RUN/measured.json.

The second encoder shares nothing with the first: the states of the base model's last layer, averaged over the tokens. Nearly
all of its cosines are above 0.9, so "different" begins where as many pairs of the base model's answers are different as under
the first encoder at 0.9."""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import eval as evaluation  # noqa: E402
from data.tasks import load_reward, load_rows  # noqa: E402
from dqo import Config, embed, gram, load_encoder, load_model, log_det  # noqa: E402
from train import write_whole  # noqa: E402

RUNS, N, TASKS = Path("runs/compare"), 16, Config().data


def base_encoder():
    folder = RUNS / "base-encoder"
    if not folder.exists():
        states = Transformer("data/tiny")
        SentenceTransformer(modules=[states, Pooling(states.get_embedding_dimension(), "mean")]).save(str(folder))
    return load_encoder(str(folder))


def cosines(encoder, groups):  # of all pairs within the groups
    upper = torch.ones(N, N).triu(1).bool()
    return gram(embed(encoder, [x["response"] for x in groups]).view(-1, N, encoder.get_embedding_dimension()))[:, upper].flatten()


def measure(folder, encoder, second, split, same=None):
    """eval.py's results on one split, each with a dict `second`: the semantic metrics under the second encoder. And its `same`."""
    model, tokenizer = load_model(folder)
    kept, by_task = [], {}
    results = evaluation.evaluate(folder, model, tokenizer, encoder, load_rows(TASKS, split, 32), load_reward(None, TASKS), N, 24, keep=kept)
    if same is None:
        same = cosines(second, kept).quantile((cosines(encoder, kept) < 0.9).float().mean()).item()
    for i in range(0, len(kept), N):
        group = kept[i:i + N]
        phi = embed(second, [x["response"] for x in group])
        by_task.setdefault(group[0]["task"], []).append(dict(
            cosine_distance=evaluation.cosine_distance(phi), vendi=evaluation.vendi(phi), log_det=log_det(phi.double()).item(),
            effective_diversity=evaluation.effective_diversity([x["quality"] >= 1 for x in group], phi, same)))
    return [dict(r, second=evaluation.mean_and_se(by_task[r["task"]])[0]) for r in results], same


def main(folder):
    base = RUNS / "base.json"
    path = base if folder == "data/tiny" else Path(folder) / "measured.json"
    if not path.exists():
        encoder, second = load_encoder(), base_encoder()
        same = None if path == base else json.loads(base.read_text())["same"]
        test, same = measure(folder, encoder, second, "test", same)
        result = dict(test=test, train=measure(folder, encoder, second, "train", same)[0], same=same)
        write_whole(path, json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
