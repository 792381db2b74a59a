"""RMisU as a transformers Trainer: its TrainingArguments, callbacks, checkpoints, gradient accumulation and bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from mipfast.edit.config import RMisUConfig
from mipfast.edit.hidden import hidden_states
from mipfast.edit.misdirect import check_no_hook, neurons_below, rmisu_loss, steering_layer, trainable_parts, unedited
from mipfast.edit.prune import Neurons, check_neurons
from mipfast.edit.steering import STEPS, find_target
from mipfast.edit.train import Leaves, Losses, training
from mipfast.errors import DivergedError, InputError, configured
from mipfast.files import load_artefact, save_artefact
from mipfast.model.batch import Batch
from mipfast.model.patching import frozen_eval
from mipfast.model.sites import find_sites

ITEMS = "'forget' and 'retain' in every item, an example of each"


class RMisUTrainer(Trainer):
    """`misdirect` for those who have a Trainer.

    The optimiser sees the trained slices alone, in float32 at least, and weight decay acts on them; everything else
    stays bit for bit. The model runs in eval mode (no dropout, no gradient checkpointing), to the steering layer. The
    retain set is held at the hidden states of the model as train() found it, without prunes in force: one more forward
    pass per step, no second model. With unit "retain" a pass over the retain half measures the target's length first; a
    learned direction is learned from the dataset's first 40 forget batches, and train()'s metrics say what it is for,
    as misdirect's report does.

    Checkpoints hold the slices beside the model; resume with the model (and prune) that the run started from. Several
    processes average their gradients; no FSDP, no DeepSpeed.

    Args:
        model: a transformers model.
        args: TrainingArguments; learning rate, length, batch size and optimiser are theirs.
        path: as `misdirect` takes it.
        rmisu: layer, steering_coeff, unit, alpha, direction, positions, seed (of the direction) and trainable ("path"
            or "down") count.
        kwargs: Trainer's other arguments. An item of train_dataset is {"forget": example, "retain": example};
            data_collator makes a batch, with labels, of the examples of one side.

    Raises:
        InputError: for what it cannot train.
        ArtefactError: for another model's path.
        ModelError: for weights that training would not reach, as `misdirect`.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from mipfast import RMisUTrainer
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> forget, retain = ({"input_ids": t, "labels": t} for t in torch.arange(12).view(2, 6))
        >>> data = [{"forget": forget, "retain": retain}]
        >>> options = dict(max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True)
        >>> args = TrainingArguments(tempfile.mkdtemp(), **options)
        >>> trainer = RMisUTrainer(model, args, path={("model.layers", 0): torch.tensor([3])}, train_dataset=data)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...
        2
    """

    model: Any
    train_dataset: Any
    _signature_columns: Any
    _leaves: Leaves
    _before: list[torch.Tensor]
    _target: torch.Tensor
    _losses: Losses
    _moved: bool | None  # None before the first step
    _grad_norm: float

    def __init__(
        self, model: nn.Module, args: Any = None, *, path: Neurons, rmisu: RMisUConfig | None = None, **kwargs
    ):
        self.rmisu = configured(RMisUConfig, rmisu, {})
        sites, self.path = check_neurons(model, path, written=True)
        if self.rmisu.trainable not in ("path", "down"):
            raise InputError(
                f"trainable={self.rmisu.trainable!r}; RMisUTrainer takes path or down, misdirect the others"
            )
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise InputError("optimizers cannot be given: they would not hold the path's slices; use args.optim")
        self._layer = steering_layer(self.rmisu, sites)
        self._leaves = []
        super().__init__(model=model, args=args, **kwargs)
        self._examples_collator, self.data_collator = self.data_collator, self._collate
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its own: accumulation divides it
        self.add_callback(_AroundStep(self))
        # no parameter of the model itself trains: DistributedDataParallel would refuse it
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train. Raises InputError where nothing trained, DivergedError for a loss that is not finite. After
        any error or interruption the weights are those that train() found; a checkpoint keeps what was learned."""
        self._sites = find_sites(self.model)
        neurons, _ = neurons_below(self.path, self._sites, self._layer, self.rmisu.trainable)
        check_no_hook(self.model, neurons)
        self.optimizer = self.lr_scheduler = None
        with training(self.model, trainable_parts(neurons, self._sites, self.rmisu.trainable)) as self._leaves:
            self._before = [leaf.tensor.detach().clone() for leaf in self._leaves]
            self._moved = None
            self._target, likely = self._measure_target()
            result = super().train(*args, **kwargs)
            if self._moved is False:
                raise InputError(f"no gradient reached {', '.join(sorted({leaf.name for leaf in self._leaves}))}")
        result.metrics.update(likely)
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            slices = [leaf.tensor for leaf in self._leaves]
            self.optimizer = make([{"params": slices, "weight_decay": self.args.weight_decay}], **options)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self._as_before():
            kept = self._hidden(inputs["retain"])
        forget, retain = self._hidden(inputs["forget"]), self._hidden(inputs["retain"])
        self._losses = rmisu_loss(forget, retain, self._target, kept, self.rmisu.alpha)
        if not bool(self._losses.loss.isfinite()):
            raise DivergedError(
                f"the loss of step {self.state.global_step} is {self._losses.loss.item()}; lower learning_rate "
                f"({self.args.learning_rate}) or steering_coeff ({self.rmisu.steering_coeff})"
            )
        return (self._losses.loss, {}) if return_outputs else self._losses.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            names = ("forget_loss", "retain_loss")
            parts = {name: part.item() for name, part in zip(names, self._losses[1:], strict=True) if part is not None}
            logs |= {"grad_norm": self._grad_norm, **parts}
        super().log(logs, *args, **kwargs)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        with frozen_eval(self.model):
            return hidden_states(self.model, batch, self._layer, self.rmisu.positions, self._sites)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """The model as train() found it, without prunes in force."""
        now = [leaf.tensor.detach().clone() for leaf in self._leaves]
        self._write(self._before)
        try:
            with unedited(self.model):
                yield
        finally:
            self._write(now)

    def _write(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for leaf, value in zip(self._leaves, values, strict=True):
                leaf.tensor.copy_(value)
                leaf.write()

    def _measure_target(self) -> tuple[torch.Tensor, dict[str, float]]:
        """In the order of the dataset, so that no random state moves."""
        if self.train_dataset is None:
            raise InputError(f"there is no train_dataset; expected one with {ITEMS}")
        dataset, size = iter(self.train_dataset), self.args.per_device_train_batch_size
        few = STEPS if self.rmisu.direction == "learned" else 1
        forget: list[Batch] = []
        retain: list[torch.Tensor] = []
        with self._as_before():
            while (self.rmisu.unit == "retain" or len(forget) < few) and (items := list(islice(dataset, size))):
                batch = cast(dict[str, Any], self._prepare_inputs(self._collate(items)))
                retain.append(self._hidden(batch["retain"]))
                forget += [batch["forget"]] if len(forget) < few else []
            if not forget:
                raise InputError(f"train_dataset is empty; expected {ITEMS}")
            first, kept = self._hidden(forget[0]), torch.cat(retain)
            return find_target(self.model, self.rmisu, self._layer, forget, first, kept)

    def _collate(self, items: list[Any]) -> dict[str, Any]:
        for item in items:
            if not isinstance(item, Mapping):
                raise InputError(f"an item of train_dataset is a {type(item).__name__}; expected {ITEMS}")
            if not {"forget", "retain"} <= item.keys():
                raise InputError(f"an item of train_dataset has {', '.join(item) or 'nothing'}; expected {ITEMS}")
        return {side: self._examples_collator([item[side] for item in items]) for side in ("forget", "retain")}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["forget", "retain"]

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **kwargs)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            slices = {str(i): leaf.tensor for i, leaf in enumerate(self._leaves)}
            save_artefact(folder, "slices", slices | {"target": self._target}, {"layer": self._layer})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        names = [str(i) for i in range(len(self._leaves))]
        tensors, _ = load_artefact(resume_from_checkpoint, "slices", [*names, "target"], ["layer"])
        shapes = [tensors[name].shape for name in names]
        target, again = tensors["target"].to(self._target), self._target
        if self.rmisu.direction == "learned":
            # not reproducible to the bit: keep the checkpoint's target and compare only its length
            self._target, target, again = target, target.norm(), again.norm()
        if shapes != [leaf.tensor.shape for leaf in self._leaves] or not torch.allclose(target, again, rtol=1e-3):
            raise InputError(
                f"{resume_from_checkpoint} is of a run with another path, base model or RMisUConfig; resume with what "
                "it started from"
            )
        self._write([tensors[name].to(leaf.tensor) for name, leaf in zip(names, self._leaves, strict=True)])


class _AroundStep(TrainerCallback):
    """What Trainer does with the gradients of model.parameters(), for slices that are none of them."""

    def __init__(self, trainer: RMisUTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        slices = [leaf.tensor for leaf in trainer._leaves]
        for tensor in slices if args.world_size > 1 else []:
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.grad = trainer.accelerator.reduce(grad, reduction="mean")
        limit = args.max_grad_norm if args.max_grad_norm > 0 else float("inf")
        trainer._grad_norm = nn.utils.clip_grad_norm_(slices, limit).item()
        trainer._moved = bool(trainer._moved) or trainer._grad_norm > 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for leaf in self.trainer._leaves:
            leaf.write()
            leaf.tensor.grad = None
