"""The method as a trainer of open-unlearning (github.com/locuslab/open-unlearning): docs/open_unlearning.md has the
command."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import Trainer

from mipfast.edit.config import MIPConfig, RMisUConfig
from mipfast.edit.prune import prune
from mipfast.edit.unlearn import locate_path
from mipfast.errors import InputError, check_counts
from mipfast.experiment.config import overlaid, settings_of, without
from mipfast.files import write_atomic
from mipfast.integrations.trainer import RMisUTrainer
from mipfast.model.batch import Batch, find_labels

NAME = "MIPEditor"
# fields of RMisUConfig that a Trainer's arguments stand for
ARGUMENTS = {"lr": "learning_rate", "steps": "max_steps", "epochs": "num_train_epochs"}
LORA = ("lora_rank", "lora_alpha")


def register(config_dir: str | Path | None = None) -> type:
    """Add the trainer MIPEditor to open-unlearning's registry, and write its config to
    config_dir/trainer/MIPEditor.yaml.

    Call it before src/train.py runs, with src on sys.path. A config that is there stays as it is: it may have been
    edited.

    Args:
        config_dir: open-unlearning's configs; None finds them beside src.

    Returns:
        The trainer's class, see `Editor`.

    Raises:
        InputError: where open-unlearning cannot be imported, for a folder that is not its configs, and where the name
            or the file is somebody else's.
    """
    try:
        import trainer
        from trainer.unlearn.base import UnlearnTrainer

        registry = trainer.TRAINER_REGISTRY
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"open-unlearning's trainers cannot be imported ({error}); expected its src folder on sys.path and its "
            "requirements installed: clone locuslab/open-unlearning and start examples/open_unlearning.py there"
        ) from error
    made = _made(UnlearnTrainer)
    if registry.get(NAME, made) is not made:
        raise InputError(f"open-unlearning has another trainer {NAME}, {registry[NAME]}; expected the name to be free")
    _write_config(Path(config_dir) if config_dir else Path(str(trainer.__file__)).resolve().parents[2] / "configs")
    registry[NAME] = made
    return made


@cache
def _made(base: type) -> type:
    return type(NAME, (Editor, base), {"__doc__": Editor.__doc__, "__module__": __name__})


def _write_config(folder: Path) -> None:
    import yaml

    if not (folder / "trainer" / "finetune.yaml").is_file():
        raise InputError(
            f"{folder} has no trainer/finetune.yaml, which {NAME}.yaml begins with; expected open-unlearning's configs "
            "folder: give its path to register()"
        )
    config = {
        "defaults": ["finetune"],
        "handler": NAME,
        "method_args": without(settings_of(EditorConfig()), *ARGUMENTS, *LORA),
        # transformers >= 4.57 wants an eval_dataset for eval_strategy; a first evaluation would see the pruned model
        "args": {
            "learning_rate": RMisUConfig().lr,
            "optim": "adamw_torch",
            "eval_strategy": "no",
            "eval_on_start": False,
        },
    }
    path = folder / "trainer" / f"{NAME}.yaml"
    if not path.exists():
        write_atomic(path, lambda p: p.write_text(yaml.safe_dump(config, sort_keys=False)))
        return
    try:
        written = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it, and register() writes it again") from error
    if not isinstance(written, dict) or written.get("handler") != NAME:
        raise InputError(f"{path} is not a config of the trainer {NAME}; rename it, and register() writes one")


@dataclass(frozen=True)
class EditorConfig(MIPConfig):
    """MIPConfig's fields, as method_args has them. Of rmisu, trainable is path or down; lr, steps and epochs are
    trainer.args' learning_rate, max_steps and num_train_epochs."""

    samples: int = 64
    """Items of the train dataset, at most, on which neurons are located."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "samples")

    @classmethod
    def from_yaml(cls, method_args: Mapping[str, Any]) -> EditorConfig:
        """Raises InputError for a key or value that cannot be used, naming it."""
        given = _plain(method_args)
        rmisu = given.get("rmisu")
        for name, argument in ARGUMENTS.items():
            if isinstance(rmisu, dict) and name in rmisu:
                raise InputError(f"method_args.rmisu.{name}: the Trainer trains; give trainer.args.{argument} instead")
        return overlaid(cls(), given, "method_args")


class Editor(RMisUTrainer):
    """open-unlearning's trainer MIPEditor, which is this class before its UnlearnTrainer: locate, prune, RMisU.

    train() locates the path on some items of the train dataset, prunes it, trains it as RMisUTrainer does and leaves a
    plain model; what fails leaves the model as it was. path.safetensors and path.json are written to args.output_dir.
    Evaluations during training see the pruned model. There is no second model, and no gradient beyond the path.

    The constructor takes what open-unlearning's load_trainer gives: Trainer's arguments (tokenizer may be
    processing_class), evaluators, template_args, and the YAML's method_args, which are EditorConfig's fields. An item
    is {"forget": example, "retain": example}, and so is a batch: whatever the collator gives (pixel_values,
    image_grid_thw, mm_token_type_ids) reaches the model. Examples with pixel_values feed the vision path.

    One process: no DeepSpeed, no FSDP. Raises InputError for what it cannot use."""

    def __init__(self, model: Any = None, args: Any = None, *, tokenizer: Any = None, **kwargs: Any):
        known = {*inspect.signature(Trainer.__init__).parameters, "evaluators", "template_args"}
        self.config = EditorConfig.from_yaml({name: kwargs.pop(name) for name in set(kwargs) - known})
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(model, args, path={}, rmisu=self.config.rmisu, **kwargs)

    @property
    def tokenizer(self) -> Any:
        """What open-unlearning's evaluate() asks for; transformers 5 has no such attribute."""
        return self.processing_class

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Raises what locate_path and RMisUTrainer.train raise."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise InputError(
                f"{NAME} was started under {'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'}, whose sharded "
                "weights it cannot edit; start it with python, without open-unlearning's accelerate config"
            )
        if resume_from_checkpoint:
            raise InputError(f"{NAME} locates its path anew and cannot resume; start again, or use RMisUTrainer")
        config = replace(self.config, progress=not self.args.disable_tqdm)
        path, self.located = locate_path(self.model, *self._samples(), config)
        self.path, handle = path, prune(self.model, path)
        try:
            result = super().train(None, *args, **kwargs)
        except BaseException:
            handle.undo()
            raise
        handle.commit()
        if self.args.should_save:
            path.save_pretrained(str(self.args.output_dir))
        return result

    def _samples(self) -> tuple[list[Batch], list[Batch]]:
        """Forget batches and as many retain batches; forget examples with pictures are in batches of their own."""
        dataset: Any = self.train_dataset
        chosen = random.Random(self.rmisu.seed).sample(range(len(dataset)), min(self.config.samples, len(dataset)))
        items = [dataset[i] for i in chosen]
        for item in items:
            if not {"forget", "retain"} <= set(item):
                raise InputError(
                    f"an item of the train dataset has {', '.join(map(str, item))}; expected forget and retain: use "
                    "mode=unlearn with a forget and a retain set"
                )
        batches: list[Any] = []
        size = self.args.per_device_train_batch_size
        for pictures in (False, True):
            alike = [item for item in items if ("pixel_values" in item["forget"]) == pictures]
            batches += [self._collate(alike[start : start + size]) for start in range(0, len(alike), size)]
        batches = [self._prepare_inputs(batch) for batch in batches]
        for batch in batches if self.rmisu.positions == "last_prompt" else []:
            if bool((find_labels(batch["forget"]).index[:, 0] == 0).any()):
                raise InputError(
                    "a forget example has no prompt: its labels begin at its second token, and the first token's "
                    "hidden state is the same for every text. For a corpus without questions set "
                    "method_args.rmisu.positions and method_args.text.positions to all"
                )
        return [batch["forget"] for batch in batches], [batch["retain"] for batch in batches]

    def _collate(self, items: list[Any]) -> dict[str, Any]:
        """open-unlearning's collators know both sides, and the plain examples of an evaluation."""
        return self._examples_collator(items)


def _plain(value: Any) -> Any:
    """Hydra's containers as dict and list."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
