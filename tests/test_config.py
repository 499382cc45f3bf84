import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from dist_obdsd.config import changed_settings, load_config, override_config, parse_config, ranking, registry
from dist_obdsd.config.load import setting_types
from dist_obdsd.config.signature import read_source
from dist_obdsd.data.from_config import check_world_size
from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.errors import InputError

MINIMAL = {"name": "x", "epochs": 3, "data": {"shards": "data/x"}}


def parse(*overrides: str):
    return parse_config(override_config(MINIMAL, overrides), "x.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=str)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(("size", "lanes"), [(112, 8), (128, 64), (1024, 64), (96, 16), (98, 1)])
def test_auto_lanes_are_resolved_to_a_number(size, lanes):
    config = parse("data.lanes=auto", f"batch.global_size={size}")
    assert config.model_dump()["data"]["lanes"] == lanes
    assert parse().data.lanes == 8  # what a config without the setting has always had
    with pytest.raises(InputError, match="batch.global_size"):
        parse("data.lanes=auto", f"batch.global_size={size - 1}")


@pytest.mark.parametrize(
    ("ranks", "overrides", "change"),
    [
        (16, (), "set batch.global_size=128 data.lanes=auto from"),
        (16, ("batch.global_size=128",), "set data.lanes=auto from"),
        (7, (), "set data.lanes=7 from"),
    ],
)
def test_ranks_that_do_not_fit_get_all_settings_at_once(ranks, overrides, change):
    with pytest.raises(InputError, match=change) as caught:
        check_world_size(parse(*overrides), ranks)
    assert "one of [1, 2, 4, 8] ranks" in str(caught.value)
    settings = change.removeprefix("set ").removesuffix(" from").split()
    check_world_size(parse(*overrides, *settings), ranks)  # the advice serves


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("lr", "override"),
        ("=3", "override"),
        ("epochs.more=3", "override"),
        ("optim.lr=[1", "override"),
        ("data.lane=4", "unknown setting data.lane; did you mean data.lanes?"),
        ("batch.global_size=113", "set it to 112 or 114"),
        ("batch.global_size=2", "at least two"),
        ("data.lanes=3", "set data.lanes to one of [1, 2, 4, 7, 8, 14, 28, 56]"),
        ("epochs=1", "set epochs to 2 or more, or distillation.target=none"),
        ("distillation.target=odbsd", "distillation.target is 'odbsd'"),
        ("data.mean=[0.1,0.2]", "data.mean has 2 values; give one, or data.channels=3 of them"),
        ("optim.schedule=step", "optim.schedule is step and optim.milestones []"),
        ("data.resize=100", "set data.resize to at least 224"),
        ("data.decode=gpu", "data.decode is 'gpu'"),
        ("data.std=[0, 1, 1]", "data.std.0 is 0: input should be greater than 0"),
        ("name=../up", "name is '../up'"),
        ("optim.lr=.nan", "optim.lr is nan"),
        ("evaluation.recall_at=[]", "evaluation.recall_at is empty; give at least 1"),
        ("seed=1:30", "seed is '1:30'"),
        ("validation={fraction: 0.1, folds: 5}", "validation.fraction and validation.folds both say what to hold out"),
        ("validation={folds: 5, fold: 5}", "validation.fold=5 but validation.folds is 5"),
        ("validation.fold=1", "validation.fold=1 but validation.folds is unset"),
        ("validation.classes=none.txt", "cannot read none.txt: No such file or directory; give a list of names, or"),
        ("validation.folds=2 evaluation.metrics=[recall]", "chosen by map@r; add it to evaluation.metrics"),
        ("evaluation.select_by=recall@3 validation.fraction=0.25", "a recall@k also to evaluation.recall_at"),
        ("evaluation.select_by=rho_spectrum", "cannot choose an epoch"),
        ("evaluation.test=false evaluation.best_test=true", "set evaluation.test=true"),
        ("evaluation.metrics=[recal]", "evaluation.metrics is 'recal'"),
        ("validation.patience=3", "classes; set validation.fraction"),
        ("model.backbone=resnet99", "set it to small_cnn, a classifier of torchvision such as resnet"),
        ("model.backbone=timm/resnot", "timm has no model resnot"),
        ("model.backbone=timm/test_vit model.pretrained=timm:v9", "timm has no weights v9"),
        ("model.backbone=timm/test_vit model.pretrained=torchvision", "torchvision has no weights for"),
        ("model.checkpoint_blocks=true model.norm=batch", "set model.norm=frozen"),
        ("data.augment=blur", "'blur' is none of none, crop, strong, affine"),
        ("data.fit=pad data.resize=256", "data.resize is for data.fit=crop"),
        ("ranking.name=triplet ranking.alpha=3", "unknown setting ranking.alpha; the loss triplet has name, margin"),
        ("ranking.name=tripplet", "ranking.name must be one of multi_similarity, contrastive"),
    ],
)
def test_a_mistake_is_refused_with_the_mend(override, sentence):
    with pytest.raises(InputError) as caught:
        parse(*re.split(r" (?=[a-z_.]+=)", override))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_have_gone_are_dropped_where_that_changes_no_result():
    assert parse("data.decode=cpu", "checkpoint.background=true").model_dump() == parse().model_dump()


