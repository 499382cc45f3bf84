"""Images of one's own, listed in a table."""

from pathlib import Path

import pytest

from dist_obdsd.data.packing.recipes import Recipe, load_recipe
from dist_obdsd.errors import InputError
from tests.data.packing.readers.layouts import image, listed, write_archive, write_files

IMAGES = {f"pics/{name}.jpg": image(i) for i, name in enumerate("abcdefgh")}


def table(folder: Path, text: str, name: str = "images.csv") -> Path:
    write_files(folder, IMAGES | {name: text.encode()})
    return folder


def rows_of(recipe: Recipe, source: Path) -> list[tuple[str, str, str, str]]:
    return [row[:4] for row in listed(recipe, source)]


HALVES = "path,class,split\n" + "".join(
    f"pics/{name}.jpg,{name if name < 'e' else 'x, y'},{'train' if name < 'e' else 'test'}\n" for name in "abcdef"
).replace("x, y", '"x, y"')


def test_a_csv_says_path_class_and_split(tmp_path) -> None:
    expected = [(f"pics/{name}.jpg", name, "train", "train") for name in "abcd"]
    expected += [(f"pics/{name}.jpg", "x, y", "test", "both") for name in "ef"]
    table(tmp_path / "one", HALVES)
    recipe = load_recipe("csv")
    assert rows_of(recipe, tmp_path / "one") == expected
    table(tmp_path / "two", "\ufeff" + HALVES.replace("\n", "\r\n") + "\r\n", "my list.csv")  # as Excel writes it
    assert rows_of(recipe, tmp_path / "two" / "my list.csv") == expected
    with pytest.raises(InputError, match="holds no images.csv, at the top or in a folder there; give .* the list itse"):
        rows_of(recipe, tmp_path / "two")
    write_archive(tmp_path / "three.zip", IMAGES | {"images.csv": HALVES.encode()})
    found = listed(recipe, tmp_path / "three.zip")
    assert [row[:4] for row in found] == expected
    assert [row[4] for row in found] == [IMAGES[row[0]] for row in found]


def test_columns_have_any_names_and_any_order(tmp_path) -> None:
    text = "id;what;file;part\n" + "".join(f"{i};{name};{name}.jpg;train\n" for i, name in enumerate("abc"))
    source = table(tmp_path, text, "list.txt")
    names = ["options.path_column=file", "options.class_column=what", "options.split_column=part"]
    how = ["options.delimiter=;", "options.lists=[{file: list.txt, images: pics}]"]
    expected = [(f"pics/{name}.jpg", name, "train", "train") for name in "abc"]
    assert rows_of(load_recipe("csv", [*names, *how]), source) == expected
    assert rows_of(load_recipe("csv", [*names, *how]), source / "list.txt") == expected
    with pytest.raises(
        InputError, match=r"list.txt has no column path but id, what, file, part; name the path's column"
    ):
        rows_of(load_recipe("csv", [*names[1:], *how]), source)
    with pytest.raises(InputError, match=r"list.txt has no column parts \(split_column\) but id, what, file, part"):
        rows_of(load_recipe("csv", [*names, *how, "options.split_column=parts"]), source)
    with pytest.raises(InputError, match=r"has no column file or path but id;what;file;part"):
        rows_of(load_recipe("csv", ["options.path_column=[file, path]", how[1]]), source)


def test_without_a_split_column_whole_classes_are_split(tmp_path) -> None:
    text = "path,class\n" + "".join(f"pics/{name}.jpg,{i // 2}\n" for i, name in enumerate("abcdefgh"))
    source = table(tmp_path, text)
    rows = rows_of(load_recipe("csv"), source)
    classes = {split: {row[1] for row in rows if row[2] == split} for split in ("train", "test")}
    assert [len(names) for names in classes.values()] == [2, 2]
    assert not classes["train"] & classes["test"]
    by_number = rows_of(load_recipe("csv", ["options.last_train_class=2"]), source)
    assert {(row[1], row[2]) for row in by_number} == {("0", "train"), ("1", "train"), ("2", "train"), ("3", "test")}


def test_roles_say_who_asks_and_who_is_searched(tmp_path) -> None:
    lines = ["a,1,train", "b,1,", "c,2,query", "d,2,gallery", "e,2,gallery:cam1", "f,2,both"]
    text = "path,class,split,role\n" + "".join(
        f"pics/{line[0]}.jpg,{line[2]},{'train' if line[2] == '1' else 'test'},{line[4:]}\n" for line in lines
    )
    # The first image again: as a gallery image it is refused, but a query may be one.
    source = table(tmp_path / "both", text + "pics/c.jpg,2,test,gallery\n")
    assert {row[0][5]: row[2:] for row in rows_of(load_recipe("csv"), source)} == {
        "a": ("train", "train"),
        "b": ("train", "train"),
        "c": ("test", "both"),
        "d": ("test", "gallery"),
        "e": ("test", "gallery:cam1"),
        "f": ("test", "both"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "images.csv:1: has no row of column names"),
        ("path,path\n", "images.csv:1: has no row of column names, all different"),
        ("path,class\npics/a.jpg,1,2\n", r"images.csv:2: has 3 cells but needs 2 \(path, class\)"),
        ("path,class\n\n\npics/a.jpg\n", "images.csv:4: has 1 cells but needs 2"),
        ("path,class\npics/a.jpg,\n", "images.csv:2: class is empty"),
        ("path,class\n,1\n", "images.csv:2: path is empty"),
        ("path,class\n../a.jpg,1\n", "images.csv:2: the path '../a.jpg' may point outside"),
        ("path,class\n/etc/a.jpg,1\n", "images.csv:2: the path '/etc/a.jpg' may point outside"),
        ("path,class\npics\\a.jpg,1\n", "images.csv:2: the path .* with forward slashes"),
        ("path,class\npics/z.jpg,1\n", "images.csv:2: the image pics/z.jpg is not there; complete the data, or"),
        ("path,class\npics,1\n", "images.csv:2: the image pics is not there"),
        ('path,class\n"pics/a.jpg,1\n', "images.csv:2: is no row of a table"),
        ("path,class,split\npics/a.jpg,1,val\n", "images.csv:2: split is 'val'; it must be train or test"),
        ("path,class,split\npics/a.jpg,1,\n", "images.csv:2: split is empty"),
        ("path,class,role\npics/a.jpg,1,\n", "images.csv:2: role is empty and nothing else says the split"),
        ("path,class,role\npics/a.jpg,1,judge\n", "images.csv:2: role is 'judge'; it must be train, both, query"),
        ("path,class,split,role\npics/a.jpg,1,train,query\n", "images.csv:2: role is 'query' but the split is train"),
        ("path,class,split,role\npics/a.jpg,1,test,train\n", "images.csv:2: role is 'train' but the split is test"),
        ("path,class\npics/a.jpg,1\npics/a.jpg,1\n", "images.csv:3: lists pics/a.jpg again, after .*images.csv:2;"),
        ("path,class,role\npics/a.jpg,1,query\n./pics/a.jpg,2,gallery\n", "images.csv:3: lists pics/a.jpg again"),
        ("path,class\npics/a.jpg,1\npics/\0.jpg,1\n", "images.csv:3: "),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, text: str, message: str) -> None:
    table(tmp_path, HALVES)
    assert rows_of(load_recipe("csv"), tmp_path)
    table(tmp_path, text)
    with pytest.raises(InputError, match=message):
        rows_of(load_recipe("csv"), tmp_path)
