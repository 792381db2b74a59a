"""Records to model inputs: equal to the family's own processor, the answer alone labelled, padding that changes
nothing."""

import json
from dataclasses import replace
from io import BytesIO

import pytest
import torch
import twins
from PIL import Image

import mipfast
from mipfast import InputError
from mipfast.data import Picture, Record, checkpoint, load
from mipfast.data.encoder import Batches, Encoder, in_batches
from mipfast.experiment import locate_file

FAMILIES = ("llava", "qwen3-vl", "demo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: twins.write_family(root / name, name) for name in FAMILIES[:2]}
    return made | {"demo": twins.write_model(root / "demo")}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Text and pictures by turns, of unequal lengths; the second picture is wide and needs resizing."""
    bench = twins.write_mllmu(tmp_path_factory.mktemp("twins"), 2, 1) / "bench"
    kinds = [[r for r in load(bench, "Full_Set") if r.modality == kind][::4] for kind in ("text", "image")]
    found = [record for pair in zip(*kinds, strict=True) for record in pair][:6]
    found[3] = Record("wide", "x", "image", "generation", found[3].question, "Olga Voss", image=portrait((150, 90)))
    assert {len(record.prompt.split()) for record in found} != 1
    return found


def portrait(size):
    return Image.radial_gradient("L").resize(size).convert("RGB")


def built(encoder, folder, name):
    """The family's real processor. Qwen's is built without its video processor, which needs torchvision."""
    if name == "llava":
        return encoder.processor
    import transformers

    base = transformers.Qwen3VLProcessor if name == "qwen3-vl" else transformers.Qwen2_5_VLProcessor

    class WithoutVideos(base):
        def check_argument_for_proper_class(self, argument_name, argument):
            return None

    template = encoder.tokenizer.chat_template
    return WithoutVideos(encoder.image_processor, encoder.tokenizer, None, chat_template=template)


def conversation(record):
    parts = [{"type": "text", "text": record.prompt}]
    if record.image is not None:
        image = record.image.open() if isinstance(record.image, Picture) else record.image
        parts.insert(0, {"type": "image", "image": image})
    return [{"role": "user", "content": parts}]


# ------------------------------------------------------------------------------------------- the processor's own


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_processor_s_own(folders, records, name):
    """One by one, and as a batch padded on the left, bit for bit. The tokenizer with the image processor gives the same
    as the processor."""
    encoder = Encoder.from_pretrained(folders[name])
    assert (encoder.processor is not None) == (name == "llava")
    processor = built(encoder, folders[name], name)
    through = Encoder(encoder.tokenizer, encoder.image_processor, encoder.config, processor)
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    for record in records:
        expected = processor.apply_chat_template(conversation(record), **options)
        for one in (encoder, through):
            same(one.prompts([record]), expected)
    padding = dict(padding=True, padding_side="left")
    expected = processor.apply_chat_template([conversation(record) for record in records], **options, **padding)
    same(encoder.prompts(records), expected)
    assert (expected["attention_mask"][:, 0] == 0).any()


def same(found, expected):
    assert found.keys() >= expected.keys() - {"mm_token_type_ids"}
    for key, value in expected.items():
        if key in found:  # transformers' Llava ignores the token types it is given
            assert torch.equal(found[key].to(value.dtype), value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_answer_is_labelled(folders, records, name):
    encoder = Encoder.from_pretrained(folders[name])
    batch = encoder.batch(records)
    for i, record in enumerate(records):
        alone = encoder.prompts([record])["input_ids"][0]
        assert torch.equal(batch["input_ids"][i, : len(alone)], alone)
        labelled = (batch["labels"][i] != -100).nonzero().flatten().tolist()
        stop = int(batch["attention_mask"][i].sum())
        assert labelled == list(range(len(alone), stop)) and batch["attention_mask"][i, :stop].all()
        assert encoder.tokenizer.decode(batch["labels"][i, labelled]) == record.target
    assert len({len(encoder.encode(record).prompt) for record in records}) > 2


def test_the_boundary_is_one_between_tokens(folders):
    """A tokenizer that would merge the prompt's last letter with the answer's first."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(["a", "b", "c", "bc", "<pad>"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")])))
    assert tokenizer("abc")["input_ids"] == [0, 3]
    encoder = Encoder(tokenizer, None, Encoder.from_pretrained(folders["demo"]).config)
    batch = encoder.batch([Record("1", "x", "text", "generation", "ab", "c")])
    assert batch["input_ids"].tolist() == [[0, 1, 2]] and batch["labels"].tolist() == [[-100, -100, 2]]


# ------------------------------------------------------------------------------------------- whom a question is about


