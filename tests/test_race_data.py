"""The images: both layouts of CIFAR-10 and CIFAR-100, the download, the augmentation, the digits."""

import hashlib
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from kfqn.race.failure import Failure
from kfqn.race.problems import cifar
from kfqn.race.problems.data import Images, crop_and_flip, digits

PER_BATCH = 4


@pytest.fixture
def pixels():
    """Six batches of images and labels: five to train, one to test."""
    generator = np.random.default_rng(0)
    return [
        (
            generator.integers(256, size=(PER_BATCH, 3072), dtype=np.uint8),
            generator.integers(10, size=PER_BATCH),
        )
        for _ in range(6)
    ]


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_binary(folder, pixels):
    folder.mkdir(parents=True)
    for name, (x, y) in zip(NAMES, pixels, strict=True):
        (folder / f"{name}.bin").write_bytes(np.hstack([y[:, None].astype(np.uint8), x]).tobytes())


def write_python(folder, pixels):
    folder.mkdir(parents=True)
    for name, (x, y) in zip(NAMES, pixels, strict=True):
        content = {b"data": x, b"labels": [int(label) for label in y], b"batch_label": b"testing"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def halves(pixels):
    """The same images as CIFAR-100 splits them: one file to train, one to test."""
    train = tuple(np.concatenate(parts) for parts in zip(*pixels[:5], strict=True))
    return {"train": train, "test": pixels[5]}


def write_binary_100(folder, pixels):
    """A coarse label, which must not be read, before the fine one."""
    folder.mkdir(parents=True)
    for name, (x, y) in halves(pixels).items():
        labels = np.stack([np.full_like(y, 77), y], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, x]).tobytes())


