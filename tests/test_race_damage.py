"""Files that a full disk, an interrupted copy or a power cut left behind: mended, or named in one line."""

import json
import os
import re
import struct
import zipfile

import pytest
import torch
from lab import TINY, config, here, kfqn, one_line, without_clock

from kfqn.race.entrants import best_settings
from kfqn.race.failure import Failure
from kfqn.race.runs import Run
from kfqn.race.runs.train import train
from kfqn.race.runs.trainer import Trainer
from kfqn.race.sweep import load

EPOCHS = [{"epoch": k, "train_loss": 1 / k, "note": "é\u2028"} for k in (1, 2, 3)]
WHOLE = [*EPOCHS, {"status": "finished", "conditions": {}}]


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path, config(entrant="sgd", settings={"lr": 0.05}))
    run.write(WHOLE)
    return run


def test_of_lines_cut_anywhere_the_whole_ones_are_left(run):
    path = run.folder / "epochs.jsonl"
    content = path.read_bytes()
    ends = [n for n in range(len(content)) if content[n : n + 1] == b"\n"]
    assert run.records() == WHOLE
    assert not run.damaged()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        left = sum(end <= size for end in ends)  # a line is whole without its end as well
        assert run.records() == WHOLE[:left]
        assert run.damaged() == (size > 0 and size not in ends and size - 1 not in ends)
        assert (run.end() is None) == (left < len(WHOLE))


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ([b"\0" * 300], 0),
        ([b"\xff\xfe{}"], 0),
        ([b"3"], 0),
        ([b"[]"], 0),
        ([b"null", *WHOLE], 0),
        ([EPOCHS[1], EPOCHS[2], WHOLE[3]], 0),  # the start is lost
        ([EPOCHS[0], EPOCHS[2], WHOLE[3]], 1),  # a line is lost
        ([EPOCHS[0], EPOCHS[0]], 1),
        ([WHOLE[3]], 0),  # nothing finishes without an epoch
        ([*EPOCHS[:2], b'{"epoch": 3, "train_lo', WHOLE[3]], 2),
        ([*WHOLE, b"\0\0"], 4),
        ([{"status": "diverged", "reason": "in epoch 1"}], 1),
        ([{"status": "failed", "reason": "no data"}], 1),
    ],
)
def test_what_is_no_line_of_a_run_ends_its_records(run, lines, left):
    written = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (run.folder / "epochs.jsonl").write_bytes(b"\n".join(written) + b"\n")
    assert len(run.records()) == left
    assert run.damaged() == (left < len(lines))


@pytest.mark.parametrize("content", ["", "nan", "-1", "7", "0.5.5", "\0\0\0"])
def test_progress_that_is_no_share_is_none(run, content):
    (run.folder / "progress").write_text(content)
    assert run.fraction() == 0


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def overwritten(path, name):
    """One file of a torch archive with other bytes than its checksum says."""
    with zipfile.ZipFile(path) as archive:
        (inner,) = (info for info in archive.infolist() if info.filename.endswith(name))
    content = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", content, inner.header_offset + 26)
    start = inner.header_offset + 30 + name + extra
    content[start : start + 8] = b"\0" * 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 5000),
        lambda path: path.write_text("not a checkpoint"),
        lambda path: cut(path, 0.1),
        lambda path: cut(path, 0.99),
        lambda path: overwritten(path, "data.pkl"),
        lambda path: overwritten(path, "data/0"),
        None,
    ],
    ids=["empty", "zeros", "text", "a tenth", "nearly all", "structure", "numbers", "sound"],
)
@pytest.mark.parametrize("entrant", ["sgd", "soap"])
def test_a_run_goes_on_from_a_sound_checkpoint_and_anew_from_a_damaged_one(
    tmp_path, monkeypatch, harm, entrant
):
    settings = {"sgd": {"lr": 0.05}, "soap": {"lr": 0.01, "beta": 0.9}}[entrant]
    whole = Run.create(tmp_path / "whole", config(entrant=entrant, settings=settings))
    train(whole, None)
    run = Run.create(tmp_path / "cut", whole.config)
    monkeypatch.setattr("kfqn.race.runs.trainer.CHECKPOINT_SECONDS", 0.0)
    trainer = Trainer(run, None)

    def stop_at_two(records):
        run.write(records)
        if len(records) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "write", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    cut(run.folder / "epochs.jsonl", 0.7)
    if harm is not None:
        harm(run.checkpoint)
    done, step = [], Trainer.train_epoch

    def counted(self, epoch):
        done.append(epoch)
        step(self, epoch)

    monkeypatch.setattr(Trainer, "train_epoch", counted)
    train(run, None)
    assert done == ([2, 3] if harm is None else [1, 2, 3])
    assert without_clock(run.records()) == without_clock(whole.records())
    assert not run.damaged()


def test_a_checkpoint_that_fits_no_longer_is_named_and_kept(tmp_path):
    run = Run.create(tmp_path, config(entrant="sgd", settings={"lr": 0.05}))
    for content in ({}, [], {"model": {"0.weight": torch.zeros(1)}}):
        torch.save(content, run.checkpoint)
        train(run, None)
        reason = run.end()["reason"]
        assert reason.startswith(f"cannot go on from {run.checkpoint} (")
        assert "delete it to start the run anew" in reason
        assert "\n" not in reason
        assert run.checkpoint.exists()


