"""Which runs a comparison is made of, and what it refuses before any of them starts."""

import pytest

from dist_obdsd.errors import InputError
from dist_obdsd.experiments.variants import Variant, baseline_of, plan, read_grid, read_seeds, read_variants

HOT = "hot:distillation.target=psd,distillation.temperature=2,data.crop_scale=[0.2,0.9]"


def test_variants_are_targets_or_settings():
    assert read_variants(f"none,{HOT},psd:distillation.weight=5") == [
        Variant("none", ("distillation.target=none",)),
        Variant("hot", ("distillation.target=psd", "distillation.temperature=2", "data.crop_scale=[0.2,0.9]")),
        Variant("psd", ("distillation.target=psd", "distillation.weight=5")),
    ]
    assert baseline_of(read_variants("psd,none")) == "none"
    assert baseline_of(read_variants("psd,obdsd")) == "psd"


def test_seeds_and_grids():
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
        (read_variants, "a/b:optim.lr=1", "called 'a/b'"),
        (read_variants, "a:optim.lr", "write NAME:key=value"),
        (read_variants, "none,none", "variant none twice"),
        (read_variants, "psd:distillation.target=none", "call it otherwise"),
        (read_variants, "", "called ''"),
        (read_seeds, "three", "how many, such as 3"),
        (read_seeds, "0", "names no seeds"),
        (read_seeds, "1,1", "--seeds has 1 twice"),
        (read_grid, ["optim.lr"], "not of the form key=value,value"),
        (read_grid, ["optim.lr=1,1"], "the value 1 twice"),
        (read_grid, ["epochs=2", "epochs=3"], "epochs twice"),
    ],
)
def test_what_cannot_be_read(read, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read(text)


def test_every_run_has_its_name_settings_and_command(folder):
    variants, grid = read_variants(f"none,{HOT}"), read_grid(["epochs=2,4"])
    specs = plan(folder / "tiny.yaml", ["name=study", "max_steps=4"], variants, [0, 3], grid)
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
        ([], "a:optim.lr=1", ["optim.lr=1,2"], "by --grid and by the variant a"),
        (["optim.lr=1"], "none", ["optim.lr=1,2"], "by --grid and by the command line"),
        ([], "a:optim.lr=0.1,b:optim.lr=1e-1", [], "the variants a and b have the same settings"),
        ([], "none", ["data.mean=[0.1],[0.1 ]"], "would share the run folder"),
        ([], "none", ["optim.lr=-1,1"], "optim.lr is -1"),
    ],
)
def test_what_cannot_be_planned(folder, overrides, variants, grid, sentence):
    with pytest.raises(InputError, match=sentence):
        plan(folder / "tiny.yaml", overrides, read_variants(variants), [0], read_grid(grid))
