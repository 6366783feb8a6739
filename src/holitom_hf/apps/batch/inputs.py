"""What a batch is asked: a folder of videos, a JSONL file, or a dataset."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes

from ...checkpoints.hub import check_dataset


VIDEO_SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}


@dataclass
class BatchInput:
    """
    One question about one video.

    Attributes:
        id: Tells it from all others.
        video: Path, URL or the file's bytes.
        question: What to ask.
    """

    id: str
    video: str | bytes
    question: str


class DatasetInputs(Sequence):
    """Rows of a `datasets.Dataset` with columns id, video and question; a video is read when it is its turn."""

    def __init__(self, dataset, question: str | None):
        """
        Raises:
            ValueError: If a column is missing.
        """
        from datasets import Value, Video

        names = dataset.column_names
        for name in ("id", "video", *(() if question is not None else ("question",))):
            if name not in names:
                raise ValueError(f"the dataset has no column {name!r}, only {', '.join(names)}")
        if isinstance(dataset.features["video"], Video):
            dataset = dataset.cast_column("video", Video(decode=False))
        elif dataset.features["video"] not in (Value("string"), Value("large_string"), Value("binary")):
            raise ValueError(
                f"the dataset's column video is {dataset.features['video']}: it must hold videos or paths"
            )
        self.dataset, self.question = dataset, question
        self.ids = [str(item) for item in dataset["id"]]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> BatchInput:
        row = self.dataset[index]
        video = row["video"]
        if isinstance(video, dict):  # an undecoded Video: its bytes, or where they are
            video = video["bytes"] if video.get("bytes") is not None else video["path"]
        return BatchInput(self.ids[index], video, row.get("question") or self.question)


def read_inputs(source: str, question: str | None = None, split: str = "train") -> Sequence[BatchInput]:
    """
    Finds out what to answer.

    Args:
        source: A folder of videos; a JSONL file with an object {"id", "video", "question"} a line, paths relative to
            it; a folder that `Dataset.save_to_disk` wrote; or a dataset's name on the Hub.
        question: Asked of every video that has none of its own; in a folder, of all.
        split: Of a dataset.

    Returns:
        The inputs; ids differ.

    Raises:
        OSError, ValueError, ImportError: If there is nothing to read, something is missing or stands there twice.
    """
    path = Path(source)
    if path.is_dir() and not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        inputs = _folder_inputs(path, question)
    elif path.is_file():
        inputs = _jsonl_inputs(path, question)
    else:
        inputs = DatasetInputs(_dataset(source, split), question)
    ids = input_ids(inputs)
    if not ids:
        raise ValueError(f"{source!r} holds nothing to answer")
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{source!r} has {len(repeated)} ids more than once, {repeated[0]!r} among them")
    return inputs


def input_ids(inputs: Sequence[BatchInput]) -> list[str]:
    """All ids, without reading a video."""
    return inputs.ids if isinstance(inputs, DatasetInputs) else [item.id for item in inputs]


def _folder_inputs(folder: Path, question: str | None) -> list[BatchInput]:
    if question is None:
        raise ValueError(f"{str(folder)!r} is a folder of videos: pass --question to ask about each")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{str(folder)!r} holds no video file ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return [BatchInput(_folder_id(file.relative_to(folder)), str(file), question) for file in files]


def _folder_id(path: Path) -> str:
    """A relative path for an id. One whose bytes are no UTF-8 is quoted, and starts as no relative path can."""
    name = path.as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        return "not-utf-8://" + quote_from_bytes(os.fsencode(name))
    return name


def _jsonl_inputs(path: Path, question: str | None) -> list[BatchInput]:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise ValueError(f"{str(path)!r} is one video: pass a folder of videos, or a JSONL file that names them")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no JSONL file ({error})") from error
    inputs = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error})") from error
        if not isinstance(item, dict):
            raise ValueError(f"{where}: expected an object with id, video and question")
        item = {"question": question} | item
        missing = [name for name in ("id", "video", "question") if not isinstance(item.get(name), (str, int))]
        if missing:
            raise ValueError(f"{where}: {' and '.join(missing)} missing")
        video = str(item["video"])
        if "://" not in video and not video.startswith("data:"):
            video = str(path.parent / video)
        inputs.append(BatchInput(str(item["id"]), video, str(item["question"])))
    return inputs


def _dataset(source: str, split: str):
    try:
        import datasets
    except ImportError as error:
        if Path(source).suffix or Path(source).is_absolute():
            raise FileNotFoundError(f"there is no folder and no file {source!r}") from error
        raise ImportError("reading a dataset needs datasets: pip install 'holitom-hf[batch]'") from error
    if Path(source).is_dir():
        found = datasets.load_from_disk(source)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"{source!r} has no split {split!r}, only {', '.join(found)}")
            found = found[split]
        return found
    if Path(source).suffix or Path(source).is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"there is no folder and no file {source!r}")
    check_dataset(source)
    try:
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        message = f"there is no folder and no file {source!r}, and no dataset of this name can be read: {error}"
        raise OSError(message) from error
