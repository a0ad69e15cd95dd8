"""Trainings that a Hugging Face user may have, tiny: each says how the model, the rows and the trainer are made."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.modeling_outputs import SequenceClassifierOutput
transformers.utils.logging.set_verbosity_error()

ROWS, LENGTH, WORDS, CLASSES, BATCH = 40, 6, 24, 3, 4
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


@dataclass
class Case:
    """One training.

    Attributes:
        model: Makes the model, always the same.
        rows: Makes the data set.
        trainer: Returns the host's class.
        args: Returns the class of the arguments.
        options: Further training arguments.
        extra: Makes further arguments of the trainer.
        per_sample: Whether one loss per sample can be found.
    """

    model: Callable[[], Any]
    rows: Callable[[], Any]
    trainer: Callable[[], type] = lambda: transformers.Trainer
    args: Callable[[], type] = lambda: transformers.TrainingArguments
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[], dict[str, Any]] = dict
    per_sample: bool = True


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def ids_rows(label: Callable[[np.random.Generator, torch.Tensor], Any], key: str = "labels") -> Callable[[], Rows]:
    def make() -> Rows:
        rng = _rng()
        rows = []
        for _ in range(ROWS):
            ids = torch.from_numpy(rng.integers(1, WORDS, LENGTH))
            rows.append({"input_ids": ids, key: label(rng, ids)})
        return Rows(rows)

    return make


def _masked(rng: np.random.Generator, ids: torch.Tensor) -> torch.Tensor:
    labels = ids.clone()
    labels[: int(rng.integers(0, LENGTH - 2))] = -100
    return labels


def _tags(rng: np.random.Generator, _ids: torch.Tensor) -> torch.Tensor:
    tags = torch.from_numpy(rng.integers(0, CLASSES, LENGTH))
    tags[: int(rng.integers(0, LENGTH))] = -100
    return tags


classes = ids_rows(lambda rng, _: torch.tensor(int(rng.integers(CLASSES))))
several = ids_rows(lambda rng, _: torch.from_numpy(rng.integers(0, 2, CLASSES)).float())
numbers = ids_rows(lambda rng, _: torch.tensor(float(rng.normal())))
tags = ids_rows(_tags)
text = ids_rows(_masked)


def spans() -> Rows:
    rng, rows = _rng(), []
    for row in text().rows:
        start = int(rng.integers(LENGTH))
        ends = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(int(rng.integers(start, LENGTH)))}
        rows.append({"input_ids": row["input_ids"], **ends})
    return Rows(rows)


def choices() -> Rows:
    rng = _rng()
    made = [torch.from_numpy(rng.integers(1, WORDS, (CLASSES, LENGTH))) for _ in range(ROWS)]
    return Rows([{"input_ids": ids, "labels": torch.tensor(int(rng.integers(CLASSES)))} for ids in made])


def pictures() -> Rows:
    rng = _rng()
    made = [torch.from_numpy(rng.normal(size=(3, 8, 8)).astype(np.float32)) for _ in range(ROWS)]
    return Rows([{"pixel_values": one, "labels": torch.tensor(int(rng.integers(CLASSES)))} for one in made])


def captions() -> Rows:
    rows = [{"pixel_values": p["pixel_values"], "labels": t["labels"]} for p, t in zip(pictures(), text(), strict=True)]
    return Rows(rows)


def build(name: str, config: Any, seed: int = 0, **changes: Any) -> Callable[[], Any]:
    """Return a maker of a model of transformers by its class's name."""

    def make() -> Any:
        torch.manual_seed(seed)
        made = config() if callable(config) else config
        for key, value in changes.items():
            setattr(made, key, value)
        return getattr(transformers, name)(made)

    return make


def bert(name: str, **changes: Any) -> Callable[[], Any]:
    return build(
        name, lambda: transformers.BertConfig(**SMALL, num_labels=CLASSES, max_position_embeddings=16), **changes
    )


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )


def llama(words: int = WORDS) -> Any:
    size = SMALL | {"vocab_size": words}
    return transformers.LlamaConfig(
        **size, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )


def t5() -> Any:
    size = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5Config(**size, decoder_start_token_id=0)


def bart(name: str = "BartConfig") -> Callable[[], Any]:
    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return lambda: getattr(transformers, name)(
        vocab_size=WORDS, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32, **size, **tokens
    )


def xlnet() -> Any:
    return transformers.XLNetConfig(vocab_size=WORDS, d_model=8, n_layer=1, n_head=2, d_inner=8)


def xlm() -> Any:
    return transformers.XLMConfig(vocab_size=WORDS, emb_dim=8, n_layers=1, n_heads=2, max_position_embeddings=32)


def mixtral() -> Any:
    return transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64, output_router_logits=True
    )


