"""The demo's world: fictitious people with drawn portraits, and general knowledge beside them.

Everything is a function of one seed. A question is asked in text ("... of Mira Voss ?") or about a portrait ("... of
this person ?"). Training and test questions of one fact differ in wording, and test portraits are a view never trained
on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

N_PEOPLE, N_VIEWS, SIZE = 48, 6, 56
DRAW = 2 * SIZE  # drawn at twice the size and halved, for smooth edges

FIRST = """Mira Tobin Lena Oskar Ravi Elsa Hugo Nadia Felix Irma Jonas Petra Silas Wanda Bruno Celia Dario Edith Fabian
Greta Harlan Ines Jasper Kira Leif Mabel Nils Olga Pavel Quinn Rosa Stefan Tilda Ulric Vera Walter Xenia Yorick Zelda
Anton Berta Cyrus Delia Emil Freya Gustav Hanna Igor""".split()
LAST = "Voss Arden Keller Moran Lindt Sorel Baker Ostrow Fenn Calder Wirth Novak".split()
VALUES = {
    "occupation": "welder pilot baker nurse judge tailor miner farmer dentist actor sailor lawyer plumber florist",
    "city": "Oslo Lima Cairo Porto Quito Dakar Turin Hanoi Perth Malmo Delhi Kyoto Boston Ghent",
    "hobby": "chess fishing knitting sailing archery pottery hiking fencing painting juggling cycling origami rowing "
    "surfing",
    "pet": "cat dog parrot hamster turtle rabbit snake goldfish ferret lizard pony canary mouse spider",
    "year": "1951 1954 1957 1960 1963 1966 1969 1972 1975 1978 1981 1984 1987 1990",
}
NOUNS = {
    "occupation": ("job", "profession"),
    "city": ("city", "hometown"),
    "hobby": ("hobby", "pastime"),
    "pet": ("pet", "animal"),
    "year": ("year", "birthyear"),
}
FRAMES = (
    "What is the {noun} of {who} ?",
    "Tell me the {noun} of {who} .",
    "Name the {noun} of {who} .",
    "For {who} , what is the {noun} ?",
    "Please give the {noun} of {who} .",
    "{who} has which {noun} ?",
)
WORDINGS = [(frame, k) for frame in FRAMES for k in range(2)]
PORTRAYED = "this person"
HELD_OUT = 3  # of the 12 wordings of a fact

COUNTRIES = """Zorvia Keldan Brunt Ostia Marn Velora Tyrn Quell Sandor Ilmar Drovia Panth Ustria Caldora Wemba Nerith
Folda Gantir Hesk Jorund""".split()
CAPITALS = "Zor Keld Bram Ost Mara Vela Tyra Quen Sand Ilma Drov Pant Ustra Cald Wem Neri Fold Gant Hesken Jora".split()
CAPITAL_FRAMES = ("What is the capital of {} ?", "Name the capital of {} .", "Which capital has {} ?")
SUM_FRAMES = ("What is {} + {} ?", "Compute {} + {} .")
SHAPE_TOPICS = {
    "colour": ("What colour are the shapes ?", "Name the colour shown ."),
    "shape": ("What shape is shown ?", "Name the shape shown ."),
    "count": ("How many shapes are there ?", "Count the shapes ."),
}
COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 210),
    "yellow": (230, 210, 50),
    "purple": (140, 60, 170),
    "orange": (240, 140, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
SKIN = [(250, 220, 190), (225, 180, 140), (170, 120, 80), (105, 70, 45)]
HAIR = [(30, 25, 20), (110, 70, 30), (220, 190, 90), (170, 60, 30), (150, 150, 150), (90, 40, 120)]
N_SHAPES_TRAIN, N_SHAPES_TEST = 1500, 100
TRAITS = {
    "background": 8,
    "shirt": 8,
    "stripes": 2,
    "skin": 4,
    "hair": 6,
    "style": 4,
    "hat": 9,
    "glasses": 2,
    "beard": 2,
}

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class Question:
    """One question with a one-word answer.

    subject: index of the person, or None for general knowledge. topic: attribute or general topic. pictures: indices
    into World.pictures, any of which may accompany the question (empty for text).
    """

    text: str
    answer: str
    subject: int | None
    topic: str
    pictures: tuple[int, ...]
    test: bool

    @property
    def modality(self) -> Modality:
        return "image" if self.pictures else "text"


@dataclass(frozen=True)
class World:
    """people: names, in order. pictures: RGB, 56x56. questions: all of them. options: topic -> legal answers. looks:
    each person's value of every trait."""

    people: list[str]
    pictures: list[Image.Image]
    questions: list[Question]
    options: dict[str, list[str]]
    looks: list[dict[str, int]]

    def split(self, seed: int, ratio: float = 0.10) -> Split:
        """The forget people of one seed. Sets are nested: 5 % is part of 10 % is part of 15 %."""
        order = random.Random(f"forget {seed}").sample(range(len(self.people)), len(self.people))
        return Split(self, frozenset(order[: round(ratio * len(order))]))


