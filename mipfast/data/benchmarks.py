"""MLLMU-Bench and CLEAR as records. A table's schema is known by its columns, because the same folder name holds
different ones: forget_5 of MLLMU-Bench is for evaluation, forget_5 of its training tables has QA pairs as JSON."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mipfast.data.records import LETTERS, RECORD_MODALITIES, Picture, Record
from mipfast.data.tables import Row, find_table, read_rows
from mipfast.errors import InputError

log = logging.getLogger("mipfast")

CAPTION_QUESTIONS = (
    "Describe this picture.",
    "What does this picture show?",
    "Write a caption for this picture.",
    "Who or what is in this picture?",
    "Say in a sentence or two what is to be seen here.",
)
CAPTION_CHOICE = "Which caption belongs to this picture?"
NAME_QUESTION = "What is the name of the person in this picture?"
MLLMU_MODALITIES = {"Image_Textual": "image", "Pure_Text": "text"}


def load(source: str | Path, group: str, seed: int = 0) -> list[Record]:
    """Every record of one table of MLLMU-Bench or CLEAR; docs/data.md says which table gives which.

    Args:
        source: a local folder that holds <group>/*.parquet, or the Hub id of one, which is then fetched.
        group: the table's folder, such as forget_5.
        seed: of what is drawn: a CLEAR row's captioning question and order of options, one of a Test_Set row's
            pictures. The draw depends on seed, group and row alone.

    Returns:
        Records in the table's order, with the row's subject where the table has such a column; pictures stay encoded
        until they are opened.

    Raises:
        InputError: with file, row and column for a table that cannot be used.
        ArtefactError: for a file that is no parquet.

    Example:
        >>> import pyarrow, tempfile
        >>> from pathlib import Path
        >>> from pyarrow import parquet
        >>> from mipfast.data import load
        >>> table = Path(tempfile.mkdtemp()) / "real_world"  # a table of CLEAR
        >>> table.mkdir()
        >>> row = {"question": "Where is Rome?", "answer": "Italy", "options": ["Italy", "Spain"]}
        >>> parquet.write_table(pyarrow.Table.from_pylist([row]), table / "0.parquet")
        >>> [(record.id, record.task, record.target) for record in load(table.parent, "real_world")]
        [('0/qa', 'generation', 'Italy'), ('0/choice', 'choice', 'A')]
    """
    records: dict[str, Record] = {}
    rows: dict[str, str] = {}
    for number, row in enumerate(read_rows(find_table(source, group))):
        rng = random.Random(f"{seed} {group} {row.values.get('ID', number)}")
        subject = "" if row.values.get("subject") is None else row.text("subject")
        for record in _schema(row).records(row, str(number), rng):
            if record.id in records:
                person = repr(record.id.split("/")[0])
                raise row.error("ID", f"{person}, which {rows[record.id]} has too", "every person once")
            records[record.id] = replace(record, group=group, subject=subject)
            rows[record.id] = f"row {row.number} of {row.file.name}"
    kinds = Counter(f"{record.modality} {record.task}" for record in records.values())
    log.info("%s of %s: %s", group, source, ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    return list(records.values())


def load_groups(
    source: str | Path,
    groups: Sequence[str],
    *,
    names: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """Every record of several tables, in order.

    Args:
        source: what `load` takes.
        groups: tables of source, or SOURCE/TABLE for one of another source.
        names: the MLLMU-Bench source whose Full_Set names the people; the questions of tables that ask about pictures
            alone are then asked in text as well.
        limit: the most records of each group and modality, drawn with the seed.
        seed: as of `load`.

    Raises:
        InputError, ArtefactError: as `load` does, and for a limit below 1.

    Example:
        >>> import pyarrow, tempfile
        >>> from pathlib import Path
        >>> from pyarrow import parquet
        >>> from mipfast.data import load_groups
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = [{"image": None, "caption": "", "question": f"Is {x} a letter?", "answer": "Yes"} for x in "ABC"]
        >>> for group in ("forget05", "retain95"):  # tables of CLEAR
        ...     (folder / group).mkdir()
        ...     parquet.write_table(pyarrow.Table.from_pylist(rows), folder / group / "0.parquet")
        >>> [record.group for record in load_groups(folder, ["forget05", "retain95"], limit=2)]
        ['forget05', 'forget05', 'retain95', 'retain95']
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; expected at least 1")
    known = person_names(names) if names else {}
    records: list[Record] = []
    for group in groups:
        where, _, table = str(group).rpartition("/")
        loaded = load(where or source, table, seed)
        if known and all(record.modality == "image" for record in loaded):
            loaded += without_pictures(loaded, known)
        for modality in RECORD_MODALITIES:
            some = [record for record in loaded if record.modality == modality]
            count = min(limit or len(some), len(some))
            drawn = random.Random(f"{seed} {group} {modality}").sample(range(len(some)), count)
            records += [some[i] for i in sorted(drawn)]
    return records


def person_names(source: str | Path, group: str = "Full_Set") -> dict[str, str]:
    """The people's names by their IDs, from the biographies of an MLLMU-Bench table.

    Args:
        source: what `load` takes.
        group: the table.

    Returns:
        {ID: name}.

    Raises:
        InputError: for a row without ID, or whose biography is no JSON with a "Name".

    Example:
        >>> import json, pyarrow, tempfile
        >>> from pathlib import Path
        >>> from pyarrow import parquet
        >>> from mipfast.data import person_names
        >>> table = Path(tempfile.mkdtemp()) / "Full_Set"
        >>> table.mkdir()
        >>> row = {"ID": "7", "biography": json.dumps({"Name": "Ada"})}
        >>> parquet.write_table(pyarrow.Table.from_pylist([row]), table / "0.parquet")
        >>> person_names(table.parent)
        {'7': 'Ada'}
    """
    names = {}
    for row in read_rows(find_table(source, group)):
        names[row.text("ID")] = row.text("biography", row.json("biography", dict).get("Name"))
    return names


def without_pictures(records: Sequence[Record], names: Mapping[str, str]) -> list[Record]:
    """Picture questions asked in text: "this person" becomes the person's name.

    Questions that do not say "this person" are left out: without the picture nobody could answer them.

    Args:
        records: whose ids begin with the ID of the person, up to the first "/".
        names: {ID: name}, as `person_names` gives it.

    Returns:
        Text records, the person their subject; "/text" is added to their ids.

    Raises:
        InputError: for a person without a name.

    Example:
        >>> from mipfast.data import Record, without_pictures
        >>> asked = Record("7/qa/0", "forget_5", "image", "generation", "Is this person old?", "Yes", image="x")
        >>> [record.question for record in without_pictures([asked], {"7": "Ada"})]
        ['Is Ada old?']
    """
    texts = []
    for record in records:
        person = record.id.split("/")[0]
        if "this person" not in record.question:
            continue
        if person not in names:
            raise InputError(f"record {record.id} is of person {person}, who has no name; names has {len(names)}")
        name = names[person]
        question = record.question.replace("this person", name)
        asked = replace(record, modality="text", image=None, question=question, subject=name)
        texts.append(replace(asked, id=f"{record.id}/text"))
    return texts


class Schema(NamedTuple):
    """How the rows of one kind of table become records."""

    name: str
    marks: set[str]
    """Columns any of which identify the schema."""
    needed: tuple[str, ...]
    """Columns without which it cannot be read, | between alternatives."""
    records: Callable[[Row, str, random.Random], Iterator[Record]]


def _schema(row: Row) -> Schema:
    columns = row.values.keys()
    for schema in SCHEMAS:
        if schema.marks & columns:
            for needed in schema.needed:
                if not set(needed.split("|")) & columns:
                    raise InputError(
                        f"{row.file}: column {needed.replace('|', ' or ')} is missing; found {', '.join(columns)}; "
                        f"expected {schema.name} with {', '.join(schema.needed)}"
                    )
            return schema
    expected = "; ".join(f"{schema.name}: {', '.join(schema.needed)}" for schema in SCHEMAS)
    raise InputError(f"{row.file}: no known schema has columns {', '.join(columns)}; expected one of {expected}")


def _mllmu_evaluation(row: Row, _: str, rng: random.Random) -> Iterator[Record]:
    person = row.text("ID")
    picture = _portrait(row, rng)

    def record(task: Any, modality: Any, number: int, **fields: Any) -> Record:
        image = picture if modality == "image" else None
        return Record(f"{person}/{task}/{modality}/{number}", "", modality, task, image=image, **fields)

    choices = row.fields("Classification_Task", row.values["Classification_Task"])
    for name, modality in MLLMU_MODALITIES.items():
        column = f"Classification_Task.{name}_Questions"
        for number, item in enumerate(row.items(column, choices.get(f"{name}_Questions") or [])):
            item = row.fields(column, item)
            shown = row.fields(f"{column}.Options", item.get("Options"))
            letters = sorted(letter for letter, option in shown.items() if option is not None)
            options = tuple(row.text(f"{column}.Options.{letter}", shown[letter]) for letter in letters)
            if len(options) < 2 or letters != list(LETTERS[: len(letters)]):
                raise row.error(f"{column}.Options", f"options {', '.join(letters) or 'none'}", "A, B, C and D")
            letter = item.get("Correct_Answer")
            if letter not in letters:
                raise row.error(f"{column}.Correct_Answer", repr(letter), f"one of {', '.join(letters)}")
            question, answer = row.text(f"{column}.Question", item.get("Question")), shown[letter]
            yield record("choice", modality, number, question=question, answer=answer, options=options, letter=letter)
    for task, column in (("generation", "Generation_Task"), ("cloze", "Mask_Task")):
        numbers: Counter[str] = Counter()
        for item in row.items(column, row.values[column]):
            item = row.fields(column, item)
            if (kind := item.get("Type")) not in MLLMU_MODALITIES:
                raise row.error(f"{column}.Type", repr(kind), f"one of {', '.join(MLLMU_MODALITIES)}")
            modality = MLLMU_MODALITIES[kind]
            question = row.text(f"{column}.Question", item.get("Question"))
            answer = row.text(f"{column}.Ground_Truth", item.get("Ground_Truth"))
            yield record(task, modality, numbers[modality], question=question, answer=answer)
            numbers[modality] += 1


def _portrait(row: Row, rng: random.Random) -> Picture:
    """Of several, one that is drawn."""
    if "image" in row.values:
        return row.picture("image", row.values["image"])
    pictures = [picture for picture in row.items("images", row.values["images"]) if picture is not None]
    if not pictures:
        raise row.error("images", "an empty list", "at least one picture")
    return row.picture("images", rng.choice(pictures))


def _mllmu_training(row: Row, row_number: str, rng: random.Random) -> Iterator[Record]:
    person = row.text("ID")
    picture = row.picture("image", row.values["image"])
    for number, pair in enumerate(row.json("metadata", list)):
        pair = row.fields("metadata", pair)
        question, answer = (row.text(f"metadata.{name}", pair.get(name)) for name in ("Question", "Answer"))
        yield Record(f"{person}/qa/{row_number}/{number}", "", "image", "generation", question, answer, image=picture)


def _clear_captions(row: Row, number: str, rng: random.Random) -> Iterator[Record]:
    """Rows of a +tofu table without a picture are TOFU's questions in text."""
    if row.values["image"] is None:
        yield Record(f"{number}/qa", "", "text", "generation", row.text("question"), row.text("answer"))
        return
    picture, caption = row.picture("image", row.values["image"]), row.text("caption")
    question = rng.choice(CAPTION_QUESTIONS)
    asked = Record(f"{number}/caption", "", "image", "generation", question, caption, image=picture)
    if "perturbed_captions" not in row.values:
        yield asked
        return
    asked = replace(asked, perturbed=row.texts("perturbed_captions"))
    yield replace(asked, paraphrase=row.text("paraphrased_caption"))
    yield _choice(row, "perturbed_captions", replace(asked, question=CAPTION_CHOICE), rng)
    wrong, name = row.texts("perturbed_names"), row.text("name")
    yield replace(asked, id=f"{number}/name", question=NAME_QUESTION, answer=name, perturbed=wrong)


def _clear_options(row: Row, number: str, rng: random.Random) -> Iterator[Record]:
    picture = None if (image := row.values.get("image")) is None else row.picture("image", image)
    face = picture is not None and "question" not in row.values
    question, answer = NAME_QUESTION if face else row.text("question"), row.text("answer")
    wrong = tuple(option for option in row.texts("options") if option != answer)
    modality: Any = "image" if picture else "text"
    asked = Record(f"{number}/qa", "", modality, "generation", question, answer, image=picture, perturbed=wrong)
    yield asked
    yield _choice(row, "options", asked, rng)


def _choice(row: Row, column: str, asked: Record, rng: random.Random) -> Record:
    """The same question as a choice: the answer among its distinct wrong ones, at a place that is drawn."""
    options = list(dict.fromkeys([asked.answer, *asked.perturbed]))
    if not 2 <= len(options) <= len(LETTERS):
        raise row.error(column, f"{len(options) - 1} wrong options", f"1 to {len(LETTERS) - 1}")
    rng.shuffle(options)
    number, letter = asked.id.split("/")[0], LETTERS[options.index(asked.answer)]
    return replace(asked, id=f"{number}/choice", task="choice", options=tuple(options), letter=letter, perturbed=())


SCHEMAS = (
    Schema(
        "an MLLMU-Bench evaluation table",
        {"Classification_Task", "Generation_Task", "Mask_Task"},
        ("ID", "image|images", "Classification_Task", "Generation_Task", "Mask_Task"),
        _mllmu_evaluation,
    ),
    Schema("an MLLMU-Bench training table", {"metadata"}, ("ID", "image", "metadata"), _mllmu_training),
    Schema(
        "CLEAR's perturbed captions",
        {"perturbed_captions", "paraphrased_caption", "perturbed_names"},
        ("image", "caption", "name", "paraphrased_caption", "perturbed_captions", "perturbed_names"),
        _clear_captions,
    ),
    Schema("CLEAR's captions", {"caption"}, ("image", "caption"), _clear_captions),
    Schema("CLEAR's options", {"options"}, ("answer", "options", "image|question"), _clear_options),
)
