"""CIFAR-10 from its official archives, binary or python, unpacked or not; downloaded if need be."""

import hashlib
import io
import pickle
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfqn.race.data import Dataset, Images
from kfqn.race.failure import Failure

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
IMAGE = 3 * 32 * 32  # bytes

Progress = Callable[[int, int], None]  # bytes done, bytes in all
ReadFile = Callable[[str], bytes]


def cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10 from ``data_dir``, which `find` must have found something in.

    Takes a folder with either official layout, the layout's own folder, or either archive.
    Raises Failure if there is none, or a file in it is damaged.
    """
    name, read = find(data_dir)
    parse = _parse_python if name == PYTHON else _parse_binary
    suffix = "" if name == PYTHON else ".bin"
    train = [parse(read(f"data_batch_{i}{suffix}"), f"data_batch_{i}{suffix}") for i in range(1, 6)]
    test = parse(read(f"test_batch{suffix}"), f"test_batch{suffix}")
    return Dataset(
        train=_images(train),
        test=_images([test]),
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        crop_padding=4,
    )


def found(data_dir: Path) -> bool:
    """Whether `find` finds anything in ``data_dir``."""
    try:
        find(data_dir)
    except Failure:
        return False
    return True


def find(data_dir: Path) -> tuple[str, ReadFile]:
    """Which layout is in ``data_dir``, and how to read one of its files."""
    for name, marker in ((BINARY, "test_batch.bin"), (PYTHON, "test_batch")):
        for folder in (data_dir / name, data_dir):
            if (folder / marker).is_file():
                return name, _folder_reader(folder)
    for name, archive in ((BINARY, ARCHIVE), (PYTHON, "cifar-10-python.tar.gz")):
        if (data_dir / archive).is_file():
            return name, _archive_reader(data_dir / archive, name)
    raise Failure(
        f"no CIFAR-10 in {data_dir}: give --data-dir a folder that holds {PYTHON}, {BINARY} or one of "
        "their archives, or leave --data-dir out to download it."
    )


def download(data_dir: Path, progress: Progress, url: str = URL, sha256: str = SHA256) -> Path:
    """Fetch the binary archive (170 MB) into ``data_dir``; it appears there whole and checked, or not at all.

    Raises Failure when the network, the disk or the checksum says no.
    """
    target = data_dir / ARCHIVE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=data_dir, prefix=".download-", delete=False) as partial:
            try:
                with urllib.request.urlopen(url, timeout=60) as response:
                    _copy_checked(response, partial, sha256, progress)
                partial.close()
                Path(partial.name).replace(target)
            finally:
                Path(partial.name).unlink(missing_ok=True)
    except (OSError, urllib.error.URLError) as error:
        raise Failure(
            f"could not download {url} to {data_dir} ({error}): fetch it by other means and give its "
            "folder with --data-dir."
        ) from error
    return target


def _copy_checked(response: Any, partial: Any, sha256: str, progress: Progress) -> None:
    total, done, digest = int(response.headers.get("Content-Length") or 0), 0, hashlib.sha256()
    while block := response.read(1 << 18):
        partial.write(block)
        digest.update(block)
        done += len(block)
        progress(done, total)
    if digest.hexdigest() != sha256:
        raise Failure(
            f"the download of {ARCHIVE} has SHA-256 {digest.hexdigest()} instead of {sha256}, so it was "
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


def _parse_binary(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One label byte and 3072 pixel bytes an image."""
    if not content or len(content) % (1 + IMAGE):
        raise Failure(f"{name} is damaged, {len(content)} bytes are no whole images: get the data set again.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + IMAGE)
    return rows[:, 1:], rows[:, 0]


def _parse_python(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with ``data`` and ``labels``."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        x, y = batch[b"data"].reshape(-1, IMAGE), np.asarray(batch[b"labels"], np.uint8)
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


def _images(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Images:
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images(torch.from_numpy(x).view(-1, 3, 32, 32), torch.from_numpy(y).long())
