"""torch.compile in training, and going on without it."""

import copy
import logging
import logging.handlers
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from dist_obdsd.config import override_config, parse_config
from dist_obdsd.distributed import collectives
from dist_obdsd.errors import InputError
from dist_obdsd.models.precision import check_precision, compile_in_place
from tests import harness, runs

NO_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler here"
)


def settle(broken: int) -> list[str]:
    """Compile where one rank finds no compiler; the others only seem to compile, which costs nothing."""
    said = logging.handlers.BufferingHandler(99)
    logging.getLogger("dist_obdsd.models.precision").addHandler(said)
    logging.getLogger("dist_obdsd").setLevel("INFO")
    net, images = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)), torch.zeros(2, 1, 8, 8)
    before = copy.deepcopy(net.state_dict())
    here = collectives.rank() == broken
    if not here:
        net.compile = lambda **options: None
    with patch.dict(os.environ, {"PATH": "/no/such/folder"} if here else {}):
        compile_in_place({net: nullcontext()}, images)
    assert net._compiled_call_impl is None  # so calls run the network itself
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    return [record.getMessage() for record in said.buffer]


def test_where_one_rank_cannot_compile_all_go_on_without() -> None:
    for (line,) in harness.run(2, settle, 1):
        assert re.fullmatch(r"model.compile=true does not work on rank 1 \(.+: .+\); all ranks go on without it", line)
    assert harness.run(2, settle, 2) == [[], []]


def test_bf16_is_refused_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load(runs.CONFIG)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    for overrides, mend in (
        (["precision=bf16"], "^precision=bf16 but Old GPU .* float32$"),
        (["precision=float32", "distillation.teacher_precision=bf16"], "^distillation.teacher_precision=bf16 .* same$"),
    ):
        config = parse_config(override_config(raw, overrides), "x")
        check_precision(config, torch.device("cpu"))
        with pytest.raises(InputError, match=mend):
            check_precision(config, torch.device("cuda", 0))
    check_precision(parse_config(raw, "x"), torch.device("cuda", 0))


TINY = """
from torch import nn
def tiny(channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 4, stride=4), nn.ReLU())
"""


@NO_COMPILER
def test_a_compiled_run_is_the_same_up_to_rounding(folder: Path) -> None:
    (folder / "tiny_net.py").write_text(TINY)
    common = ("precision=float32", "epochs=2", "max_steps=6", "optim.lr=1e-5", "distillation.target=none",
              "model.backbone=tiny_net:tiny")  # fmt: skip
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    runs.train(folder, "name=plain", *common)
    done = runs.train(folder, "name=compiled", *common, "model.compile=true", env=cache)
    assert "does not work" not in done.stdout
    assert any((folder / "cache").rglob("*.so"))  # something was compiled
    rows = [[row["ranking"] for row in runs.metrics(folder / "runs" / name, "step")] for name in ("plain", "compiled")]
    assert rows[1] == pytest.approx(rows[0], abs=1e-4)
    assert len(set(rows[0])) > 1