def test_a_race_on_a_damaged_folder_from_the_command_line(tmp_path):
    """Real processes: what is lost is done again, what is sound is not, and the line says where.

    A run that fails is shown, and tried again by the same command.
    """
    sound = ["race", "--optimizers", "sgd:lr=0.05", "adam:lr=0.01,eps=1e-8"]
    race, scale = [*sound, "kfbfgs:lr=1,damping=1"], [*TINY, "--seeds", 1, "--jobs", 2, "--out", tmp_path]
    assert here(*sound, *scale).returncode == 0
    ours = Run.create(tmp_path / "runs", config(epochs=2))
    torch.save({"model": {}}, ours.checkpoint)  # whole, but of something else
    train(ours, None)
    assert ours.end()["status"] == "failed"
    assert "Traceback" in ours.end()["traceback"]
    sgd, adam = (Run(next((tmp_path / "runs").glob(f"{name}-*"))) for name in ("sgd", "adam"))
    before, kept = sgd.records(), (adam.folder / "epochs.jsonl").read_bytes()
    cut(sgd.folder / "epochs.jsonl", 0.8)
    (sgd.folder / "config.json").write_text('{"problem": ')
    (sgd.folder / "progress").write_bytes(b"")
    sgd.checkpoint.write_bytes(b"")
    with pytest.raises(Failure, match=r"config\.json is damaged .*: repeat the command"):
        _ = sgd.config
    result = kfqn(*race, *scale)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert f"cannot go on from {ours.checkpoint} (" in result.stdout
    assert "delete it to start the run anew" in result.stdout
    assert f"{sgd.folder / 'epochs.jsonl'} is damaged: what is sound is kept" in result.stdout
    assert "1 of 3 runs are done already" in result.stdout
    assert without_clock(sgd.records()) == without_clock(before)
    assert (adam.folder / "epochs.jsonl").read_bytes() == kept
    assert not sgd.checkpoint.exists()
    ours.checkpoint.unlink()
    assert here(*race, *scale).returncode == 0
    assert ours.end()["status"] == "finished"
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()], "half-written files"


@pytest.mark.skipif(os.name == "nt", reason="POSIX says it so")
@pytest.mark.parametrize("name", ["epochs.jsonl", "config.json"])
def test_what_is_no_file_is_named(tmp_path, name):
    race = ["race", "--optimizers", "sgd:lr=0.05", *TINY, "--seeds", 1, "--jobs", 1, "--out", tmp_path]
    here(*race)
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / name).unlink()
    (folder / name).mkdir()
    one_line(here(*race), str(folder / name), "Is a directory", "delete ")


def limit_of(size):
    """So many bytes a file, which stand for a full disk: writing beyond raises what a full disk raises."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
@pytest.mark.parametrize(("size", "name"), [(100, "config.json"), (700, "epochs.jsonl")])
def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on(tmp_path, size, name):
    race = ["race", "--optimizers", "sgd:lr=0.05", *TINY, "--seeds", 1, "--jobs", 1, "--out", tmp_path]
    if name == "epochs.jsonl":  # a worker writes these
        result = kfqn(*race, preexec_fn=lambda: limit_of(size))
    else:
        lift = limit_of(size)
        try:
            result = here(*race)
        finally:
            lift()
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert re.search(
        rf"^kfqn: cannot write \S+{name} \(File too large\): make room", result.stderr, re.MULTILINE
    )
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()], "half-written files"
    if name == "epochs.jsonl":
        assert here(*race).returncode == 0


ENTRY = {"scale": {}, "by": "train_loss", "best": {"lr": 0.1}, "points": [{"lr": 0.1, "status": "finished"}]}
SWEEPS = {
    "empty": "",
    "cut short": json.dumps({"digits": {"sgd": ENTRY}})[:40],
    "zeros": "\0" * 50,
    "a list": "[1]",
    "a number": "3",
    "a problem that is none": '{"digits": []}',
    "an entry that is none": '{"digits": {"sgd": 3}}',
    "settings that are none": json.dumps({"digits": {"sgd": ENTRY | {"best": 3}}}),
    "settings of words": json.dumps({"digits": {"sgd": ENTRY | {"best": {"lr": "high"}}}}),
    "points that are none": json.dumps({"digits": {"sgd": ENTRY | {"points": {}}}}),
    "points without an end": json.dumps({"digits": {"sgd": ENTRY | {"points": [{"lr": 1}]}}}),
}


@pytest.mark.parametrize("content", SWEEPS.values(), ids=SWEEPS)
def test_a_damaged_sweep_file_is_named_before_anything_runs(tmp_path, content):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    for command in (["race", "--optimizers", "sgd"], ["sweep", "--optimizers", "sgd"]):
        one_line(here(*command, "--out", tmp_path), f"{path} is no sweep file, or damaged (", "delete it")
    with pytest.raises(Failure, match="damaged"):
        load(path)
    assert path.read_text() == content
    assert [*tmp_path.iterdir()] == [path]


def test_a_sound_sweep_file_is_read(tmp_path):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"digits": {"sgd": ENTRY, "adam": ENTRY | {"best": None}}}))
    assert best_settings("digits", "sgd", path) == ({"lr": 0.1}, str(path))
    assert best_settings("digits", "adam", path)[1] == "the package's own sweep"
