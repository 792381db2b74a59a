"""One question of a benchmark, whatever table it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Record:
    """id: unique within its set, with the person's or row's own id in front of the first "/". group: the set it came
    from, such as forget_5. options: of a multiple choice, in the order shown; answer is one of them. image: a
    PIL.Image or None; only modality="image" has one. paraphrase, perturbed: the answer reworded, and wrong answers of
    the same form, for the truth ratio; empty where the table has none."""

    id: str
    group: str
    modality: Literal["text", "image"]
    task: Literal["generation", "choice", "cloze"]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    image: Any = None
    paraphrase: str = ""
    perturbed: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked: MLLMU-Bench's wording of a choice, and its blank."""
        if self.task == "choice":
            shown = "\n".join(f"{LETTERS[i]}: {option}" for i, option in enumerate(self.options))
            return f"{self.question}\n{shown}\nJust give ONE letter representing the answer directly."
        return self.question.replace("__", "[Blank]") if self.task == "cloze" else self.question

    @property
    def target(self) -> str:
        """What the model should write: the letter of a choice, else the answer."""
        return LETTERS[self.options.index(self.answer)] if self.task == "choice" else self.answer
