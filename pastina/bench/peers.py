"""What others do with the same rows on the same backbone: transformers' Trainer with PEFT's LoRA, and
transformers' pipeline.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pastina.backbones import silence
from pastina.bench.timing import now
from pastina.data.encode import Example


class LoraTrainer:
    """transformers.Trainer with LoRA of rank 8 on a classifier: both as they are without settings.

    folder: of the backbone. is_bf16: mixed precision; else fp32.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        num_labels: int,
        *,
        batch: int,
        scratch: Path,
        is_bf16: bool = False,
    ) -> None:
        config = LoraConfig(task_type="SEQ_CLS", r=8)
        with _silence():
            self.model: Any = get_peft_model(classifier(folder, num_labels), config)
        self.collate = DataCollatorWithPadding(tokenizer)
        has_gpu = torch.cuda.is_available()
        self.settings = {
            "output_dir": str(scratch),
            "per_device_train_batch_size": batch,
            "bf16": is_bf16,
            "use_cpu": not has_gpu,
            "dataloader_pin_memory": has_gpu,
            "train_sampling_strategy": "sequential",  # the rows come shuffled
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }

    def train(self, examples: Sequence[Example], batch: int, warm_steps: int) -> float:
        """Seconds for one pass over the examples in this order; the first steps do not count."""
        rows: Any = [_features(example) for example in examples]
        steps = len(rows) // batch
        clock = _Clock()
        with _silence():
            trainer = Trainer(
                model=self.model,
                args=TrainingArguments(max_steps=steps, **self.settings),
                data_collator=self.collate,
                train_dataset=rows,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return clock.ends[-1] - clock.ends[warm_steps - 1]


class _Clock(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def classifier(folder: Path, num_labels: int) -> Any:
    """transformers' own classifier on this backbone, in fp32, with an untrained head."""
    with _silence():
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=num_labels, local_files_only=True, dtype=torch.float32
        )


def classify_with_pipeline(folder: Path, tokenizer: Any, num_labels: int) -> Any:
    """transformers' pipeline for text classification, in batches of 32."""
    with _silence():
        return transformers.pipeline(
            "text-classification",
            model=classifier(folder, num_labels),
            tokenizer=tokenizer,
            batch_size=32,
            device=0 if torch.cuda.is_available() else -1,
        )


def _features(example: Example) -> Mapping[str, Any]:
    features: dict[str, Any] = {
        "input_ids": example.input_ids,
        "attention_mask": [1] * len(example.input_ids),
        "labels": example.target,
    }
    if example.token_type_ids is not None:
        features["token_type_ids"] = example.token_type_ids
    return features


@contextmanager
def _silence() -> Iterator[None]:
    """What transformers says of new heads and of settings is known."""
    with silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