def about(question, subject="Olga Voss", image=None, **more):
    return Record("7", "set", "image" if image else "text", "generation", question, "dog", image=image, subject=subject)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_subject_s_tokens_are_found_where_it_stands_last_in_the_question(folders, name, template):
    encoder = Encoder.from_pretrained(folders[name])
    if not template:
        encoder.tokenizer.chat_template = None
        if encoder.processor:
            encoder.processor.chat_template = None
    words = encoder.tokenizer("Olga Voss", add_special_tokens=False)["input_ids"]
    assert len(words) == 2 and encoder.tokenizer.unk_token_id not in words
    records = [
        about("Olga Voss has which pet ?"),
        about(" Is Olga Voss like Olga Voss ?\n"),
        about("Name the pet of Olga Voss", image=portrait((90, 60))),
        replace(about("Which pet has Olga Voss ?"), task="choice", options=("dog", "Olga Voss"), answer="dog"),
    ]
    batch = encoder.batch(records, subject=True)
    assert batch["subject"].dtype == torch.bool and batch["subject"].shape == batch["labels"].shape
    for ids, marks, record in zip(batch["input_ids"], batch["subject"], records, strict=True):
        assert ids[marks].tolist() == words
        places = [i for i in range(len(ids) - 1) if ids[i : i + 2].tolist() == words]
        asked = record.question.count("Olga Voss")
        assert len(places) == asked + (record.task == "choice")
        assert marks.nonzero()[:, 0].tolist() == [places[asked - 1], places[asked - 1] + 1]
    pictured = [Batches(encoder, records, 4, "cpu", subject=marked)[1] for marked in (True, False)]
    assert pictured[0]["subject"].sum() == 2 and pictured[0].keys() - pictured[1].keys() == {"subject"}
    rows = [encoder.encode(record, subject=True) for record in records]
    assert torch.equal(encoder.batch(rows)["subject"], batch["subject"])
    assert "subject" not in encoder.batch(records) | encoder.prompts(rows)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("template", [None, "Zoë says Ångström: {{ messages[0].content }} Zoë Ångström !"])
def test_a_subject_of_many_tokens_and_of_letters_of_several_bytes(folders, template, trim):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["Where was Zoë born ? In which town ?"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="!", eos_token="?", chat_template=template)
    encoder = Encoder(tokenizer, None, Encoder.from_pretrained(folders["demo"]).config)
    for question in ("Where was Zoë Ångström born?", "Zoë Ångström, or Zoë Ångström", "Is Rome Zoë Ångström's"):
        row = encoder.encode(about(question, "Zoë Ångström "), subject=True)
        assert len(row.subject) > 4 and row.subject == list(range(row.subject[0], row.subject[-1] + 1))
        assert tokenizer.decode([row.prompt[i] for i in row.subject]).strip() == "Zoë Ångström"
        before, _, after = question.rpartition("Zoë Ångström")
        assert tokenizer.decode(row.prompt[: row.subject[0]]).endswith(before.strip())
        assert tokenizer.decode(row.prompt[row.subject[-1] + 1 :]).startswith(after)


def test_a_subject_that_is_not_found_is_named(folders):
    from transformers import ByT5Tokenizer

    encoder = Encoder.from_pretrained(folders["demo"])
    for subject, says in (("", "it has no subject; expected the words"), ("Rome", "its subject 'Rome' is not in 'Who")):
        assert "subject" not in encoder.batch([about("Who is it ?", subject)])
        with pytest.raises(InputError, match=f"record 7 of set: {says}"):
            encoder.batch([about("Who is it ?", subject)], subject=True)
    with pytest.raises(InputError, match="record 7 of set: ByT5Tokenizer does not tell .*; expected a fast tokenizer"):
        Encoder(ByT5Tokenizer(), None, encoder.config).batch([about("Who is Olga Voss ?")], subject=True)


# --------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_gives_what_its_records_give_alone(folders, records, name):
    """Text and pictures, answers and padding side by side: the same log probability of every answer; and on the left
    the same next token."""
    encoder, model = Encoder.from_pretrained(folders[name]), checkpoint.load_model(folders[name], dtype="float32")

    def answers(batch):
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].log_softmax(-1)
        scored = logits.gather(2, labels.clamp_min(0)[..., None])[..., 0]
        return scored.where(labels != -100, 0).sum(1)

    alone = torch.cat([answers(encoder.batch([record])) for record in records])
    torch.testing.assert_close(answers(encoder.batch(records)), alone, rtol=1e-4, atol=1e-4)
    assert alone.unique().numel() == len(records)

    def first(batch):
        return model.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch["input_ids"].shape[1] :]

    together = first(encoder.prompts(records))
    for i, record in enumerate(records):
        one = first(encoder.prompts([record]))[0]
        assert torch.equal(together[i, : len(one)], one)


