"""Images of one's own, listed in a table."""

from pathlib import Path

import pytest

from dist_obdsd.data.packing.recipes import load_recipe
from dist_obdsd.errors import InputError
from tests.data.packing.sources import image, listed, write_archive, write_files

IMAGES = {f"pics/{name}.jpg": image(i) for i, name in enumerate("abcdefgh")}


def table(folder: Path, text: str, name: str = "images.csv") -> Path:
    write_files(folder, IMAGES | {name: text.encode()})
    return folder


def rows_of(source: Path, *overrides: str) -> list[tuple[str, str, str, str]]:
    return [row[:4] for row in listed(load_recipe("csv", overrides), source)]


HALVES = "path,class,split\n"
HALVES += "".join(f"pics/{name}.jpg,{name},train\n" for name in "abcd")
HALVES += "".join(f'pics/{name}.jpg,"x, y",test\n' for name in "ef")


def test_a_csv_says_path_class_and_split(tmp_path) -> None:
    expected = [(f"pics/{name}.jpg", name, "train", "train") for name in "abcd"]
    expected += [(f"pics/{name}.jpg", "x, y", "test", "both") for name in "ef"]
    assert rows_of(table(tmp_path / "one", HALVES)) == expected
    table(tmp_path / "two", "\ufeff" + HALVES.replace("\n", "\r\n") + "\r\n", "my list.csv")  # as Excel writes it
    assert rows_of(tmp_path / "two" / "my list.csv") == expected
    with pytest.raises(InputError, match="holds no images.csv, at the top or in a folder there; give .* the list itse"):
        rows_of(tmp_path / "two")
    write_archive(tmp_path / "three.zip", IMAGES | {"images.csv": HALVES.encode()})
    assert listed(load_recipe("csv"), tmp_path / "three.zip") == [(*row, IMAGES[row[0]]) for row in expected]


def test_columns_have_any_names_and_any_order(tmp_path) -> None:
    text = "id;what;file;part\n" + "".join(f"{i};{name};{name}.jpg;train\n" for i, name in enumerate("abc"))
    source = table(tmp_path, text, "list.txt")
    path = "options.path_column=file"
    others = ["options.class_column=what", "options.split_column=part", "options.delimiter=;"]
    others += ["options.lists=[{file: list.txt, images: pics}]"]
    expected = [(f"pics/{name}.jpg", name, "train", "train") for name in "abc"]
    assert rows_of(source, path, *others) == rows_of(source / "list.txt", path, *others) == expected
    with pytest.raises(InputError, match="list.txt has no column path but id, what, file, part; name the path's"):
        rows_of(source, *others)
    with pytest.raises(InputError, match=r"list.txt has no column parts \(split_column\) but id, what, file, part"):
        rows_of(source, path, *others, "options.split_column=parts")
    with pytest.raises(InputError, match="has no column file or path but id;what;file;part"):
        rows_of(source, "options.path_column=[file, path]", others[-1])


def test_without_a_split_column_whole_classes_are_split(tmp_path) -> None:
    text = "path,class\n" + "".join(f"pics/{name}.jpg,{i // 2}\n" for i, name in enumerate("abcdefgh"))
    source = table(tmp_path, text)
    rows = rows_of(source)
    classes = {split: {row[1] for row in rows if row[2] == split} for split in ("train", "test")}
    assert [len(names) for names in classes.values()] == [2, 2]
    assert not classes["train"] & classes["test"]
    by_number = rows_of(source, "options.last_train_class=2")
    assert {(row[1], row[2]) for row in by_number} == {("0", "train"), ("1", "train"), ("2", "train"), ("3", "test")}


def test_roles_say_who_asks_and_who_is_searched(tmp_path) -> None:
    roles = {"a": "train", "b": "", "c": "query", "d": "gallery", "e": "gallery:cam1", "f": "both"}
    rows = [f"pics/{name}.jpg,{'1,train' if name < 'c' else '2,test'},{role}\n" for name, role in roles.items()]
    # An image twice is refused, unless it is once a query and once in the gallery.
    rows += ["pics/c.jpg,2,test,gallery\n"]
    source = table(tmp_path, "".join(["path,class,split,role\n", *rows]))
    assert [row[2:] for row in rows_of(source)] == [
        *[("train", "train")] * 2,
        *(("test", role) for role in ("both", "gallery", "gallery:cam1", "both")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "images.csv:1: has no row of column names"),
        ("\npath,path\n", "images.csv:2: has no row of column names, all different"),
        ("path,class\npics/a.jpg,1,2\n", r"images.csv:2: has 3 cells but needs 2 \(path, class\)"),
        ("path,class\n\n , \npics/a.jpg\n", "images.csv:4: has 1 cells but needs 2"),
        ("path,class\npics/a.jpg,\n", "images.csv:2: class is empty"),
        ("path,class\n,1\n", "images.csv:2: path is empty"),
        ("path,class\n../a.jpg,1\n", "images.csv:2: the path '../a.jpg' may point outside"),
        ("path,class\npics\\a.jpg,1\n", "images.csv:2: the path .* with forward slashes"),
        ("path,class\npics/z.jpg,1\n", "images.csv:2: the image pics/z.jpg is not there; complete the data, or"),
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
    with pytest.raises(InputError, match=message):
        rows_of(table(tmp_path, text))
