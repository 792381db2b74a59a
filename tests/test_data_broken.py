"""Broken tables: each kind of damage is named with file, row and column."""

import copy
import json
import re

import pyarrow as pa
import pytest
import twins
from pyarrow import parquet

from mipfast import ArtefactError, InputError
from mipfast.data import load

EVALUATION = {"image": twins.IMAGE, **twins.EVALUATION}
FILE = "train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def rows():
    return [twins.evaluation_row(person) | {"image": twins.image(person)} for person in range(3)]


def choices(row):
    return row["Classification_Task"]["Pure_Text_Questions"]


EVALUATION_DAMAGES = {  # name: (what is done to row 1, the column that is named, what the message says)
    "no picture": (lambda r: r["image"].update(bytes=b"no picture"), "image", "cannot be read as a picture"),
    "picture without bytes": (lambda r: r["image"].update(bytes=None), "image", "found bytes=None; expected the bytes"),
    "null picture": (lambda r: r.update(image=None), "image", "found None"),
    "null ID": (lambda r: r.update(ID=None), "ID", "found None; expected a text"),
    "duplicate ID": (lambda r: r.update(ID="1"), "ID", f"found '1', which row 0 of {FILE} has too; expected every"),
    "letter outside A-D": (
        lambda r: choices(r)[2].update(Correct_Answer="E"),
        "Classification_Task.Pure_Text_Questions.Correct_Answer",
        "found 'E'; expected one of A, B, C, D",
    ),
    "options missing": (
        lambda r: choices(r)[0].update(Options=dict.fromkeys("ABCD")),
        "Classification_Task.Pure_Text_Questions.Options",
        "found options none; expected A, B, C and D",
    ),
    "an option missing between": (
        lambda r: choices(r)[0]["Options"].update(B=None),
        "Classification_Task.Pure_Text_Questions.Options",
        "found options A, C, D; expected A, B, C and D",
    ),
    "null question": (
        lambda r: r["Mask_Task"][0].update(Question=None),
        "Mask_Task.Question",
        "found None; expected a text that is not empty",
    ),
    "empty answer": (
        lambda r: r["Generation_Task"][3].update(Ground_Truth=" "),
        "Generation_Task.Ground_Truth",
        "found ' '; expected a text that is not empty",
    ),
    "unknown type": (
        lambda r: r["Generation_Task"][0].update(Type="Video"),
        "Generation_Task.Type",
        "found 'Video'; expected one of Image_Textual, Pure_Text",
    ),
    "null task": (lambda r: r.update(Generation_Task=None), "Generation_Task", "found None; expected a list"),
}


@pytest.mark.parametrize("damage", EVALUATION_DAMAGES)
def test_a_damaged_evaluation_row_is_named(rows, tmp_path, damage):
    harm, column, message = EVALUATION_DAMAGES[damage]
    damaged = copy.deepcopy(rows)
    harm(damaged[1])
    twins.write(tmp_path / "forget_5", EVALUATION, damaged)
    where = f"{tmp_path}/forget_5/{FILE}, row 1, column {column}"
    with pytest.raises(InputError, match=f"^{re.escape(where)}.*{re.escape(message)}"):
        load(tmp_path, "forget_5")


