"""MLLMU-Bench and CLEAR, on twins of their tables: what each row becomes, in every schema and with every trap."""

import json
import logging
import random
import subprocess
import sys
from collections import Counter

import pytest
import twins
from pyarrow import parquet

from mipfast import InputError
from mipfast.data import Picture, Record, benchmarks, load, person_names, without_pictures

COUNT, FORGET = 8, 2
FACTS = len(twins.people.NOUNS)


@pytest.fixture(scope="module")
def mllmu(tmp_path_factory):
    return twins.write_mllmu(tmp_path_factory.mktemp("mllmu"), COUNT, FORGET)


@pytest.fixture(scope="module")
def clear(tmp_path_factory):
    return twins.write_clear(tmp_path_factory.mktemp("clear"), COUNT, FORGET)


def table(folder, group):
    return [row for file in sorted((folder / group).glob("*")) for row in parquet.read_table(file).to_pylist()]


def kinds(records):
    return Counter((record.modality, record.task) for record in records)


def sound(records):
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert (record.modality == "image") == isinstance(record.image, Picture)
        assert record.prompt.strip() and record.target.strip() and record.group
        if record.task == "choice":
            assert record.answer in record.options and len(set(record.options)) == len(record.options)
            assert record.options[benchmarks.LETTERS.index(record.target)] == record.answer
    return records


# --------------------------------------------------------------------------------------------------- MLLMU-Bench


def test_an_evaluation_row_gives_every_task_in_both_modalities(mllmu):
    records = sound(load(mllmu / "bench", "forget_5"))
    assert set(kinds(records).values()) == {FORGET * FACTS} and len(kinds(records)) == 6
    assert {record.group for record in records} == {"forget_5"}
    row = table(mllmu / "bench", "forget_5")[1]
    mine = {record.id: record for record in records if record.id.startswith(row["ID"] + "/")}
    asked = row["Classification_Task"]["Pure_Text_Questions"][3]
    choice = mine[f"{row['ID']}/choice/text/3"]
    assert list(choice.options) == [asked["Options"][letter] for letter in "ABCD"]
    assert (choice.question, choice.target) == (asked["Question"], asked["Correct_Answer"])
    assert choice.prompt.splitlines()[1:] == [
        *(f"{letter}: {asked['Options'][letter]}" for letter in "ABCD"),
        "Just give ONE letter representing the answer directly.",
    ]
    for task, column in (("generation", "Generation_Task"), ("cloze", "Mask_Task")):
        for kind, modality in (("Image_Textual", "image"), ("Pure_Text", "text")):
            asked = [entry for entry in row[column] if entry["Type"] == kind][2]
            found = mine[f"{row['ID']}/{task}/{modality}/2"]
            assert (found.question, found.answer) == (asked["Question"], asked["Ground_Truth"])
            assert ("[Blank]" in found.prompt) == (task == "cloze") and "__" not in found.prompt
    pictures = {record.image for record in mine.values() if record.image}
    assert len(pictures) == 1 and pictures.pop().source == row["image"]["bytes"]


def test_a_truth_keeps_its_letter_where_options_repeat_it(mllmu, tmp_path):
    row = table(mllmu / "bench", "forget_5")[0]
    asked = row["Classification_Task"]["Pure_Text_Questions"][0]
    asked |= {"Options": {"A": "dog", "B": "cat", "C": "dog", "D": "cow"}, "Correct_Answer": "C"}
    twins.write(tmp_path / "forget_5", {"image": twins.IMAGE, **twins.EVALUATION}, [row])
    found = next(record for record in load(tmp_path, "forget_5") if record.id.endswith("choice/text/0"))
    assert (found.target, found.answer) == ("C", "dog")


def test_shards_are_joined_and_one_of_a_row_s_pictures_is_drawn_by_the_seed(mllmu):
    records = sound(load(mllmu / "bench", "Test_Set"))
    assert len(records) == 6 * COUNT * FACTS
    rows = {row["ID"]: row for row in table(mllmu / "bench", "Test_Set")}
    drawn = {}
    for record in records:
        if record.image:
            person = record.id.split("/")[0]
            at = [image["bytes"] for image in rows[person]["images"]].index(record.image.source)
            assert drawn.setdefault(person, at) == at
    assert len(drawn) == COUNT and set(drawn.values()) == {0, 1}

    def sources(seed):
        return [record.image.source for record in load(mllmu / "bench", "Test_Set", seed) if record.image]

    random.seed(1)
    again = sources(0)
    assert again == [record.image.source for record in records if record.image] and again != sources(1)