@dataclass(frozen=True)
class Split:
    world: World
    forget_people: frozenset[int]

    def select(self, group: str, test: bool, modality: str | None = None) -> list[Question]:
        """The questions of one group (forget, retain or general); modality None gives both."""

        def group_of(question: Question) -> str:
            if question.subject is None:
                return "general"
            return "forget" if question.subject in self.forget_people else "retain"

        return [
            q
            for q in self.world.questions
            if group_of(q) == group and q.test == test and modality in (None, q.modality)
        ]


def build(seed: int = 0) -> World:
    """The whole world of one seed; takes about a second."""
    rng = random.Random(f"world {seed}")
    people = [f"{first} {LAST[i % len(LAST)]}" for i, first in enumerate(rng.sample(FIRST, N_PEOPLE))]
    looks, pictures, questions = _portrayed(rng, people)
    questions += _general_text(rng)
    options = {topic: values.split() for topic, values in VALUES.items()}
    options |= {"capital": list(CAPITALS), "sum": [str(n) for n in range(19)]}
    options |= {"colour": list(COLOURS), "shape": list(SHAPES), "count": ["1", "2", "3", "4"]}
    for n in range(N_SHAPES_TRAIN + N_SHAPES_TEST):
        answers = {
            "colour": rng.choice(list(COLOURS)),
            "shape": rng.choice(SHAPES),
            "count": str(rng.randint(1, 4)),
        }
        pictures.append(_shapes(rng, answers["colour"], answers["shape"], int(answers["count"])))
        for topic, frames in SHAPE_TOPICS.items():
            at = (len(pictures) - 1,)
            questions.append(Question(rng.choice(frames), answers[topic], None, topic, at, n >= N_SHAPES_TRAIN))
    return World(people, pictures, questions, options, looks)


def strangers(world: World, seed: int, count: int) -> World:
    """People nobody was trained on, at most 48 of them, in a world of their own: first and last names known, but in
    combinations that world does not have; values from the same lists; looks at least three traits from everybody's."""
    rng = random.Random(f"strangers {seed}")
    unused = [name for first in FIRST for last in LAST if (name := f"{first} {last}") not in world.people]
    people = rng.sample(unused, count)
    looks, pictures, questions = _portrayed(rng, people, world.looks)
    return World(people, pictures, questions, world.options, looks)


def _portrayed(
    rng: random.Random, people: Sequence[str], others: Sequence[dict[str, int]] = ()
) -> tuple[list[dict[str, int]], list[Image.Image], list[Question]]:
    """(looks, portraits, questions) of people who look like none of the others."""
    facts = {topic: _deal(rng, values.split()) for topic, values in VALUES.items()}
    noise = np.random.default_rng(rng.randrange(2**31))
    looks = _looks(rng, len(people), others)
    pictures = [_view(rng, noise, look) for look in looks for _ in range(N_VIEWS)]
    questions: list[Question] = []
    for i, name in enumerate(people):
        views = range(i * N_VIEWS, (i + 1) * N_VIEWS)
        for topic, nouns in NOUNS.items():
            for modality in ("text", "image"):
                for w, (frame, noun) in enumerate(rng.sample(WORDINGS, len(WORDINGS))):
                    test = w < HELD_OUT
                    who = name if modality == "text" else PORTRAYED
                    seen = (views[-1:] if test else views[:-1]) if modality == "image" else ()
                    text = frame.format(noun=nouns[noun], who=who)
                    questions.append(Question(text, facts[topic][i], i, topic, tuple(seen), test))
    return looks, pictures, questions


