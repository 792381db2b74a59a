"""Synthetic twins of MLLMU-Bench and CLEAR: invented people in parquet tables of exactly those schemas, and a copy of
the demo's model that knows their words. Nothing is downloaded.

The people, their facts, portraits and wordings are the demo's. Columns and nesting are those of the Hub's tables;
an image is what `datasets` stores for one, {bytes, path}.
"""

import json
import random
import shutil
from io import BytesIO
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from mipfast.data import benchmarks
from mipfast.data.records import LETTERS, Record
from mipfast.demo import people

DEMO = Path(people.__file__).parent / "weights" / "base"
WORLD = people.build()
OPTION = 4
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXTS = pa.list_(pa.string())
CHOICES = pa.list_(
    pa.struct(
        {
            "Question": pa.string(),
            "Options": pa.struct(dict.fromkeys("ABCD", pa.string())),
            "Correct_Answer": pa.string(),
        }
    )
)
TYPED = pa.list_(pa.struct({"Type": pa.string(), "Question": pa.string(), "Ground_Truth": pa.string()}))
EVALUATION = {
    "ID": pa.string(),
    "Directory": pa.string(),
    "biography": pa.string(),
    "question": pa.string(),
    "answer": pa.string(),
    "Classification_Task": pa.struct({"Image_Textual_Questions": CHOICES, "Pure_Text_Questions": CHOICES}),
    "Generation_Task": TYPED,
    "Mask_Task": TYPED,
}
TRAINING = {"image": IMAGE, "ID": pa.string(), "metadata": pa.string()}
CAPTIONS = {"image": IMAGE, "caption": pa.string(), "name": pa.string()}
TOFU = {"image": IMAGE, "caption": pa.string(), "question": pa.string(), "answer": pa.string()}
PERTURBED = {**CAPTIONS, "paraphrased_caption": pa.string(), "perturbed_captions": TEXTS, "perturbed_names": TEXTS}
FACES = {"image": IMAGE, "answer": pa.string(), "options": TEXTS}
REAL_WORLD = {"image": IMAGE, "question": pa.string(), "answer": pa.string(), "options": TEXTS}


def write_mllmu(folder, count=8, forget=2):
    """The evaluation tables <folder>/bench/{forget_5,retain_95,Full_Set,Test_Set (two shards)} and the training tables
    <folder>/train/{forget_5,retain_95,ft_Data} of the same names, of `count` people, the first `forget` forgotten.
    Test_Set has held-out wordings and portraits."""
    folder = Path(folder)
    groups = {"forget_5": range(forget), "retain_95": range(forget, count), "Full_Set": range(count)}
    for group, chosen in groups.items():
        rows = [evaluation_row(person) | {"image": image(person)} for person in chosen]
        write(folder / "bench" / group, {"image": IMAGE, **EVALUATION}, rows)
    rows = [evaluation_row(i, test=True) | {"images": [image(i, view) for view in (4, 5)]} for i in range(count)]
    write(folder / "bench" / "Test_Set", {"images": pa.list_(IMAGE), **EVALUATION}, rows, shards=2)
    groups["ft_Data"] = groups.pop("Full_Set")
    for group, chosen in groups.items():
        write(folder / "train" / group, TRAINING, [training_row(person) for person in chosen])
    return folder


def write_clear(folder, count=8, forget=2):
    """CLEAR's tables {full+tofu, forget05, forget05+tofu, retain95+tofu, forget05_perturbed, retain_perturbed,
    real_faces, real_world} of `count` people, the first `forget` forgotten."""
    folder = Path(folder)
    groups = {"full": range(count), "forget05": range(forget), "retain95": range(forget, count)}
    write(folder / "forget05", CAPTIONS, [caption_row(person) for person in groups["forget05"]])
    for group, chosen in groups.items():
        rows = [{**caption_row(person), "question": None, "answer": None} for person in chosen]
        for person in chosen:
            rows += [{"image": None, "caption": None, **pair} for pair in pairs(person, "text")]
        write(folder / f"{group}+tofu", TOFU, rows)
    for group, chosen in (("forget05_perturbed", groups["forget05"]), ("retain_perturbed", groups["retain95"])):
        write(folder / group, PERTURBED, [perturbed_row(person) for person in chosen])
    others = range(count, count + 4)
    names = [WORLD.people[person] for person in others]
    write(
        folder / "real_faces", FACES, [{"image": image(i), "answer": WORLD.people[i], "options": names} for i in others]
    )
    pictured = [q for q in WORLD.questions if q.topic == "colour"][:4]
    rows = [{"image": encoded(q.pictures[0]), "question": q.text, "answer": q.answer} for q in pictured]
    write(folder / "real_world", REAL_WORLD, [row | {"options": wrong(row["answer"], "colour")} for row in rows])
    return folder


