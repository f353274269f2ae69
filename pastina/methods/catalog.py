"""The list of methods: what a user has to know about each."""

from dataclasses import dataclass

from pastina.method_options import METHOD_OPTIONS, Section


@dataclass(frozen=True, slots=True)
class Method:
    """What a user has to know about a way of tuning."""

    name: str
    title: str
    paper: str
    fits: str

    @property
    def options(self) -> type[Section]:
        """What a recipe can say of it."""
        return METHOD_OPTIONS[self.name]

    @property
    def defaults(self) -> dict[str, object]:
        """Its options where a recipe says nothing; an option that a recipe must name is left out."""
        fields = self.options.model_fields
        values = {n: f.get_default(call_default_factory=True) for n, f in fields.items()}
        return {n: v for n, v in values.items() if n != "name" and not fields[n].is_required()}


_EVERY = "every encoder and kind of task"
_KNOWN = (
    "BERT's and RoBERTa's family, DeBERTa-v2 and v3, DistilBERT, MPNet, ALBERT, ModernBERT, T5; every "
    "kind of task"
)
_METHODS = (
    Method(
        "pasta",
        "Special token adaptation",
        "https://arxiv.org/abs/2210.04382",
        "encoders that put special tokens around a text; class tokens of image and audio models by "
        "fixed positions; every kind of task",
    ),
    Method(
        "linear",
        "Linear probe",
        "https://arxiv.org/abs/1610.01644",
        "every model and kind of task; the floor to compare with",
    ),
    Method(
        "full",
        "Full fine-tuning",
        "https://arxiv.org/abs/1810.04805",
        "every model and kind of task; the adapter is as large as the model and serves one task",
    ),
    Method("lora", "Low-rank adaptation", "https://arxiv.org/abs/2106.09685", _KNOWN),
    Method(
        "ia3",
        "(IA)3: scales on keys, values and feed-forward nets",
        "https://arxiv.org/abs/2205.05638",
        "as lora, but not ModernBERT; every kind of task",
    ),
    Method("ln_tuning", "Norms", "https://arxiv.org/abs/2312.11420", _EVERY),
    Method(
        "bitfit",
        "Biases",
        "https://arxiv.org/abs/2106.10199",
        "encoders with biases; to others they can be added",
    ),
    Method(
        "bottleneck",
        "Bottleneck adapters: Houlsby, Pfeiffer, parallel",
        "https://arxiv.org/abs/1902.00751",
        _KNOWN,
    ),
    Method(
        "prefix_tuning",
        "Prefixes made by a net",
        "https://arxiv.org/abs/2101.00190",
        "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA",
    ),
    Method(
        "p_tuning_v2",
        "Prefixes as they are",
        "https://arxiv.org/abs/2110.07602",
        "BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA",
    ),
    Method(
        "prompt_tuning",
        "Learned tokens in front of the text",
        "https://arxiv.org/abs/2104.08691",
        "encoders that take embeddings in place of tokens; every kind of task",
    ),
    Method(
        "trainable_tokens",
        "Embeddings of the special tokens",
        "https://arxiv.org/abs/2210.04382",
        "encoders that put special tokens around a text; PASTA without its upper layers",
    ),
    Method(
        "peft",
        "Any other method of PEFT",
        "https://github.com/huggingface/peft",
        "what PEFT says",
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