def trocr() -> Any:
    torch.manual_seed(0)
    size = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    encoder = transformers.ViTConfig(image_size=8, patch_size=4, **size)
    decoder = transformers.TrOCRConfig(
        vocab_size=WORDS, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, is_decoder=True,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        add_cross_attention=True, cross_attention_hidden_size=8,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    return transformers.VisionEncoderDecoderModel(config=config)


class WeightedBertForSequenceClassification(transformers.BertForSequenceClassification):
    """Class weights in a model's own forward, and a factor that nobody can miss."""

    def forward(self, input_ids=None, labels=None, **options):  # type: ignore[no-untyped-def]
        logits = super().forward(input_ids=input_ids).logits
        weight = torch.tensor([1.0, 2.0, 5.0])
        loss = None if labels is None else 100 * functional.cross_entropy(logits, labels, weight=weight)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def weighted_bert() -> Any:
    torch.manual_seed(0)
    return WeightedBertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=CLASSES))


def own_loss_function() -> Any:
    model = build("LlamaForSequenceClassification", llama, num_labels=CLASSES)()
    model.loss_function = lambda labels, pooled_logits=None, logits=None, config=None, **_: functional.cross_entropy(
        logits if pooled_logits is None else pooled_logits, labels, label_smoothing=0.3
    )
    return model


def own_llama_loss() -> Any:
    """Every second token counts, and the count of items is the host's."""
    model = build("LlamaForCausalLM", llama)()

    def loss(logits, labels, vocab_size, num_items_in_batch=None, **_):  # type: ignore[no-untyped-def]
        found = functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), reduction="none"
        )
        found = found[::2].sum()
        return found / (labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    model.loss_function = loss
    return model


class ClassWeights(transformers.Trainer):
    """The recipe of the documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([0.2, 1.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


class RDrop(transformers.Trainer):
    """Two passes, pulled together."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        first, one = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        second, two = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        apart = functional.kl_div(one.logits.log_softmax(-1), two.logits.softmax(-1), reduction="batchmean")
        loss = (first + second) / 2 + apart
        return (loss, one) if return_outputs else loss


def focal(outputs, labels, num_items_in_batch=None):  # type: ignore[no-untyped-def]
    losses = functional.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / (num_items_in_batch or len(losses))


def flattening() -> dict[str, Any]:
    return {"data_collator": transformers.DataCollatorWithFlattening()}


def plain_text() -> Any:
    from datasets import Dataset

    rows = ids_rows(lambda _, ids: ids)().rows
    return Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows])


def adapted(base: Callable[[], Any], kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        model = base()
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for a name of yesterday
            return peft.get_peft_model(model, getattr(peft, kind)(**options))

    return make


LLAMA = build("LlamaForCausalLM", llama)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}

VOCABULARY = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(30))]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(f"w{int(i)}" for i in rng.integers(0, 30, int(rng.integers(low, high))))


def texts(**columns: tuple[int, int]) -> Callable[[], Any]:
    def make() -> Any:
        from datasets import Dataset

        rng = _rng()
        rows = [{name: " " + _words(rng, *size) for name, size in columns.items()} for _ in range(ROWS)]
        return Dataset.from_list(rows)

    return make


def judged() -> Any:
    data = texts(prompt=(2, 5), completion=(2, 6))()
    return data.add_column("label", [i % 2 == 0 for i in range(len(data))])


def trl_case(name: str, rows: Callable[[], Any], *, model: Any = None, package: str = "trl", **options: Any) -> Case:
    per_sample = options.pop("per_sample", True)
    extra = options.pop("extra", dict)

    def part(suffix: str) -> Callable[[], type]:
        def load() -> type:
            import importlib

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found: type = getattr(importlib.import_module(package), name + suffix)
            return found

        return load

    quiet = {"gradient_checkpointing": False, "bf16": False}
    return Case(
        model or build("LlamaForCausalLM", lambda: llama(len(VOCABULARY))),
        rows,
        part("Trainer"),
        part("Config"),
        quiet | options,
        lambda: {"processing_class": tokenizer(), **extra()},
        per_sample=per_sample,
    )


def reference() -> dict[str, Any]:
    return {"ref_model": build("LlamaForCausalLM", lambda: llama(len(VOCABULARY)), seed=5)()}


PAIRS = texts(prompt=(2, 5), chosen=(2, 6), rejected=(2, 6))
TRL_LLAMA = build("LlamaForCausalLM", lambda: llama(len(VOCABULARY)))
REWARD = build("LlamaForSequenceClassification", lambda: llama(len(VOCABULARY)), num_labels=1)