@pytest.mark.parametrize(
    "metadata, column, message",
    [
        ("{'Question': 1}", "metadata", "found what is no JSON (Expecting property name"),
        ('{"Question": "a"}', "metadata", "found {'Question': 'a'}; expected a JSON list"),
        ("[1]", "metadata", "found 1; expected named fields"),
        ('[{"Question": "a", "Answer": "b"}, {"Answer": "b"}]', "metadata.Question", "found None; expected a text"),
        (None, "metadata", "found None; expected a text"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, metadata, column, message):
    found = [twins.training_row(0), twins.training_row(1) | {"metadata": metadata}]
    twins.write(tmp_path / "forget_5", twins.TRAINING, found)
    where = f"{FILE}, row 1, column {column}: {message}"
    with pytest.raises(InputError, match=re.escape(where)):
        load(tmp_path, "forget_5")


@pytest.mark.parametrize(
    "columns, change, column, message",
    [
        (twins.TOFU, {"question": None, "image": None}, "question", "found None; expected a text"),
        (twins.TOFU, {"caption": None}, "caption", "found None; expected a text"),
        (twins.PERTURBED, {"perturbed_captions": None}, "perturbed_captions", "found None; expected a list"),
        (twins.PERTURBED, {"perturbed_captions": []}, "perturbed_captions", "found 0 wrong options; expected 1 to 25"),
        (twins.PERTURBED, {"perturbed_names": ["a", None]}, "perturbed_names", "found None; expected a text"),
    ],
)
def test_a_damaged_clear_row_is_named(tmp_path, columns, change, column, message):
    found = [twins.perturbed_row(0), twins.perturbed_row(1) | change]
    twins.write(tmp_path / "set", columns, found)
    with pytest.raises(InputError, match=re.escape(f"{FILE}, row 1, column {column}: {message}")):
        load(tmp_path, "set")


@pytest.mark.parametrize("column", ["ID", "image", "Mask_Task", "Classification_Task"])
def test_a_missing_column_is_named(rows, tmp_path, column):
    kept = {name: kind for name, kind in EVALUATION.items() if name != column}
    twins.write(tmp_path / "forget_5", kept, rows)
    named = "image or images" if column == "image" else column
    with pytest.raises(InputError, match=rf"{FILE}: column {named} is missing; found .*expected an MLLMU-Bench eval"):
        load(tmp_path, "forget_5")


@pytest.mark.parametrize(
    "column, kind, values, message",
    [
        ("ID", pa.int64(), [1, 2], "row 0, column ID: found 1; expected a text that is not empty"),
        ("metadata", pa.list_(pa.string()), [["a"], ["b"]], "row 0, column metadata: found ['a']; expected a text"),
        ("image", pa.string(), ["a.png", "b.png"], "row 0, column image: found a.png; expected named fields"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, kind, values, message):
    found = [twins.training_row(i) | {column: values[i]} for i in range(2)]
    twins.write(tmp_path / "forget_5", {**twins.TRAINING, column: kind}, found)
    with pytest.raises(InputError, match=re.escape(f"{FILE}, {message}")):
        load(tmp_path, "forget_5")


def test_tables_that_are_no_table_of_a_benchmark(rows, tmp_path):
    twins.write(tmp_path / "empty", EVALUATION, [])
    with pytest.raises(InputError, match=f"empty/{FILE}: the table has no rows"):
        load(tmp_path, "empty")
    twins.write(tmp_path / "other", {"text": pa.string()}, [{"text": "a"}])
    with pytest.raises(InputError, match=f"{FILE}: no known schema has columns text; expected one of an MLLMU-Bench"):
        load(tmp_path, "other")
    twins.write(tmp_path / "forget_5", EVALUATION, rows)
    whole = (tmp_path / "forget_5" / FILE).read_bytes()
    for name, found in (("cut", whole[:-40]), ("text", b"not parquet"), ("nothing", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(found)
        with pytest.raises(ArtefactError, match=f"{name}/{FILE} cannot be read as parquet .*fetch it again"):
            load(tmp_path, name)


def test_a_table_damaged_in_the_middle_says_where(tmp_path):
    found = [twins.training_row(i % 8) | {"ID": str(i)} for i in range(60)]
    twins.write(tmp_path / "set", twins.TRAINING, [])
    file = tmp_path / "set" / FILE
    table = pa.Table.from_pylist(found, pa.schema(list(twins.TRAINING.items())))
    parquet.write_table(table, file, row_group_size=20, compression="gzip")
    at = parquet.ParquetFile(file).metadata.row_group(2).column(0).data_page_offset
    damaged = bytearray(file.read_bytes())
    damaged[at : at + 400] = bytes(400)
    file.write_bytes(bytes(damaged))
    with pytest.raises(ArtefactError, match=rf"{FILE}, after row \d+: cannot be read as parquet"):
        load(tmp_path, "set")


def test_biographies(tmp_path, rows):
    from mipfast.data import person_names

    damaged = copy.deepcopy(rows)
    damaged[2]["biography"] = json.dumps({"Born": 1960})
    twins.write(tmp_path / "Full_Set", EVALUATION, damaged)
    with pytest.raises(InputError, match="row 2, column biography: found None; expected a text"):
        person_names(tmp_path)
