"""Which runs a comparison is made of, and what it refuses before any of them starts."""

from pathlib import Path

import pytest

from dist_obdsd.errors import InputError
from dist_obdsd.experiments.variants import Variant, baseline_of, plan, read_grid, read_seeds, read_variants
from tests import runs

HOT = "hot:distillation.target=psd,distillation.temperature=2,data.crop_scale=[0.2,0.9]"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(runs.CONFIG)
    return tmp_path / "tiny.yaml"


def test_variants_are_targets_or_settings() -> None:
    assert read_variants(f"none,{HOT},psd:distillation.weight=5") == [
        Variant("none", ("distillation.target=none",)),
        Variant("hot", ("distillation.target=psd", "distillation.temperature=2", "data.crop_scale=[0.2,0.9]")),
        Variant("psd", ("distillation.target=psd", "distillation.weight=5")),
    ]
    assert baseline_of(read_variants("psd,none")) == "none"
    assert baseline_of(read_variants("psd,obdsd")) == "psd"


def test_seeds_and_grids() -> None:
    assert read_seeds("3") == [0, 1, 2]
    assert read_seeds("4,7") == [4, 7]
    assert read_seeds("4,") == [4]
    assert read_grid([]) == [()]
    assert read_grid(["optim.lr=1e-3,1e-4", "epochs=2,4"]) == [
        ("optim.lr=1e-3", "epochs=2"), ("optim.lr=1e-3", "epochs=4"),
        ("optim.lr=1e-4", "epochs=2"), ("optim.lr=1e-4", "epochs=4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (read_variants, "none,fine", "'fine', which is no target"),
        (read_variants, "optim.lr=1", "write NAME:optim.lr=1"),
        (read_variants, "none,optim.lr=1", "write NAME:optim.lr=1"),
        (read_variants, "a/b:optim.lr=1", "called 'a/b'"),
        (read_variants, "a:optim.lr", "write NAME:key=value"),
        (read_variants, "none,none", "variant none twice"),
        (read_variants, "psd:distillation.target=none", "call it otherwise"),
        (read_variants, "", "called ''"),
        (read_seeds, "three", "how many, such as 3"),
        (read_seeds, "0", "names no seeds"),
        (read_seeds, "-1", "names no seeds"),
        (read_seeds, "1,1", "--seeds has 1 twice"),
        (read_grid, ["optim.lr"], "not of the form key=value,value"),
        (read_grid, ["optim.lr=1,"], "not of the form key=value,value"),
        (read_grid, ["optim.lr=1,1"], "the value 1 twice"),
        (read_grid, ["epochs=2", "epochs=3"], "epochs twice"),
    ],
)
def test_what_cannot_be_read(read, text, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        read(text)
    assert sentence in str(caught.value)


def test_every_run_has_its_name_settings_and_command(config: Path) -> None:
    specs = plan(config, ["name=study", "max_steps=4"], read_variants(f"none,{HOT}"), [0, 3], read_grid(["epochs=2,4"]))
    assert [spec.config.name for spec in specs[:4]] == [
        "study-none-epochs2-seed0", "study-none-epochs2-seed3", "study-none-epochs4-seed0", "study-none-epochs4-seed3",
    ]  # fmt: skip
    last = specs[-1]
    assert (last.label, last.seed) == ("hot epochs=4", 3)
    assert (last.config.epochs, last.config.seed, last.config.max_steps) == (4, 3, 4)
    assert last.config.distillation.temperature == 2
    assert last.overrides == (
        "max_steps=4", "distillation.target=psd", "distillation.temperature=2", "data.crop_scale=[0.2,0.9]", "epochs=4",
        "seed=3", "name=study-hot-epochs4-seed3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "variants", "grid", "sentence"),
    [
        (["seed=1"], "none", [], "sets seed itself, from --seeds"),
        ([], "a:name=x", [], "sets name itself"),
        ([], "none", ["seed=1,2"], "sets seed itself"),
        ([], "a:optim.lr=1", ["optim.lr=1,2"], "by --grid and by the variant a"),
        (["optim.lr=1"], "none", ["optim.lr=1,2"], "by --grid and by the command line"),
        ([], "a:optim.lr=0.1,b:optim.lr=1e-1", [], "the variants a and b have the same settings"),
        ([], "none", ["data.mean=[0.1],[0.1 ]"], "would share the run folder"),
        ([], "none", ["optim.lr=-1,1"], "optim.lr is -1"),
        ([], "none,a:optim.speed=1", [], "did you mean"),
    ],
)
def test_what_cannot_be_planned(config: Path, overrides, variants: str, grid, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(config, overrides, read_variants(variants), [0], read_grid(grid))
    assert sentence in str(caught.value)