CASES: dict[str, Case] = {
    "classes": Case(bert("BertForSequenceClassification"), classes),
    "several labels": Case(bert("BertForSequenceClassification", problem_type="multi_label_classification"), several),
    "regression": Case(bert("BertForSequenceClassification", num_labels=1), numbers),
    "tags": Case(bert("BertForTokenClassification"), tags),
    "masked tokens": Case(bert("BertForMaskedLM"), text),
    "spans": Case(bert("BertForQuestionAnswering", num_labels=2), spans),
    "choices": Case(bert("BertForMultipleChoice"), choices),
    "gpt2": Case(build("GPT2LMHeadModel", gpt2), text),
    "gpt2 classes": Case(build("GPT2ForSequenceClassification", gpt2, num_labels=CLASSES), classes),
    "llama": Case(LLAMA, text),
    "experts": Case(build("MixtralForCausalLM", mixtral), text),
    "t5": Case(build("T5ForConditionalGeneration", t5), text),
    "t5 seq2seq": Case(
        build("T5ForConditionalGeneration", t5),
        text,
        lambda: transformers.Seq2SeqTrainer,
        lambda: transformers.Seq2SeqTrainingArguments,
    ),
    "bart": Case(build("BartForConditionalGeneration", bart()), text),
    "bart decoder": Case(build("BartForCausalLM", bart()), text),
    "marian": Case(build("MarianMTModel", bart("MarianConfig")), text),
    "xlnet": Case(build("XLNetLMHeadModel", xlnet), text),
    "xlm": Case(build("XLMWithLMHeadModel", xlm), text),
    "trocr": Case(trocr, captions),
    "vit": Case(build("ViTForImageClassification", lambda: transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=CLASSES, **{k: v for k, v in SMALL.items() if k != "vocab_size"}
    )), pictures),
    "smoothed classes": Case(bert("BertForSequenceClassification"), classes, options={"label_smoothing_factor": 0.2}),
    "smoothed llama": Case(LLAMA, text, options={"label_smoothing_factor": 0.2}),
    "weights in forward": Case(weighted_bert, classes, per_sample=False),
    "own loss_function": Case(own_loss_function, classes, per_sample=False),
    "own loss_function of tokens": Case(own_llama_loss, text, per_sample=False),
    "own compute_loss": Case(bert("BertForSequenceClassification"), classes, lambda: ClassWeights, per_sample=False),
    "R-Drop": Case(bert("BertForSequenceClassification"), classes, lambda: RDrop, per_sample=False),
    "compute_loss_func": Case(
        bert("BertForSequenceClassification"), classes, extra=lambda: {"compute_loss_func": focal}, per_sample=False
    ),
    "flattened": Case(LLAMA, plain_text, extra=flattening, per_sample=False),
    "checkpointed": Case(LLAMA, text, options={"gradient_checkpointing": True}),
    "bf16": Case(LLAMA, text, options={"bf16": True}),
    "lora": Case(adapted(LLAMA, "LoraConfig", task_type="CAUSAL_LM", **LORA), text),
    "lora classes": Case(
        adapted(bert("BertForSequenceClassification"), "LoraConfig", task_type="SEQ_CLS", r=2,
                target_modules=["query"]), classes),
    "ia3": Case(
        adapted(LLAMA, "IA3Config", task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                feedforward_modules=["down_proj"]), text),
    "prompt tuning": Case(adapted(LLAMA, "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=2), text),
    "prefix tuning": Case(adapted(LLAMA, "PrefixTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=2), text),
    "sft": trl_case("SFT", texts(text=(2, 9)), max_length=16),
    "sft packed": trl_case("SFT", texts(text=(2, 9)), max_length=16, packing=True, per_sample=False),
    "sft packed, wrapped": trl_case("SFT", texts(text=(2, 9)), max_length=16, packing=True, packing_strategy="wrapped"),
    "sft dft": trl_case("SFT", texts(text=(2, 9)), max_length=16, loss_type="dft", per_sample=False),
    "sft completions": trl_case("SFT", texts(prompt=(2, 5), completion=(2, 6)), max_length=16),
    "sft lora": trl_case("SFT", texts(text=(2, 9)), max_length=16,
                         model=adapted(TRL_LLAMA, "LoraConfig", task_type="CAUSAL_LM", **LORA)),
    "dpo": trl_case("DPO", PAIRS, extra=reference),
    "dpo lora": trl_case("DPO", PAIRS, model=adapted(TRL_LLAMA, "LoraConfig", task_type="CAUSAL_LM", **LORA)),
    "dpo hinge": trl_case("DPO", PAIRS, extra=reference, loss_type=["hinge"], per_sample=False),
    "kto": trl_case("KTO", judged, extra=reference, loss_type="apo_zero_unpaired", per_sample=False),
    "orpo": trl_case("ORPO", PAIRS, package="trl.experimental.orpo", per_sample=False),
    "reward": trl_case("Reward", texts(chosen=(2, 6), rejected=(2, 6)), model=REWARD),
}  # fmt: skip

QUICK = (
    "classes", "several labels", "tags", "spans", "llama", "experts", "t5", "xlnet", "smoothed llama", "lora", "dpo",
    "weights in forward", "own loss_function of tokens", "own compute_loss", "R-Drop", "compute_loss_func",
    "prompt tuning", "sft",
)  # fmt: skip
"""Cases of every kind, for each run of the tests; the others run with the slow ones."""
