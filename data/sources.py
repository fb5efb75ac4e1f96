"""Sources of rows: a .jsonl file, packed or not, its https:// address, or a data set of the hub.

`read` yields (where, row), where being "my.jsonl, line 3", for messages.
"""

import contextlib
import gzip
import json
import re
import traceback
import urllib.request
from pathlib import Path

from data.models import first_line, offline, resolve
from dqo import BadInput

HUB_ID = re.compile(r"(?!.*\.jsonl?(\.gz)?$)[\w.-]+/[\w.-]+(:[\w.-]+)?")
JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def read(source, split, limit, task, known):
    """Yields (where, row) for each row of a source. task: its name, or None; known: all names."""
    instead = f"pass --data {task}:FILE.jsonl" if task else "pass --data FILE.jsonl"
    is_web = re.match("https?://", source)
    is_file = source.endswith(JSON_ENDINGS) or Path(source[:250]).exists()
    if is_web or is_file:
        return json_rows(source, text_of(source, is_web, instead))
    if HUB_ID.fullmatch(source):
        return hub_rows(source, split, limit, instead)
    raise BadInput(
        f"--data {source:.80}: no such task or file; "
        f"there are {', '.join(known)}, .jsonl files, https:// and OWNER/NAME"
    )


def text_of(source, is_web, instead):
    try:
        content = downloaded(source) if is_web else Path(resolve(source)).read_bytes()
        if content.startswith(b"\x1f\x8b"):  # as .jsonl.gz does
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except Exception as error:  # of the disk, DNS, TLS, HTTP, a timeout, gzip, an encoding
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if is_web:
            reason += f"; fetch it yourself and {instead}"
        raise BadInput(f"--data {source}: {reason}") from None


def downloaded(source):
    if source.startswith("http:"):
        raise ValueError("what comes over http:// may have been changed on its way; use https://")
    with urllib.request.urlopen(source, timeout=30) as answer:  # 30 seconds without a byte
        return answer.read()


def json_rows(source, text):
    """Yields (where, row) for each line that is not blank."""
    # WARNING  str.splitlines() would also split at U+2028, which may stand inside a JSON text and
    # does in real data
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: not a JSON object")
        yield where, row


@contextlib.contextmanager
def the_hub(source, instead):
    """Yields the `datasets` package. Whatever goes wrong with it becomes one line."""
    try:
        import datasets
        if offline():
            raise ConnectionError("the hub cannot be reached")
        yield datasets
    except ImportError:
        raise BadInput(
            f"--data {source}: a hub dataset needs one more package: pip install datasets; "
            f"or download a .jsonl file and {instead}"
        ) from None
    except Exception as error:  # it raises errors of many libraries: hub, network, parquet
        raise BadInput(f"--data {source}: {why(error)}; {instead}") from None


def hub_splits(source):
    """The names of the splits of a hub data set."""
    with the_hub(source, "pass FILE.jsonl") as datasets:
        return list(datasets.get_dataset_split_names(*source.split(":")))


def hub_rows(source, split, limit, instead):
    """Yields (where, row) for each row of a split."""
    with the_hub(source, instead) as datasets:
        # with a limit it is streamed: no full download
        rows = datasets.load_dataset(*source.split(":"), split=split, streaming=bool(limit))
        for number, row in enumerate(rows, 1):
            yield f"{source} ({split}), row {number}", row


def why(error):
    """An error of somebody else's code in one line: kind, first line of the message, and where."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(at.filename).name}, line {at.lineno}"
    return f"{type(error).__name__}: {first_line(error)} ({where})"
