"""The records of a batch on disk: whatever is killed when, none is lost and none is there twice."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path


class BatchRecords:
    """
    One record per input. While a run goes on, each process appends to a file of its own beside the output; at the end
    they become the output in one step. A run that is started again finds what is there already.

    The folder of parts must be seen by all processes: on several machines it lies on a file system they share.
    """

    def __init__(self, output: Path, run: str):
        """
        Args:
            output: The JSONL file to be.
            run: Stands for what a record depends on besides its input, the model and its settings; part of each.
        """
        # A link is followed, so that the file is replaced and not the link.
        self.output, self.run = Path(output).resolve(), run
        self.parts = self.output.with_name(self.output.name + ".parts")
        self.file = self.lock = None
        self._read_up_to: dict[Path, tuple[int, int]] = {}

    def prepare(self) -> None:
        """
        Makes the folder, takes it for this run, and mends what a killed one left. For one process, before the others
        go on.

        Raises:
            ValueError: If the output is a folder, a device or a pipe, or another run is writing to it.
        """
        if self.output.is_dir():
            raise ValueError(f"{str(self.output)!r} is a folder: name a file to write")
        if self.output.exists() and not self.output.is_file():
            raise ValueError(f"{str(self.output)!r} is a device or a pipe: name a file to write")
        self.parts.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.parts / "lock", "w")  # noqa: SIM115 - held until this process ends, however it does
        try:
            # Unlike flock's, this lock is the process's own: workers that outlive a killed run do not hold it.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another run is writing to {str(self.output)!r}: wait for it, or end it") from error
        for mark in self.parts.glob("*.done"):
            mark.unlink()
        for part in self._part_files():
            whole = part.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):  # killed within a line
                os.truncate(part, end)

    def read(self) -> dict[str, dict]:
        """
        All records so far by id; an answer counts more than an error.

        Raises:
            ValueError: If some are of another run, or no records.
        """
        records = {}
        for path in [self.output, *self._part_files()]:
            for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
                if not line:
                    continue
                try:
                    record = json.loads(line)
                    name, run = record["id"], record["run"]
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{str(path)!r} is no output of this command: choose another file") from error
                if run != self.run:
                    raise ValueError(
                        f"{str(path)!r} holds answers of another model or other settings: choose another output"
                    )
                if name not in records or "error" in records[name]:
                    records[name] = record
        return records

    def count(self) -> int:
        """Number of records in the parts, of all processes."""
        for part in self._part_files():
            offset, number = self._read_up_to.get(part, (0, 0))
            with open(part, "rb") as file:
                file.seek(offset)
                new = file.read()
            self._read_up_to[part] = offset + len(new), number + new.count(b"\n")
        return sum(number for _, number in self._read_up_to.values())

    def add(self, records: list[dict], process: int) -> None:
        """Appends records for good, as one write."""
        if self.file is None:
            self.file = os.open(self.parts / f"{process:05d}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        text = "".join(_line(record | {"run": self.run}) for record in records).encode()
        while text:
            text = text[os.write(self.file, text) :]
        os.fsync(self.file)

    def mark_done(self, process: int) -> None:
        """Says that a process has added all of its records."""
        (self.parts / f"{process:05d}.done").touch()

    def wait_for_all(self, num_processes: int) -> None:
        """Returns when all processes are done: over files, since a collective would give up on a slow one."""
        while len(list(self.parts.glob("*.done"))) < num_processes:
            time.sleep(0.2)

    def finish(self, ids: Sequence[str]) -> dict[str, dict]:
        """
        Puts the records into the output, in the order of the inputs, and removes the parts. For one process.

        Returns:
            All records by id.
        """
        records = self.read()
        order = [*(name for name in ids if name in records), *sorted(set(records) - set(ids))]
        _replace(self.output, "".join(_line(records[name]) for name in order))
        shutil.rmtree(self.parts)
        self.lock.close()
        return records

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("*.jsonl"))


def _line(record: dict) -> str:
    """A record as a line of JSON; what a name or an answer holds may be no text that UTF-8 can write."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