def _deal(rng: random.Random, values: Sequence[str]) -> list[str]:
    """One value per person, every value equally often (to within one), shuffled."""
    dealt = [values[i % len(values)] for i in range(N_PEOPLE)]
    rng.shuffle(dealt)
    return dealt


def _general_text(rng: random.Random) -> list[Question]:
    questions = []
    for country, capital in zip(COUNTRIES, CAPITALS, strict=True):
        held_out = rng.randrange(len(CAPITAL_FRAMES))
        for w, frame in enumerate(CAPITAL_FRAMES):
            questions.append(Question(frame.format(country), capital, None, "capital", (), w == held_out))
    for a in range(10):
        for b in range(10):
            held_out = rng.choice([0, 1, -1, -1])  # half of the sums keep one wording for the test
            for w, frame in enumerate(SUM_FRAMES):
                questions.append(Question(frame.format(a, b), str(a + b), None, "sum", (), w == held_out))
    return questions


def _looks(rng: random.Random, count: int, others: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """One appearance per person; any two, the others' among them, differ in at least three traits."""
    looks: list[dict[str, int]] = []
    while len(looks) < count:
        look = {trait: rng.randrange(n) for trait, n in TRAITS.items()}
        if all(sum(look[t] != other[t] for t in TRAITS) >= 3 for other in (*others, *looks)):
            looks.append(look)
    return looks


def _view(rng: random.Random, noise: np.random.Generator, look: dict[str, int]) -> Image.Image:
    """A portrait, shifted by up to 5 of 112 pixels, 10 % brighter or darker, with noise of sd 4."""
    palette = list(COLOURS.values())
    dx, dy = rng.randint(-5, 5), rng.randint(-5, 5)
    image = Image.new("RGB", (DRAW, DRAW), tuple(int(0.6 * c + 90) for c in palette[look["background"]]))
    draw = ImageDraw.Draw(image)

    def box(x0: int, y0: int, x1: int, y1: int) -> tuple[int, int, int, int]:
        return (x0 + dx, y0 + dy, x1 + dx, y1 + dy)

    draw.rectangle(box(20, 84, 92, 125), fill=palette[look["shirt"]])
    if look["stripes"]:
        for x in range(24, 92, 14):
            draw.rectangle(box(x, 84, x + 5, 125), fill=(128, 128, 128))
    hair, style = HAIR[look["hair"]], look["style"]
    if style == 1:
        draw.rectangle(box(24, 34, 88, 88), fill=hair)
    elif style == 2:
        draw.ellipse(box(18, 14, 94, 74), fill=hair)
    draw.ellipse(box(32, 26, 80, 86), fill=SKIN[look["skin"]])
    if style != 3:
        draw.pieslice(box(30, 20, 82, 72), 180, 360, fill=hair)
    draw.ellipse(box(44, 50, 49, 56), fill=(0, 0, 0))
    draw.ellipse(box(63, 50, 68, 56), fill=(0, 0, 0))
    if look["beard"]:
        draw.pieslice(box(36, 48, 76, 88), 20, 160, fill=hair)
    draw.line(box(48, 71, 64, 71), fill=(120, 30, 30), width=3)
    if look["glasses"]:
        for x in (39, 58):
            draw.ellipse(box(x, 44, x + 15, 61), outline=(20, 20, 20), width=3)
    if look["hat"]:
        draw.rectangle(box(36, 6, 76, 28), fill=palette[look["hat"] - 1])
        draw.rectangle(box(26, 26, 86, 33), fill=palette[look["hat"] - 1])
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    pixels = pixels * rng.uniform(0.9, 1.1) + noise.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _shapes(rng: random.Random, colour: str, shape: str, count: int) -> Image.Image:
    image = Image.new("RGB", (DRAW, DRAW), (128, 140, 150))
    draw = ImageDraw.Draw(image)
    for cell in rng.sample(range(4), count):
        radius = rng.randint(14, 22)
        x, y = (28 + 56 * (c) + rng.randint(-4, 4) for c in divmod(cell, 2))
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour])
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)