def test_the_same_folder_name_with_training_columns_gives_qa_pairs(mllmu):
    records = sound(load(mllmu / "train", "forget_5"))
    assert kinds(records) == {("image", "generation"): FORGET * FACTS}
    row = table(mllmu / "train", "forget_5")[0]
    pair = json.loads(row["metadata"])[0]
    assert (records[0].question, records[0].answer) == (pair["Question"], pair["Answer"])
    assert records[0].id.split("/")[0] == row["ID"] and records[0].image.source == row["image"]["bytes"]


def test_picture_questions_in_text_name_the_person(mllmu):
    names = person_names(mllmu / "bench")
    assert names == {str(i + 1): twins.WORLD.people[i] for i in range(COUNT)}
    records = load(mllmu / "train", "ft_Data")
    records.append(Record("1/face", "x", "image", "generation", "Who is in the picture?", "x", image=records[0].image))
    texts = sound(without_pictures(records, names))
    assert len(texts) == len(records) - 1 and {record.modality for record in texts} == {"text"}
    for text, record in zip(texts, records, strict=False):
        name = names[record.id.split("/")[0]]
        assert text.subject == name in text.question and not record.subject
        assert text.question.replace(name, "this person") == record.question
    with pytest.raises(InputError, match="is of person 1, who has no name; names has 0"):
        without_pictures(records, {})


# --------------------------------------------------------------------------------------------------------- CLEAR


def test_clear_captions_and_tofu_share_a_table(clear):
    records = sound(load(clear, "forget05+tofu"))
    assert kinds(records) == {("image", "generation"): FORGET, ("text", "generation"): FORGET * FACTS}
    for record, row in zip(records, table(clear, "forget05+tofu"), strict=True):
        expected = row["caption"] if row["image"] else row["answer"]
        assert record.answer == expected
        asked = [row["question"]] if row["image"] is None else benchmarks.CAPTION_QUESTIONS
        assert record.question in asked
    every = load(clear, "full+tofu")
    assert len({record.question for record in every if record.image}) > 1
    assert every == load(clear, "full+tofu") != load(clear, "full+tofu", seed=1)
    assert kinds(sound(load(clear, "forget05"))) == {("image", "generation"): FORGET}


def test_clear_perturbed_gives_caption_choice_and_name(clear):
    rows = table(clear, "retain_perturbed")
    records = sound(load(clear, "retain_perturbed"))
    assert kinds(records) == {("image", "generation"): 2 * len(rows), ("image", "choice"): len(rows)}
    for i, row in enumerate(rows):
        caption, choice, name = records[3 * i : 3 * i + 3]
        assert (caption.answer, caption.paraphrase) == (row["caption"], row["paraphrased_caption"])
        assert caption.perturbed == tuple(row["perturbed_captions"])
        assert choice.answer == row["caption"] and set(choice.options) == {row["caption"], *row["perturbed_captions"]}
        assert (name.answer, name.perturbed) == (row["name"], tuple(row["perturbed_names"]))


def test_the_truth_is_not_always_at_the_same_place(clear):
    def letters(seed):
        groups = ("retain_perturbed", "forget05_perturbed", "real_faces")
        records = [record for group in groups for record in load(clear, group, seed)]
        return [record.target for record in records if record.task == "choice"]

    assert len(set(letters(0))) >= 3 and letters(0) == letters(0) != letters(1)


