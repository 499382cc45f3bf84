import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dist_obdsd.config import changed_settings, load_config, override_config, parse_config, ranking, registry
from dist_obdsd.config.signature import read_source
from dist_obdsd.errors import InputError

MINIMAL = {"name": "x", "epochs": 3, "data": {"shards": "data/x"}}


def parse(*overrides: str):
    return parse_config(override_config(MINIMAL, overrides), "x.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=str)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).name == path.stem


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optm.lr=1", "unknown setting optm; did you mean optim?"),
        ("data.lane=4", "unknown setting data.lane; did you mean data.lanes?"),
        ("distillation.temprature=1", "did you mean distillation.temperature?"),
        ("batch.global_size=113", "set it to 112 or 114"),
        ("batch.global_size=2", "at least two"),
        ("data.lanes=3", "set data.lanes to one of [1, 2, 4, 7, 8, 14, 28, 56]"),
        ("epochs=1", "set epochs to 2 or more, or distillation.target=none"),
        ("distillation.omega=1", "distillation.omega is 1"),
        ("distillation.omega=-0.1", "distillation.omega is -0.1"),
        ("distillation.temperature=0", "distillation.temperature is 0"),
        ("distillation.target=odbsd", "distillation.target is 'odbsd'"),
        ("data.channels=1", "data.mean has 3 values but data.channels is 1"),
        ("precision=fp16", "precision is 'fp16'"),
        ("optim.schedule=step", "needs optim.milestones"),
        ("optim.milestones=[3]", "set optim.schedule=step"),
        ("data.resize=100", "set data.resize to at least 224"),
        ("data.decode=gpu", "take it out"),
        ("data.std=[0, 1, 1]", "every value must be above 0"),
        ("name=../up", "name is '../up'"),
        ("optim.lr=.nan", "optim.lr is nan"),
        ("validation={fraction: 0.1, folds: 5}", "validation.fraction and validation.folds both say what to hold out"),
        ("validation={classes: [a, b], folds: 5}", "validation.classes and validation.folds both say"),
        ("validation={folds: 5, fold: 5}", "set validation.fold to a number from 0 to 4"),
        ("validation.fold=1", "has no effect without validation.folds"),
        ("validation.folds=1", "validation.folds is 1"),
        ("validation.classes=none.txt", "cannot read none.txt: No such file or directory; give a list of names, or"),
    ],
)
def test_a_mistake_is_refused_with_the_mend(override, sentence):
    with pytest.raises(InputError) as caught:
        parse(override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_that_has_gone_is_dropped_at_its_default():
    assert "decode" not in parse("data.decode=cpu").model_dump()["data"]


def test_overrides_are_yaml_and_numbers_may_have_exponents():
    settings = parse("optim.lr=1e-3", "evaluation.recall_at=[1, 10]", "optim.clip_norm=null", "model.pretrained=none")
    assert settings.optim.lr == 1e-3
    assert settings.evaluation.recall_at == (1, 10)
    assert settings.model.pretrained == "none"
    assert MINIMAL == {"name": "x", "epochs": 3, "data": {"shards": "data/x"}}


@pytest.mark.parametrize("override", ["lr", "=3", "epochs.more=3", "a=[1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(InputError, match="override"):
        parse(override)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the config"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="not a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_the_yaml_of_a_config_gives_the_same_config(tmp_path):
    settings = parse("optim.schedule=step", "optim.milestones=[1, 2]")
    (tmp_path / "x.yaml").write_text(settings.to_yaml())
    again = load_config(tmp_path / "x.yaml")
    assert again == settings
    assert again.digest() == settings.digest() != parse().digest()


def test_only_what_cannot_change_a_result_may_change_on_resume():
    old = parse().model_dump(mode="json")
    harmless = parse("data.workers=0", "tracking.kind=none", "threads=2", "data.shards=elsewhere")
    assert changed_settings(old, harmless.model_dump(mode="json")) == []
    other = parse("optim.lr=0.5", "epochs=4", "data.lanes=4").model_dump(mode="json")
    assert changed_settings(old, other) == ["data.lanes: 8 -> 4", "epochs: 3 -> 4", "optim.lr: 1e-05 -> 0.5"]


def test_a_setting_that_an_older_version_did_not_know_had_its_default():
    old, new = (parse().model_dump(mode="json") for _ in range(2))
    del old["optim"]["head_scale"]
    assert changed_settings(old, new) == []
    new["optim"]["head_scale"] = 2.0
    assert changed_settings(old, new) == ["optim.head_scale: 1.0 -> 2.0"]


def test_a_ranking_loss_is_chosen_by_name_and_has_settings_of_its_own():
    assert parse().ranking.name == "multi_similarity"
    assert parse("ranking.alpha=3").ranking.alpha == 3
    assert parse("ranking.name=triplet").ranking.margin == 0.2
    arcface = parse("ranking.name=pml.ArcFaceLoss", "ranking.kwargs={scale: 30}", "ranking.lr=0.1").ranking
    assert (arcface.name, arcface.kwargs, arcface.lr) == ("pml.ArcFaceLoss", {"scale": 30}, 0.1)
    with pytest.raises(InputError, match=r"unknown setting ranking.alpha; the loss triplet has name, margin"):
        parse("ranking.name=triplet", "ranking.alpha=3")
    with pytest.raises(InputError, match=r"ranking.name must be multi_similarity, .* pml.NAME"):
        parse("ranking.name=tripplet")
    with pytest.raises(InputError, match=r"ranking.alpha is -1: input should be greater than 0"):
        parse("ranking.alpha=-1")


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
    with pytest.raises(InputError, match="chosen by map@r; add it to evaluation.metrics"):
        parse("validation.folds=2", "evaluation.metrics=[recall]")


def test_reading_a_config_imports_no_torch():
    code = "import sys; from dist_obdsd.config import load_config; load_config('configs/cub200.yaml')"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


REGISTRIES = [registry.LOSSES, registry.TARGETS, registry.BACKBONES, registry.STRATEGIES]


@pytest.mark.parametrize(("parts", "name"), [(parts, name) for parts in REGISTRIES for name in parts.names])
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


def test_a_config_survives_being_sent_to_another_process():
    config = parse("ranking.name=pml.ArcFaceLoss", "ranking.kwargs={scale: 30}")
    assert pickle.loads(pickle.dumps(config)) == config
