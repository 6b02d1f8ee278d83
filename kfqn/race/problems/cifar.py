"""CIFAR-10 and CIFAR-100 from their official archives, binary or python, unpacked or not, or downloaded."""

import hashlib
import io
import pickle
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfqn.race.failure import Failure
from kfqn.race.problems.data import Dataset, Images

HOME = "https://www.cs.toronto.edu/~kriz"
IMAGE = 3 * 32 * 32  # bytes

Progress = Callable[[int, int], None]  # bytes done, bytes in all
ReadFile = Callable[[str], bytes]
Arrays = tuple[np.ndarray, np.ndarray]  # pixels and labels


@dataclass(frozen=True)
class Layout:
    """One official form: the folder its archive unpacks to, and the names of its files."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    parse: Callable[[bytes, str], Arrays]


@dataclass(frozen=True)
class Cifar:
    """A data set in its two forms; the binary archive is the one that is downloaded, and checked."""

    title: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    binary: Layout
    python: Layout
    sha256: str

    def load(self, data_dir: Path) -> Dataset:
        """The data set from ``data_dir``, which `find` must have found something in.

        Takes a folder with either official layout, the layout's own folder, or either archive.
        Raises Failure if there is none, or a file in it is damaged.
        """
        layout, read = self.find(data_dir)
        train = [layout.parse(read(name), name) for name in layout.train]
        test = layout.parse(read(layout.test), layout.test)
        return Dataset(
            train=_images(train),
            test=_images([test]),
            classes=self.classes,
            mean=self.mean,
            std=self.std,
            crop_padding=4,
        )

    def found(self, data_dir: Path) -> bool:
        """Whether `find` finds anything in ``data_dir``."""
        try:
            self.find(data_dir)
        except Failure:
            return False
        return True

    def find(self, data_dir: Path) -> tuple[Layout, ReadFile]:
        """Which layout is in ``data_dir``, and how to read one of its files."""
        for layout in (self.binary, self.python):
            for folder in (data_dir / layout.folder, data_dir):
                if (folder / layout.test).is_file():
                    return layout, _folder_reader(folder)
        for layout in (self.binary, self.python):
            if (data_dir / layout.archive).is_file():
                return layout, _archive_reader(data_dir / layout.archive, layout.folder)
        raise Failure(
            f"no {self.title} in {data_dir}: give --data-dir a folder that holds {self.python.folder}, "
            f"{self.binary.folder} or one of their archives, or leave --data-dir out to download it."
        )

    def download(self, data_dir: Path, progress: Progress, home: str = HOME) -> Path:
        """Fetch the binary archive into ``data_dir``; it appears there whole and checked, or not at all.

        Raises Failure when the network, the disk or the checksum says no.
        """
        target, url = data_dir / self.binary.archive, f"{home}/{self.binary.archive}"
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=data_dir, prefix=".download-", delete=False) as file:
                try:
                    with urllib.request.urlopen(url, timeout=60) as response:
                        _copy_checked(response, file, self.sha256, progress)
                    file.close()
                    Path(file.name).replace(target)
                finally:
                    Path(file.name).unlink(missing_ok=True)
        except (OSError, urllib.error.URLError) as error:
            raise Failure(
                f"could not download {url} to {data_dir} ({error}): fetch it by other means and give its "
                "folder with --data-dir."
            ) from error
        return target


def _copy_checked(response: Any, file: Any, sha256: str, progress: Progress) -> None:
    total, done, digest = int(response.headers.get("Content-Length") or 0), 0, hashlib.sha256()
    while block := response.read(1 << 18):
        file.write(block)
        digest.update(block)
        done += len(block)
        progress(done, total)
    if digest.hexdigest() != sha256:
        raise Failure(
            f"the download has SHA-256 {digest.hexdigest()} instead of {sha256}, so it was "
            "thrown away: try again, or fetch it by other means and give its folder with --data-dir."
        )


def _folder_reader(folder: Path) -> ReadFile:
    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            raise Failure(
                f"cannot read {folder / name} ({error.strerror}): unpack the data set again."
            ) from error

    return read


def _archive_reader(archive: Path, folder: str) -> ReadFile:
    files: dict[str, bytes] = {}  # all of them, at the first read: unpacking takes seconds
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.startswith(f"{folder}/") else None
                if content is not None:
                    files[member.name.removeprefix(f"{folder}/")] = content.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise Failure(f"cannot read {archive} ({error}): delete it and get it again.") from error

    def read(name: str) -> bytes:
        if name not in files:
            raise Failure(f"{archive} holds no {name}: delete it and get it again.")
        return files[name]

    return read


def _parse_binary(content: bytes, name: str, labels: int) -> Arrays:
    """``labels`` label bytes, the class last, and 3072 pixel bytes an image."""
    if not content or len(content) % (labels + IMAGE):
        raise Failure(f"{name} is damaged, {len(content)} bytes are no whole images: get the data set again.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, labels + IMAGE)
    return rows[:, labels:], rows[:, labels - 1]


def _parse_python(content: bytes, name: str, labels: bytes) -> Arrays:
    """A pickled dictionary with ``data`` and, under ``labels``, the classes."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        x, y = batch[b"data"].reshape(-1, IMAGE), np.asarray(batch[labels], np.uint8)
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise Failure(f"{name} is damaged ({error}): get the data set again.") from error
    return x, y


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and nothing else: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "scalar",
            "_frombuffer",
        ):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")


def _images(parts: Iterable[Arrays]) -> Images:
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images(torch.from_numpy(x).view(-1, 3, 32, 32), torch.from_numpy(y).long())


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

CIFAR_10 = Cifar(
    title="CIFAR-10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    binary=Layout(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train=tuple(f"{name}.bin" for name in _BATCHES),
        test="test_batch.bin",
        parse=partial(_parse_binary, labels=1),
    ),
    python=Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=_BATCHES,
        test="test_batch",
        parse=partial(_parse_python, labels=b"labels"),
    ),
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)

CIFAR_100 = Cifar(
    title="CIFAR-100",
    classes=100,
    mean=(0.507, 0.487, 0.441),
    std=(0.267, 0.256, 0.276),
    binary=Layout(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train=("train.bin",),
        test="test.bin",
        parse=partial(_parse_binary, labels=2),
    ),
    python=Layout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test="test",
        parse=partial(_parse_python, labels=b"fine_labels"),
    ),
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