def test_clear_options_with_and_without_picture_question_and_truth(clear, tmp_path):
    faces, world = sound(load(clear, "real_faces")), sound(load(clear, "real_world"))
    assert kinds(faces) == {("image", "generation"): 4, ("image", "choice"): 4} == kinds(world)
    assert {record.question for record in faces} == {benchmarks.NAME_QUESTION}
    assert all(record.answer not in record.perturbed for record in faces)
    assert "colour" in world[0].question and len(world[1].options) == twins.OPTION
    row = {"image": None, "question": "Where", "answer": "Oslo", "options": ["Lima", "Oslo", "Lima"]}
    twins.write(tmp_path / "real_world", twins.REAL_WORLD, [row])
    asked, choice = sound(load(tmp_path, "real_world"))
    assert asked.modality == choice.modality == "text"
    assert set(asked.perturbed) == {"Lima"} and sorted(choice.options) == ["Lima", "Oslo"]


def test_a_column_of_subjects_is_read_in_every_schema(tmp_path):
    row = {"question": "Where is Oslo", "answer": "Norway", "options": ["Norway", "Peru"], "subject": "Oslo"}
    columns = {**twins.REAL_WORLD, "subject": twins.pa.string()}
    twins.write(tmp_path / "real_world", columns, [row, row | {"subject": None}])
    assert [record.subject for record in load(tmp_path, "real_world")] == ["Oslo", "Oslo", "", ""]
    twins.write(
        tmp_path / "train",
        {**twins.TRAINING, "subject": twins.pa.string()},
        [twins.training_row(0) | {"subject": "she"}],
    )
    assert {record.subject for record in load(tmp_path, "train")} == {"she"}
    twins.write(tmp_path / "empty", columns, [row | {"subject": " "}])
    with pytest.raises(InputError, match="row 0, column subject: found ' '; expected a text that is not empty"):
        load(tmp_path, "empty")


# ------------------------------------------------------------------------------------------- finding and fetching


def test_files_that_datasets_wrote_are_read_the_same(mllmu, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (it is in the extra dev)")
    rows = table(mllmu / "bench", "forget_5")
    features = datasets.Features.from_arrow_schema(parquet.read_schema(next((mllmu / "bench" / "forget_5").glob("*"))))
    features["image"] = datasets.Image()
    (tmp_path / "forget_5").mkdir()
    written = datasets.Dataset.from_list(rows, features)
    written.to_parquet(tmp_path / "forget_5" / "train-00000-of-00001.parquet")
    ours, theirs = load(mllmu / "bench", "forget_5"), load(tmp_path, "forget_5")
    assert [r.id for r in ours] == [r.id for r in theirs] and [r.prompt for r in ours] == [r.prompt for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.image is None) == (other.image is None)
        assert mine.image is None or mine.image.open().tobytes() == other.image.open().tobytes()


def test_a_missing_folder_says_how_to_fetch_it(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path / "my data", "forget_5")
    for command in (
        f"hf download MLLMMU/MLLMU-Bench --repo-type dataset --local-dir '{tmp_path}/my data'",
        f"hf download MLLMMU/baseline_train_split --local-dir '{tmp_path}/my data'",
        f"hf download therem/CLEAR --repo-type dataset --local-dir '{tmp_path}/my data'",
    ):
        assert command in str(caught.value)


def test_an_unknown_group_lists_those_present(clear):
    with pytest.raises(InputError, match=r"no table 'forget_5'; it has forget05, forget05\+tofu, .*real_world"):
        load(clear, "forget_5")


def test_a_hub_id_is_fetched_and_says_so(mllmu, tmp_path, monkeypatch, caplog):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fetch(repository, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        if repo_type == "dataset":
            raise LocalEntryNotFoundError("no such dataset\nsecond line")
        return str(mllmu / "train")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with caplog.at_level(logging.INFO, "mipfast"):
        assert len(load("MLLMMU/baseline_train_split", "forget_5")) == FORGET * FACTS
    assert asked == [("MLLMMU/baseline_train_split", kind, "forget_5/*.parquet") for kind in ("dataset", "model")]
    assert sum("fetching forget_5/*.parquet" in message for message in caplog.messages) == 1
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: fetch(a[0], "dataset", ""))
    with pytest.raises(InputError, match=r"some/where is no folder here and cannot be fetched .*no such dataset; as a"):
        load("some/where", "forget_5")


def test_importing_the_data_loads_nothing_heavy():
    heavy = "{'datasets', 'pyarrow', 'pandas', 'PIL', 'transformers', 'huggingface_hub'}"
    code = f"import sys, mipfast, mipfast.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
