"""Vanilla fine-tuning: the model that knows what is to be forgotten. transformers' Trainer, with LoRA by peft."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mipfast.data.checkpoint import load_model, save_model
from mipfast.data.encoder import Encoder
from mipfast.data.records import Record, digest
from mipfast.errors import DivergedError, InputError, check_counts, check_fields, check_installed, configured
from mipfast.files import claim, versions, write_atomic, write_json, writing
from mipfast.model.sites import find_decoder, find_sites

log = logging.getLogger("mipfast")


@dataclass(frozen=True)
class FinetuneConfig:
    """How `finetune` trains. The defaults are those of MLLMU-Bench's fine-tuning.

    Raises:
        InputError: for a value that no run could use; the text names the field, what was found and what is expected.
    """

    full: bool = False
    """Train every weight, instead of LoRA on every linear layer of the language model.
    LoRA leaves the vision tower, the projector and the head alone."""
    rank: int = 16
    """Of LoRA."""
    alpha: int = 16
    """Of LoRA: its scale is alpha / rank."""
    dropout: float = 0.05
    """Of LoRA."""
    lr: float = 2e-5
    """Learning rate of AdamW without weight decay, falling linearly to 0."""
    epochs: int = 5
    """Passes over the records."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 4
    """Records per step."""
    bf16: bool = False
    """Compute in bfloat16, with the weights as they are."""
    gradient_checkpointing: bool = False
    """Less memory, one more forward pass."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Of adapters, dropout and order."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_counts(self, "rank", "alpha", "epochs", "steps", "batch_size", "save_steps")
        if not self.lr > 0:
            raise InputError(f"lr={self.lr}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}; expected a number in [0, 1)")


def finetune(
    source: str | Path,
    records: Sequence[Record],
    out: str | Path,
    config: FinetuneConfig | None = None,
    device: str | None = None,
    dtype: str = "auto",
    progress: bool = False,
) -> Path:
    """Teach a model the records' answers, so that there is something to forget: the vanilla model.

    Labelled are the answers and an end token. Killed at any moment, the same call goes on to the same weights:
    checkpoints are in out/checkpoints until the model is written.

    Args:
        source: a model's folder or Hub id.
        records: such as `mipfast.data.load_groups` returns.
        out: folder for model and report.json (config, seed, what trained, losses, versions, seconds).
        config: the settings; None is FinetuneConfig().
        device: cpu or cuda; None is a GPU where there is one.
        dtype: of the weights, and of those written; "auto" is the source's. config.full trains them in float32.
        progress: show a bar.

    Returns:
        out/model: a plain transformers folder, adapters merged.

    Raises:
        MipfastError: without peft or accelerate.
        InputError: for records or settings that cannot be used.
        ArtefactError: where out is another run's.
        DivergedError: for a loss that is not finite.
    """
    from transformers import PrinterCallback, Trainer

    config, out = configured(FinetuneConfig, config, {}), Path(out)
    check_machine(config, device)
    if not records:
        raise InputError("there are no records to learn; expected at least one")
    encoder = Encoder.from_pretrained(source)
    rows = encoder.encoded(records)
    model: Any = load_model(source, "cpu", dtype)
    identity = {
        "config": asdict(config),
        "dtype": str(model.dtype),
        "model": find_sites(model).fingerprint(),
        "encoder": encoder.fingerprint(),
        "data": digest(records),
    }
    claim(out, identity, {"source": str(source), "records": len(records), "versions": versions()})
    written = out / "model"
    if written.exists():
        log.info("%s is finished: nothing left to do", out)
        return written
    started, own = time.monotonic(), model.dtype
    model = model.float() if config.full else _with_adapters(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # transformers 4 else gives adapters behind frozen embeddings no gradient
    trained = {re.sub(r"\.\d+\.", ".*.", name) for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model=model,
        args=_arguments(config, len(rows), out / "checkpoints", device, progress),
        train_dataset=rows,  # type: ignore[arg-type]  # whatever has a length and items
        data_collator=lambda some: encoder.batch(some, end=True),
        callbacks=[_watch(model, config.lr)],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = _last_checkpoint(out / "checkpoints")
    if resumed:
        log.info("going on from %s", resumed)
    try:
        with writing(out / "checkpoints"):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        _last_checkpoint(out / "checkpoints")  # what is not whole goes
    report = {
        "config": asdict(config),
        "seed": config.seed,
        "source": str(source),
        "records": len(records),
        "steps": trainer.state.global_step,
        "trained": sorted(trained),
        "weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "versions": versions(),
        "resumed": resumed is not None,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "report.json", report)
    plain = model if config.full else model.merge_and_unload()
    write_atomic(written, lambda folder: save_model(plain.to(own), source, folder))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return written


def check_machine(config: FinetuneConfig, device: str | None = None) -> None:
    """Raises InputError for a device that fine-tuning cannot use here, MipfastError without peft or accelerate."""
    check_installed("fine-tuning", "train", "accelerate", *([] if config.full else ["peft"]))
    if device not in (None, "cpu", "cuda"):
        raise InputError(
            f"device={device!r}; the Trainer chooses the GPU: expected cpu or cuda, CUDA_VISIBLE_DEVICES set"
        )
    if device != "cpu" and torch.cuda.device_count() > 1:
        raise InputError(f"found {torch.cuda.device_count()} GPUs; fine-tuning takes one: set CUDA_VISIBLE_DEVICES=0")


def _with_adapters(model: Any, config: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    decoder = {id(module) for module in find_decoder(model).modules()}
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in decoder]
    if not linear:
        raise InputError(f"{type(model).__name__}'s language model has no torch.nn.Linear for LoRA; train it with full")
    torch.manual_seed(config.seed)
    adapters = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=linear,
        init_lora_weights="gaussian",
    )
    return get_peft_model(model, adapters)


def _watch(model: Any, lr: float) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Stops what trains nothing or diverges: the Trainer lets both run on."""

        idle = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        first = True

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            before = len(self.idle)
            self.idle = {name: p for name, p in self.idle.items() if p.grad is None or not bool(p.grad.any())}
            if self.first and len(self.idle) == before:
                raise InputError(
                    f"no gradient reaches any of {before} trainable tensors, such as {next(iter(self.idle))}"
                )
            self.first = False

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if (loss := kwargs["logs"].get("loss")) is None:
                return
            log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, loss)
            if not torch.tensor(loss).isfinite():
                raise DivergedError(f"the loss of step {state.global_step} is {loss}; lower lr ({lr})")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if self.idle and not self.first:
                log.warning("no gradient reached %d trainable tensors: %s", len(self.idle), ", ".join(self.idle))

    return Watch()


def _arguments(config: FinetuneConfig, records: int, checkpoints: Path, device: str | None, progress: bool) -> Any:
    from transformers import TrainingArguments

    steps = config.steps or config.epochs * -(-records // config.batch_size)
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        bf16=config.bf16,
        save_steps=config.save_steps,
        save_total_limit=1,
        logging_steps=max(1, steps // 20),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=config.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu" and torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=not progress,
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest one that is whole: trainer_state.json is what the Trainer writes last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)  # a killed process was writing it
        else:
            return checkpoint
    return None
