"""PASTA in a program that uses PEFT: two adapters on one model, mixed in a batch, saved and loaded.

    python examples/peft_sequence_classification.py

The model is a tiny random BERT, so that nothing is downloaded; take `from_pretrained` for a real one.
It learns two rules about token ids: whether 7 occurs, and whether 9 occurs.
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from pastina import PastaConfig
from pastina.methods import train_mode

CLS, SEP, VOCABULARY = 1, 2, 20


def tiny_bert() -> BertForSequenceClassification:
    """Always the same random BERT."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def texts(count: int, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random texts of six tokens, and 1 where `wanted` is among them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCABULARY, (count, 6), generator=generator)
    words[::2, 3] = wanted
    labels = (words == wanted).any(1).long()
    first, last = torch.full((count, 1), CLS), torch.full((count, 1), SEP)
    return torch.cat([first, words, last], 1), labels


def learn(model: PeftModel, adapter: str, wanted: int) -> None:
    """Train one adapter; the other one and the backbone stay as they are."""
    model.set_adapter(adapter)
    train_mode(model)
    input_ids, labels = texts(256, wanted, seed=1)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-2, weight_decay=0.0)
    for _ in range(100):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: PeftModel, wanted: int, **options: list[str]) -> float:
    """Of the active adapter, or of the one that `adapter_names` gives each row."""
    input_ids, labels = texts(200, wanted, seed=2)
    logits = model.eval()(input_ids=input_ids, **options).logits
    return (logits.argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train both, mix them, save and load."""
    config = PastaConfig(task_type="SEQ_CLS", special_token_ids=[CLS, SEP], num_slots=2)
    model = get_peft_model(tiny_bert(), config, adapter_name="seven")
    assert isinstance(model, PeftModel)
    model.add_adapter("nine", config)
    learn(model, "seven", wanted=7)
    model.print_trainable_parameters()
    learn(model, "nine", wanted=9)

    print(f"seven {accuracy(model, 7, adapter_names=['seven'] * 200):.2f}")
    print(f"nine  {accuracy(model, 9, adapter_names=['nine'] * 200):.2f}")

    # One batch, a rule of its own for each row; __base__ is the model without an adapter.
    row, _ = texts(1, 7, seed=3)
    with torch.no_grad():
        mixed = model(input_ids=row.expand(3, -1), adapter_names=["seven", "nine", "__base__"])
    print(f"one text, three answers: {mixed.logits.softmax(-1)[:, 1].tolist()}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny_bert(), f"{folder}/nine", adapter_name="nine")
        print(f"nine, loaded again {accuracy(again, 9):.2f}")


if __name__ == "__main__":
    main()
