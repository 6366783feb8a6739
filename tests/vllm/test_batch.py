"""`holitom-hf batch --engine vllm` against `--engine transformers`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from .questions import BATCHES


pytest.importorskip("vllm")
OPTIONS = {"gpu_memory_utilization": 0.1, "max_model_len": 2048, "enforce_eager": True}


def read(path) -> dict[str, dict]:
    """Whole records by id; none may be there twice."""
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def of_both(record: dict) -> dict:
    """What does not say who answered, nor how fast."""
    return {name: value for name, value in record.items() if name not in ("seconds", "run")}


@pytest.mark.parametrize("model", BATCHES)
def test_killed_and_started_again_it_has_the_records_of_transformers(transformers_batch, tmp_path, model):
    lines = (transformers_batch / "inputs.jsonl").read_text().splitlines()
    question = "word " * OPTIONS["max_model_len"]
    lines.insert(1, json.dumps(json.loads(lines[0]) | {"id": "long", "question": question}))
    inputs, output, log = transformers_batch / "vllm.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    inputs.write_text("\n".join(lines) + "\n")
    command = f"-m holitom_hf batch {inputs} {output} --engine vllm --batch-size 4 --dtype float32"
    command = [sys.executable, *command.split(), "--preset", str(transformers_batch / "settings.json")]
    command += ["--engine-options", json.dumps(OPTIONS), *BATCHES[model]]
    part = tmp_path / "out.jsonl.parts" / "00000.jsonl"
    with log.open("w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            while first.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 8):
                time.sleep(0.02)
        finally:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    assert part.exists(), log.read_text()[-4000:]
    before = read(part)
    assert 8 <= len(before) < len(lines)
    with log.open("a") as file:
        assert subprocess.run(command, stdout=file, stderr=file, check=False).returncode == 0, log.read_text()[-4000:]
    found = read(output)
    assert all(found[name] == record for name, record in before.items())
    assert list(found) == [json.loads(line)["id"] for line in lines]
    assert "2048" in found.pop("long")["error"]  # transformers sets no such end
    expected = read(transformers_batch / f"{model}.jsonl")
    assert sum("error" in record for record in expected.values()) == 3
    assert {name: of_both(record) for name, record in found.items()} == {
        name: of_both(record) for name, record in expected.items()
    }
