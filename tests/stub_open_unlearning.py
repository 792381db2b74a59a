"""The smallest thing with open-unlearning's interface, as a folder: its registry and load_trainer, the trainer classes'
signatures, the forget-retain dataset, the nested collator, the config that others begin with, and a train.py."""

import sys

FILES = {
    "configs/trainer/finetune.yaml": """
handler: FinetuneTrainer
args: {learning_rate: 1.0e-5, optim: paged_adamw_32bit, eval_strategy: epoch, eval_on_start: true, seed: 0}
""",
    "src/trainer/__init__.py": """
from trainer.base import FinetuneTrainer

TRAINER_REGISTRY = {"FinetuneTrainer": FinetuneTrainer}


def load_trainer(cfg, model, args, train_dataset, tokenizer, data_collator, evaluators=None, template_args=None):
    return TRAINER_REGISTRY[cfg["handler"]](
        model=model,
        train_dataset=train_dataset,
        eval_dataset=None,
        tokenizer=tokenizer,
        data_collator=data_collator,
        args=args,
        evaluators=evaluators,
        template_args=template_args,
        **cfg.get("method_args", {}),
    )
""",
    "src/trainer/base.py": """
from transformers import Trainer


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if self.evaluators:
            found = {}
            for evaluator in self.evaluators.values():
                found.update(evaluator(model=self.model, tokenizer=self.tokenizer, template_args=self.template_args))
            self.log(found)
            return found
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
""",
    "src/trainer/unlearn/base.py": """
import torch
from trainer.base import FinetuneTrainer


class UnlearnTrainer(FinetuneTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, outputs = super().compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["logits"], inputs["labels"]
""",
    "src/data/unlearn.py": """
import torch


class ForgetRetainDataset(torch.utils.data.Dataset):
    def __init__(self, forget, retain, anchor="forget"):
        self.forget, self.retain, self.anchor = forget, retain, anchor

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        if not self.retain:
            return {"forget": self.forget[i]}
        return {"forget": self.forget[i], "retain": self.retain[torch.randint(0, len(self.retain), (1,)).item()]}
""",
    "src/data/collators.py": """
from torch.nn.utils.rnn import pad_sequence


class DataCollatorForSupervisedDataset:
    def __init__(self, tokenizer, padding_side="right", index=None):
        self.tokenizer = tokenizer

    def __call__(self, instances):
        if "input_ids" not in instances[0]:
            return {key: self([one[key] for one in instances]) for key in instances[0]}
        pad = self.tokenizer.pad_token_id
        ids = pad_sequence([one["input_ids"] for one in instances], batch_first=True, padding_value=pad)
        labels = pad_sequence([one["labels"] for one in instances], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": ids.ne(pad), "labels": labels}
""",
    "src/train.py": """
import pathlib
import sys

import yaml
from trainer import TRAINER_REGISTRY

config = yaml.safe_load(pathlib.Path("configs/trainer/MIPEditor.yaml").read_text())
if __name__ == "__main__":
    pathlib.Path("ran.txt").write_text(f"{TRAINER_REGISTRY[config['handler']].__name__} {sys.argv[1:]}")
""",
}


def write(root):
    """root/src and root/configs; returns root."""
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.lstrip())
    return root


def forget_imports():
    """Its packages have names that anybody's might have."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("trainer", "data")]:
        del sys.modules[name]
