import pickle

import pytest
import torch

from dist_obdsd import checkpoint
from dist_obdsd.errors import InputError, RunError


def state(epoch: int, step: int = 0) -> dict:
    entries = dict.fromkeys(checkpoint.ENTRIES - {"format"})
    position = {"epoch": epoch, "step": step, "global_step": 10 * epoch + step}
    return entries | {"student": {"w": torch.full((3,), float(epoch))}, "position": position}


def test_what_was_saved_is_loaded_and_pointers_follow(tmp_path):
    for epoch in range(1, 6):
        checkpoint.save(tmp_path, state(epoch), best=epoch == 2, keep=1)
    assert checkpoint.load(tmp_path)["student"]["w"].tolist() == [5, 5, 5]
    assert checkpoint.load(tmp_path / "best")["position"]["epoch"] == 2
    assert sorted(file.name for file in tmp_path.glob("*.pt")) == ["epoch-0002.pt", "epoch-0004.pt", "epoch-0005.pt"]
    (tmp_path / "best").write_text("epoch-0002.pt\n")  # by hand
    checkpoint.save(tmp_path, state(5, 3), best=False, keep=1)
    assert checkpoint.find(tmp_path).name == "step-00000053.pt"
    assert checkpoint.find(tmp_path, "best").name == "epoch-0002.pt"


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), best=False, keep=2)

    def full(*args, **kwargs):
        args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="No space left on device.*previous one is intact"):
        checkpoint.save(tmp_path, state(2), best=False, keep=2)
    assert checkpoint.load(tmp_path)["position"]["epoch"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch-0001.pt", "last"]
    monkeypatch.undo()
    (tmp_path / ".epoch-0001.pt.123.writing").write_bytes(b"half")  # by a process that was killed
    checkpoint.save(tmp_path, state(1), best=False, keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["epoch-0001.pt", "last"]


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda data: b"", "cut short or another kind of file"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data.replace(torch.ones(3).numpy().tobytes(), bytes(12)), "damaged"),
        (lambda data: pickle.dumps({}), "another kind of file"),
    ],
    ids=["empty", "cut short", "damaged", "a pickle"],
)
def test_unreadable_files_are_refused(tmp_path, spoil, fact):
    path = checkpoint.save(tmp_path, state(1), best=False, keep=2)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=f"epoch-0001.pt.*{fact}"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "there is no checkpoint"),
        ({"state_dict": {}}, "format None"),
        ({"weights": torch.zeros(3)}, "holds plain weights.*model.pretrained"),
        ({"format": checkpoint.FORMAT}, "lacks best_validation"),
    ],
)
def test_foreign_and_missing_files_are_refused(tmp_path, content, fact):
    if content is not None:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=fact):
        checkpoint.load(tmp_path / "x.pt")


class Executes:
    def __reduce__(self):
        return (print, ("executed",))


def test_loading_never_executes(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Executes()}, path)
    assert pickle.loads(pickle.dumps(Executes())) is None
    assert "executed" in capsys.readouterr().out  # the control: unpickling it does execute
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out