def test_overrides_hold_numbers_lists_and_null():
    settings = parse("optim.lr=1e-3", "evaluation.recall_at=[1, 10]", "optim.clip_norm=null", "data.cache=null")
    assert (settings.optim.lr, settings.evaluation.recall_at) == (1e-3, (1, 10))
    assert (settings.optim.clip_norm, settings.data.cache) == (None, None)
    assert parse("model.norm=sync", "model.channels_last=true", "debug=yes").debug
    loss = parse("ranking.name=pml.X", "ranking.kwargs.a=007", "ranking.kwargs.b=7", "ranking.kwargs.c={d: [1.5, no]}")
    assert loss.ranking.kwargs == {"a": "007", "b": 7, "c": {"d": [1.5, "no"]}}
    assert MINIMAL == {"name": "x", "epochs": 3, "data": {"shards": "data/x"}}


TYPED = ["photos #2", "a: b", "[old] photos", "*star", "&a", "'quoted'", '"x"', "{a}", "2024", "1e3", "007", "1:30",
         "no", "null", "2024-01-01", "% x", "a=b", " x ", "!tag", "| x", "@x", "ß\\n"]  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_a_text_setting_takes_what_was_typed(text, tmp_path):
    settings = parse(f"data.shards={text}", f"tracking.experiment={text}", f"deepspeed.config={text}")
    assert (settings.data.shards, settings.tracking.experiment) == (text, text)
    assert settings.deepspeed.config == (None if text == "null" else text)
    (tmp_path / "x.yaml").write_text(settings.to_yaml())
    again = load_config(tmp_path / "x.yaml")
    assert again == settings
    assert again.digest() == settings.digest() != parse().digest()
    recipe = load_recipe("folder", [f"options.splits.train={text}", f"description={text}"])
    assert recipe.options["splits"]["train"] == recipe.description == text


def test_names_of_digits_are_taken_on_the_command_line_and_explained_in_a_file(tmp_path):
    assert parse("name=2024", "tracking.experiment=7").run_dir == Path("runs/2024")
    (tmp_path / "x.yaml").write_text("{name: 2024, epochs: 2, data: {shards: 7}, tracking: {experiment: 1.5}}")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "x.yaml")
    assert all(f'quotes: "{number}"' in str(caught.value) for number in (2024, 7, 1.5))


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "names").write_text("a\n")
    settings = parse("output=~/runs", "data.shards=~/data", "data.cache=~", "validation.classes=~/names")
    assert (settings.output, settings.data.shards) == (f"{tmp_path}/runs", f"{tmp_path}/data")
    assert (settings.data.cache, settings.validation.classes) == (None, ("a",))
    assert parse("data.shards=http://x/~a/b").data.shards == "http://x/~a/b"


@pytest.mark.parametrize("read", [load_config, load_recipe])
def test_a_key_that_comes_twice_is_refused(read, tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\ndata:\n  shards: a\n  'shards': b\n")
    with pytest.raises(InputError, match="shards stands in line 3 and again in line 4"):
        read(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "fact"), [(None, "cannot read the config"), ("- 1\n", "not a mapping"), ("a: [1\n", "not valid YAML")]
)
def test_a_missing_or_broken_file_is_refused(text, fact, tmp_path):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=fact):
        load_config(tmp_path / "x.yaml")


def test_only_what_cannot_change_a_result_may_change_on_resume():
    old = parse().model_dump(mode="json")
    harmless = parse("data.workers=0", "tracking.kind=none", "threads=2", "data.shards=elsewhere")
    assert changed_settings(old, harmless.model_dump(mode="json")) == []
    other = parse("optim.lr=0.5", "epochs=4", "data.lanes=4").model_dump(mode="json")
    assert changed_settings(old, other) == ["data.lanes: 8 -> 4", "epochs: 3 -> 4", "optim.lr: 1e-05 -> 0.5"]
    del old["optim"]["head_scale"]  # of an older version, which had the default
    assert changed_settings(old, parse("optim.head_scale=2").model_dump(mode="json")) == [
        "optim.head_scale: 1.0 -> 2.0"
    ]


