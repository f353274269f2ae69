"""interim"""
import torch


class Engine:
    name = "reference"

    def __init__(self, model):
        self.model = model

    @property
    def device(self):
        return next(self.model.parameters()).device

    def logits(self, batch):
        return batch.pick(self.model(**batch.inputs).logits)


def make_engine(model):
    return Engine(model)