def test_the_demo_s_model_answers_the_twins(folders, records):
    encoder, model = Encoder.from_pretrained(folders["demo"]), checkpoint.load_model(folders["demo"])
    asked = [record for record in records if record.task == "generation" and record.id != "wide"]
    prompts = encoder.prompts(asked)
    written = model.generate(**prompts, max_new_tokens=1, do_sample=False)[:, -1]
    assert [encoder.tokenizer.decode(token) for token in written] == [record.answer for record in asked]


@pytest.mark.parametrize("name", FAMILIES[:2])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_a_file_is_located_through_either_path(folders, records, tmp_path, name, modality):
    lines = []
    for i, record in enumerate(record for record in records if record.image or modality == "text"):
        line = {"prompt": record.prompt, "answer": record.target}
        if record.image:
            conversation(record)[0]["content"][0]["image"].save(tmp_path / f"{i}.png")
            line["image"] = f"{i}.png"
        lines.append(line)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    encoder, model = Encoder.from_pretrained(folders[name]), checkpoint.load_model(folders[name], dtype="float32")
    config = mipfast.LocateConfig(modality=modality)
    locate_file.locate_file(model, encoder, data, tmp_path / "out", config, batch_size=2)
    found = locate_file.read(tmp_path / "out")
    pictured = [record for record in records if record.image or modality == "text"]
    assert len(found.scores) == len(lines)
    for scores, record in zip(found.scores, pictured, strict=True):
        alone = mipfast.locate(model, encoder.batch([record]), config).scores[0]
        torch.testing.assert_close(scores, alone, rtol=1e-3, atol=1e-4 * alone.abs().max())


# ------------------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_the_same_from_memory_file_and_bytes(folders, tmp_path):
    encoder = Encoder.from_pretrained(folders["llava"])
    image = portrait((70, 64))
    image.save(tmp_path / "a.png")
    sources = [image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    sources += [Picture(source) for source in sources]
    batches = [encoder.batch([Record("1", "x", "image", "generation", "What", "dog", image=s)]) for s in sources]
    for batch in batches:
        assert all(torch.equal(batch[key], value) for key, value in batches[0].items())


def test_a_picture_on_its_side_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = portrait((40, 20))
    image.save(tmp_path / "a.jpg", exif=exif)
    picture = Picture(tmp_path / "a.jpg")
    assert picture.size == picture.open().size == (20, 40)


def test_decoding_leaves_the_record_small():
    buffer = BytesIO()
    portrait((400, 400)).save(buffer, "JPEG")
    picture = Picture(buffer.getvalue())
    assert picture.open() is not picture.open() and vars(picture).keys() == {"source", "where"}


def test_batches_are_of_one_kind_and_similar_length(folders, records):
    encoder = Encoder.from_pretrained(folders["llava"])
    rows = [encoder.encode(record) for record in records]
    batches = in_batches(rows, 2)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert all(len({bool(rows[i].image) for i in batch}) == 1 for batch in batches)
    for kind in (False, True):
        lengths = [len(rows[i].prompt) for batch in batches for i in batch if bool(rows[i].image) == kind]
        assert lengths == sorted(lengths)


def test_what_cannot_be_encoded(folders):
    llava = Encoder.from_pretrained(folders["llava"])

    def ask(question, image=None, encoder=llava):
        return encoder.batch([Record("7", "set", "text", "generation", question, "dog", image=image)])

    with pytest.raises(InputError, match="record 7 of set: the prompt has 1 image placeholders; expected none"):
        ask("What is <image> ?")
    with pytest.raises(InputError, match="record 7 of set: the prompt has 2 image placeholders; expected one"):
        ask("What is <image> ?", portrait((9, 9)))
    with pytest.raises(InputError, match="record 7 of set: the picture cannot be read as a picture"):
        ask("What", Picture(b"no picture"))
    blind = Encoder(llava.tokenizer, llava.image_processor, llava.config)
    with pytest.raises(InputError, match="pictures for llava cannot be encoded here; expected a folder with its proc"):
        ask("What", portrait((9, 9)), blind)

    class Rewording:
        chat_template = llava.processor.chat_template
        apply_chat_template = llava.processor.apply_chat_template

        def __call__(self, text, **options):
            return llava.processor(text=["Please " + text[0]], **options)

    reworded = Encoder(llava.tokenizer, llava.image_processor, llava.config, Rewording())
    with pytest.raises(InputError, match="Rewording changes more of the prompt than its image placeholder"):
        ask("What", portrait((9, 9)), reworded)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "no/such/folder"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(mipfast.ModelError, match="there is no folder"):
        Encoder.from_pretrained(name)