def test_validation_classes_are_a_list_or_a_file_of_names(tmp_path):
    names = ("12", "Ram C/V Cargo Van", "ß")
    (tmp_path / "names.txt").write_bytes("\ufeff12\r\n\n Ram C/V Cargo Van \nß".encode())
    assert parse("validation.classes=[12, Ram C/V Cargo Van, ß]").validation.classes == names
    from_file = parse(f"validation.classes={tmp_path / 'names.txt'}")
    assert from_file.validation.classes == names
    assert from_file.validation.holds_out
    assert not parse().validation.holds_out
    # What is saved needs the file no more.
    (tmp_path / "names.txt").write_text("\n")
    assert parse_config(from_file.model_dump(mode="json"), "again") == from_file
    with pytest.raises(InputError, match=r"names.txt holds no names"):
        parse(f"validation.classes={tmp_path / 'names.txt'}")


def test_reading_a_config_imports_no_torch():
    code = "import sys; from dist_obdsd.config import load_config; load_config('configs/cub200.yaml')"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


REGISTRIES = [registry.LOSSES, registry.TARGETS, registry.BACKBONES, registry.STRATEGIES]


@pytest.mark.parametrize(("parts", "name"), [(parts, name) for parts in REGISTRIES for name in parts.paths])
def test_a_registered_part_is_read_as_it_is_imported(parts, name):
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    source, part = parts.source(name), parts.load(name)
    assert source.summary == inspect.getdoc(part).partition("\n")[0]
    positional = {
        name: parameter.default if parameter.default is not parameter.empty else ...
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    if parts is registry.LOSSES:
        assert {setting.name: setting.default for setting in source.settings} == positional
        assert all(setting.meaning for setting in source.settings)


def test_a_loss_is_added_by_its_file_and_its_line(tmp_path, monkeypatch):
    (tmp_path / "flat_loss.py").write_text(
        "class FlatLoss(LearnableLoss):\n"
        '    """Zero everywhere."""\n\n'
        "    def __init__(self, height: Positive = 2.0, *, classes: int) -> None:\n"
        '        """\n        Args:\n            height: of the plain,\n                in metres.\n        """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = read_source("flat_loss:FlatLoss")
    (height,) = source.settings
    assert (source.summary, source.bases, source.arguments) == ("Zero everywhere.", {"LearnableLoss"}, {"classes"})
    assert (height.name, height.default, height.meaning) == ("height", 2.0, "of the plain, in metres.")
    monkeypatch.setitem(registry.LOSSES.paths, "flat", "flat_loss:FlatLoss")
    section = ranking._section("flat")
    assert section().model_dump() == {"name": "flat", "lr": None, "weight_decay": 0.0, "height": 2.0}
    with pytest.raises(ValueError, match="greater than 0"):
        section(height=-1)


def test_the_backbone_fills_in_what_is_left_open():
    plain = parse()
    assert (plain.data.image_size, plain.data.mean[0], plain.model.pooling) == (224, 0.485, "avg")
    own = parse("model.backbone=timm/test_vit", "model.pretrained=timm")
    assert (own.data.image_size, own.data.mean, own.model.pooling) == (160, (0.5, 0.5, 0.5), "own")
    assert own.evaluation.untrained
    assert not parse().evaluation.untrained  # each has sections of its own
    assert parse("model.backbone=efficientnet_b1").data.image_size == 240
    grey = parse("model.backbone=timm/test_vit", "data.channels=1", "data.image_size=[32, 64]", "data.std=[0.2]")
    assert (grey.data.size, grey.data.mean, grey.data.std) == ((32, 64), (0.5,), (0.2,))
    assert parse_config(own.model_dump(mode="json"), "again") == own


HOSTILE = ["null", ".nan", "1e999", "9" * 5000, "[" * 500, "{a: [1", "&a [*a]", "*b", "!!python/name:os x",
           "!!int x", "!!set {a}", "? [1]: 2", "<<: 1", "\0", "\ud800", "- 1", ": ", "#", "a: 1, a: 2"]  # fmt: skip


@pytest.mark.parametrize("seed", range(25))
def test_mutated_settings_are_read_or_refused_in_one_sentence(seed, tmp_path):
    """``FUZZ`` says how many mutations each of the 25 cases tries."""
    random, path = Random(seed), tmp_path / "x.yaml"
    files = [*Path("configs").glob("*.yaml"), *Path("shards").glob("*.yaml")]
    for _ in range(int(os.environ.get("FUZZ", "2"))):
        text = random.choice(files).read_text()
        for _ in range(random.choice((1, 2, 10))):
            at, gone = random.randrange(len(text)), random.choice((0, 0, 1, 30))
            text = text[:at] + random.choice([*HOSTILE, "\n", text[at:][:40]]) + text[at + gone :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        key = random.choice([*setting_types(), "options.x", "ranking.kwargs.a", "a..b"])
        override = f"{key}={random.choice(HOSTILE)}"
        refusals = []
        for read, *arguments in (
            (load_config, path), (load_recipe, path), (parse, override), (load_recipe, "folder", [override])
        ):  # fmt: skip
            try:
                read(*arguments)
            except InputError as error:
                refusals.append(str(error))
        assert all(len(text) < 10_000 and "\n" not in text for text in refusals)