def write_python_100(folder, pixels):
    folder.mkdir(parents=True)
    for name, (x, y) in halves(pixels).items():
        content = {b"data": x, b"fine_labels": [int(label) for label in y], b"coarse_labels": [0] * len(y)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


LAYOUTS = {
    "cifar-10-batches-bin": (cifar.CIFAR_10, write_binary, "cifar-10-binary.tar.gz"),
    "cifar-10-batches-py": (cifar.CIFAR_10, write_python, "cifar-10-python.tar.gz"),
    "cifar-100-binary": (cifar.CIFAR_100, write_binary_100, "cifar-100-binary.tar.gz"),
    "cifar-100-python": (cifar.CIFAR_100, write_python_100, "cifar-100-python.tar.gz"),
}


@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_layout_in_any_form_gives_the_same_images(layout, form, pixels, tmp_path):
    source, write, archive = LAYOUTS[layout]
    write(tmp_path / layout, pixels)
    where = tmp_path
    if form == "folder":
        where = tmp_path / layout
    elif form == "archive":
        where = tmp_path / "archive"
        where.mkdir()
        with tarfile.open(where / archive, "w:gz") as tar:
            tar.add(tmp_path / layout, layout)
    data = source.load(where)
    assert torch.equal(data.train.x.flatten(1), torch.from_numpy(np.concatenate([x for x, _ in pixels[:5]])))
    assert torch.equal(data.train.y, torch.from_numpy(np.concatenate([y for _, y in pixels[:5]])))
    assert torch.equal(data.test.x.flatten(1), torch.from_numpy(pixels[5][0]))
    assert data.test.x.shape == (PER_BATCH, 3, 32, 32)
    assert data.classes == source.classes


def test_the_two_data_sets_are_not_taken_for_each_other(pixels, tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin", pixels)
    assert cifar.CIFAR_10.found(tmp_path)
    assert not cifar.CIFAR_100.found(tmp_path)
    with pytest.raises(Failure, match=r"no CIFAR-100 in .*: give --data-dir a folder"):
        cifar.CIFAR_100.load(tmp_path)


def test_pickles_of_python_2_and_old_numpy_are_read(pixels):
    """The official files name numpy.core.multiarray, which newer numpy has moved."""
    x, _ = pixels[0]
    content = pickle.dumps({b"data": x, b"labels": [1] * PER_BATCH}, protocol=2)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert torch.equal(torch.from_numpy(cifar._parse_python(old, "old", b"labels")[0]), torch.from_numpy(x))


def test_a_missing_or_damaged_file_is_one_line_that_says_what_to_do(pixels, tmp_path):
    with pytest.raises(Failure, match=r"no CIFAR-10 in .*: give --data-dir a folder"):
        cifar.CIFAR_10.load(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, pixels)
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(Failure, match=r"data_batch_3.bin is damaged, 5 bytes are no whole images"):
        cifar.CIFAR_10.load(tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(Failure, match=r"cannot read .*data_batch_3.bin"):
        cifar.CIFAR_10.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cifar-10-binary.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(Failure, match="delete it and get it again"):
        cifar.CIFAR_10.load(tmp_path / "other")
    archive = tmp_path / "other" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    with pytest.raises(Failure, match=r"holds no data_batch_3.bin"):
        cifar.CIFAR_10.load(tmp_path / "other")
    archive.write_bytes(archive.read_bytes()[:2000] + bytes(500))
    with pytest.raises(Failure, match="delete it and get it again"):
        cifar.CIFAR_10.load(tmp_path / "other")


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps([1]), pickle.dumps({}), b"", b"x"])
def test_a_pickle_can_hold_nothing_but_arrays(content, capsys):
    with pytest.raises(Failure, match="is damaged"):
        cifar._parse_python(content, "data_batch_1", b"labels")
    assert capsys.readouterr().out == ""


def test_a_download_is_there_whole_and_checked_or_not_at_all(tmp_path):
    home, seen = tmp_path / "home", []
    home.mkdir()
    content = bytes(range(256)) * 4000
    (home / "cifar-100-binary.tar.gz").write_bytes(content)
    source = replace(cifar.CIFAR_100, sha256=hashlib.sha256(content).hexdigest())
    target = source.download(tmp_path / "new", lambda *p: seen.append(p), home.as_uri())
    assert target.read_bytes() == content
    assert seen[-1] == (1024000, 1024000)

    wrong = replace(source, sha256="0000")
    with pytest.raises(Failure, match="instead of 0000, so it was thrown away"):
        wrong.download(tmp_path / "bad", lambda *_: None, home.as_uri())
    with pytest.raises(Failure, match=r"could not download .* fetch it by other means"):
        source.download(tmp_path / "gone", lambda *_: None, (tmp_path / "nothing").as_uri())

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.download(tmp_path / "stopped", interrupt, home.as_uri())
    for folder in ("bad", "gone", "stopped"):
        assert list((tmp_path / folder).iterdir()) == []


def test_crops_are_windows_of_the_padded_image_and_half_are_mirrored():
    n, padding = 400, 2
    x = torch.randint(1, 256, (n, 3, 5, 6), dtype=torch.uint8)
    got = crop_and_flip(x, padding, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    windows = {
        (i, j, flip): (padded.flip(3) if flip else padded)[:, :, i : i + 5, j : j + 6]
        for i in range(5)
        for j in range(5)
        for flip in (False, True)
    }
    matches = {key: (got == window).flatten(1).all(1) for key, window in windows.items()}
    assert torch.stack([*matches.values()]).sum(0).eq(1).all()  # each is exactly one of the 50
    counts = torch.tensor([m.sum() for m in matches.values()])
    assert counts.min() > 0
    mirrored = sum(m.sum() for (_, _, flip), m in matches.items() if flip)
    assert 150 < mirrored < 250
    assert torch.equal(got, crop_and_flip(x, padding, torch.Generator().manual_seed(0)))


def test_digits_are_the_real_ones_normalised_and_batched():
    data = digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.train.x.shape[1:] == (1, 8, 8)
    x = data.normalised(data.train.x)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    batches = list(data.training_batches(100, torch.Generator().manual_seed(3)))
    assert [len(y) for _, y in batches] == [100] * 14
    again = list(data.training_batches(100, torch.Generator().manual_seed(3)))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    assert torch.equal(torch.cat([y for _, y in data.in_order(data.test, 70)]), data.test.y)
    assert len(data.to(torch.device("cpu"), train_size=50).train) == 50


def test_images_first():
    images = Images(torch.zeros(5, 1, 2, 2), torch.arange(5))
    assert len(images.first(2)) == 2
    assert len(images.first(None)) == 5