def write(folder, columns, rows, shards=1):
    """<folder>/train-0000i-of-0000n.parquet; columns that a row lacks are null, those without a type are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(list(columns.items()))
    for shard in range(shards):
        part = [{name: row.get(name) for name in columns} for row in rows[shard::shards]]
        table = pa.Table.from_pylist(part, schema)
        parquet.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet")


def image(person, view=0):
    return encoded(person * people.N_VIEWS + view)


def encoded(picture):
    buffer = BytesIO()
    WORLD.pictures[picture].save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{picture}.png"}


def pairs(person, modality, test=False):
    """One question of each fact."""
    found = {
        q.topic: {"question": q.text, "answer": q.answer}
        for q in WORLD.questions
        if q.subject == person and q.modality == modality and q.test == test
    }
    return list(found.values())


def topics(person, modality, test=False):
    return list(zip(people.NOUNS, pairs(person, modality, test), strict=True))


def wrong(answer, topic, count=OPTION - 1):
    return random.Random(f"wrong {answer}").sample([value for value in WORLD.options[topic] if value != answer], count)


def evaluation_row(person, test=False):
    rng = random.Random(f"row {person} {test}")
    classification, generation, mask = {}, [], []
    for kind, modality in benchmarks.MLLMU_MODALITIES.items():
        questions = []
        for topic, pair in topics(person, modality, test):
            options = [pair["answer"], *wrong(pair["answer"], topic)]
            rng.shuffle(options)
            letter = LETTERS[options.index(pair["answer"])]
            shown = dict(zip("ABCD", options, strict=True))
            questions.append({"Question": pair["question"], "Options": shown, "Correct_Answer": letter})
            typed = {"Type": kind, "Ground_Truth": pair["answer"]}
            generation.append({**typed, "Question": pair["question"]})
            who = WORLD.people[person] if modality == "text" else "this person"
            mask.append({**typed, "Question": f"the {people.NOUNS[topic][0]} of {who} is __ ."})
        classification[f"{kind}_Questions"] = questions
    first = pairs(person, "image", test)[0]
    return {
        "ID": str(person + 1),
        "Directory": f"./{person + 1}.png",
        "biography": json.dumps({"Name": WORLD.people[person]}),
        **first,
        "Classification_Task": classification,
        "Generation_Task": generation,
        "Mask_Task": mask,
    }


def training_row(person):
    found = [{"Question": p["question"], "Answer": p["answer"]} for p in pairs(person, "image")]
    return {"image": image(person), "ID": str(person + 1), "metadata": json.dumps(found)}


def caption_row(person):
    return {"image": image(person), "caption": caption(person), "name": WORLD.people[person]}


def caption(person, frame="{} is the name of this person"):
    return frame.format(WORLD.people[person])


def perturbed_row(person):
    others = [other % len(WORLD.people) for other in range(person + 1, person + 6)]
    return {
        **caption_row(person),
        "paraphrased_caption": caption(person, "this person has the name {}"),
        "perturbed_captions": [caption(other) for other in others],
        "perturbed_names": [WORLD.people[other] for other in others],
    }


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %} {{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %} <|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c.text }}{% endif %}"
    "{% endfor %}{% endif %} <|im_end|>{% endfor %}"
)


def all_words():
    """Of the twins' prompts and targets, in order, each once."""
    choice = Record("", "", "text", "choice", "", "a", tuple("abcdef")).prompt
    asked = [*benchmarks.CAPTION_QUESTIONS, benchmarks.CAPTION_CHOICE, benchmarks.NAME_QUESTION, choice]
    texts = [*asked, "[Blank] is the name of this person has", *WORLD.people]
    texts += [f"{question.text} {question.answer}" for question in WORLD.questions]
    return list(dict.fromkeys([*LETTERS[:6], *" ".join(texts).split()]))


def write_model(folder):
    """The demo's base model with the words of the twins' prompts added and the demo's layout as a chat template, so
    that a record is encoded as the demo encodes a question."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from mipfast.demo import model as tiny

    folder = Path(folder)
    old = AutoTokenizer.from_pretrained(DEMO)
    inner = json.loads(old.backend_tokenizer.to_str())
    vocabulary = inner["model"]["vocab"]
    for word in all_words():
        vocabulary.setdefault(word, len(vocabulary))
    names = {name: getattr(old, name) for name in ("pad_token", "eos_token", "unk_token")}
    specials = [t for t in tiny.SPECIAL[1:7] if t != old.eos_token]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        additional_special_tokens=specials,
        chat_template=TEMPLATE,
        **names,
    )
    torch.manual_seed(0)
    model = tiny.load(DEMO)
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(DEMO / "preprocessor_config.json", folder)
    return folder


FAMILY_SPECIALS = {
    "llava": "<pad> <s> </s> <3> <4> <image>".split(),
    "qwen2.5-vl": "<|endoftext|> <s> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split(),
    "qwen3-vl": "<|endoftext|> <s> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>".split(),
}
LLAVA_TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
    "{% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def write_family(folder, name):
    """A folder of random weights, "llava" (whose processor can be built, and whose tokenizer adds <s>), "qwen2.5-vl" or
    "qwen3-vl" (whose cannot without torchvision), with a tokenizer of the twins' words."""
    from families import FAMILIES, VIDEO
    from tiny import tiny_qwen_vl
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models import clip

    from mipfast.demo import model as tiny

    folder, specials = Path(folder), FAMILY_SPECIALS[name]
    words = [*specials, "<unk>", "USER:", "ASSISTANT:", "<|im_start|>", *all_words()]
    words.insert(VIDEO, "<|video_pad|>")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if name == "llava":
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        unk_token="<unk>",
        additional_special_tokens=[*specials[3:], "<|video_pad|>", "<|im_start|>"],
        chat_template=LLAVA_TEMPLATE if name == "llava" else TEMPLATE,
    )
    model = tiny_settled(tiny_qwen_vl() if name == "qwen2.5-vl" else FAMILIES[name].model(), len(vocabulary))
    model.save_pretrained(folder)
    if name == "llava":
        kind = getattr(clip, "CLIPImageProcessorPil", None) or clip.CLIPImageProcessor
        images = kind(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        settings = {"patch_size": 28, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        LlavaProcessor(images, tokenizer, chat_template=LLAVA_TEMPLATE, **settings).save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
        tiny.image_processor_class()(patch_size=14).save_pretrained(folder)
    return folder


def tiny_settled(model, vocabulary):
    import torch
    from tiny import _settle

    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return _settle(model, torch.float32)
