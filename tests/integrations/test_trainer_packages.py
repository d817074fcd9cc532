"""Trainers of other packages that are transformers' Trainer underneath: TRL, sentence-transformers."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from lazy import Lazy, integration, transformers
from toy import bits
from trainer_runs import optimizer_in, recorded

from graddrop_kernels import FusedGradDropAdamW, GradDropEpoch, LayerGradDrop, LinearAnneal, param_groups
from graddrop_kernels.demo import sib200

datasets = Lazy("datasets")
POLICIES = [LayerGradDrop(LinearAnneal(2, start=0.7)), GradDropEpoch(2)]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VALUES = {
    "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "weight_decay": 0.1, "seed": 7,
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "bf16": False, "logging_steps": 1, "report_to": [],
    "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 8, "dataloader_pin_memory": False,
}  # fmt: skip


def tokenizer_of(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[EOS]", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


def texts_of(count):
    return list(sib200.load("en", "train").texts[:count])


def assert_plain_loop(trainer, module, loss_of, policy, batches, found):
    """The same training of ``module``, a copy of what the trainer trained."""
    optimizer = FusedGradDropAdamW(param_groups(module, weight_decay=0.1), lr=3e-3, mask=policy, seed=7)
    expected = []
    for number, inputs in enumerate(batches):
        if number % 6 == 0:
            optimizer.set_epoch(number // 6)
        loss = loss_of(inputs)
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(found) == 12 and found == expected
    own = optimizer_in(trainer)
    for group, other in zip(own.param_groups, optimizer.param_groups, strict=True):
        assert group["param_names"] == other["param_names"] and group.get("blocks") == other.get("blocks")
        for a, b in zip(group["params"], other["params"], strict=True):
            assert bits(a) == bits(b) and bits(own.mask(a)) == bits(optimizer.mask(b))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["graddrop_epoch"] for entry in logs] == [0] * 6 + [1] * 6


def assert_resumed(trainer, again, folder):
    again.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    for (name, a), b in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert bits(a) == bits(b), name


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_trl(policy, tmp_path):
    trl = pytest.importorskip("trl")
    texts = texts_of(24)
    tokenizer = tokenizer_of(texts)
    transformers.set_seed(3)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 1}
    config = transformers.LlamaConfig(tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config)
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=32, dataset_num_proc=None, **VALUES)

    def trainer_of(model):
        return trl.SFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=tokenizer,
            optimizer_cls_and_kwargs=integration.trainer_optimizer(args, policy),
            callbacks=[integration.GradDropCallback()],
        )  # fmt: skip

    again, trainer = trainer_of(copy.deepcopy(model)), trainer_of(model)
    start, counts, compute_loss = copy.deepcopy(trainer.model), [], trainer.compute_loss

    def counting(model, inputs, *args, num_items_in_batch=None, **kwargs):
        counts.append(num_items_in_batch)
        return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = counting
    batches, found = recorded(trainer)
    counts = iter(counts)
    loss_of = lambda inputs: compute_loss(start, inputs, num_items_in_batch=next(counts))
    assert_plain_loop(trainer, start, loss_of, policy, batches, found)
    assert_resumed(trainer, again, tmp_path)




def lengths(completions, **_):
    return [float(len(text)) for text in completions]


CHOICE = {"max_length": 32}
SAMPLED = {"max_completion_length": 4, "num_generations": 2, "generation_kwargs": {"min_new_tokens": 2}}
# Trainer: columns of its rows, made from a text; further arguments of its configuration; of itself.
TRL = {
    "SFTTrainer": (lambda text: {"text": text}, CHOICE, {}),
    "RewardTrainer": (lambda text: {"chosen": text, "rejected": text[::-1]}, CHOICE, {}),
    "DPOTrainer": (lambda text: {"prompt": text, "chosen": " " + text, "rejected": " of"}, CHOICE, {"ref_model": None}),
    "KTOTrainer": (
        lambda text: {"prompt": text, "completion": " " + text, "label": "e" in text}, CHOICE, {"ref_model": None},
    ),
    "GRPOTrainer": (lambda text: {"prompt": text}, SAMPLED, {"reward_funcs": lengths}),
    "RLOOTrainer": (lambda text: {"prompt": text}, {**SAMPLED, "beta": 0.0}, {"reward_funcs": lengths}),
    "DistillationTrainer": (lambda text: {"prompt": text}, {"max_completion_length": 4}, {"teacher_model": None}),
}  # fmt: skip


def documented_ways():
    """Returns {trainer of TRL: what docs/loops.md says of it}."""
    page = Path(__file__).resolve().parents[2].joinpath("docs/loops.md").read_text()
    rows = re.findall(r"^\| (`\w+Trainer`.*) \| (.*) \|$", page, re.MULTILINE)
    return {name: way for names, way in rows for name in re.findall(r"`(\w+Trainer)`", names)}


@pytest.mark.parametrize("name", TRL)
def test_every_trainer_of_trl(name, tmp_path):
    """By the way that the documents name: the steps of a plain loop on the same gradients."""
    trl = pytest.importorskip("trl")
    columns, more, arguments = TRL[name]
    texts = texts_of(24)
    tokenizer = tokenizer_of([*texts, *(text[::-1] for text in texts)])
    tokenizer.padding_side = "left" if "max_completion_length" in more else "right"
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        **sizes, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, num_labels=1
    )

    def model_of(seed):
        transformers.set_seed(seed)
        if name == "RewardTrainer":
            return transformers.LlamaForSequenceClassification(config)
        return transformers.LlamaForCausalLM(config)

    arguments = {key: model_of(4) if value is None else value for key, value in arguments.items()}  # another model
    values = {**VALUES, "save_strategy": "no", "max_steps": -1}
    args = getattr(trl, name.replace("Trainer", "Config"))(output_dir=str(tmp_path), **values, **more)
    policy = POLICIES[0]
    pair = integration.trainer_optimizer(args, policy)
    kind = getattr(trl, name)
    takes_it = "optimizer_cls_and_kwargs" in inspect.signature(kind.__init__).parameters
    assert ("argument" in documented_ways()[name]) == takes_it
    trainer = kind(
        model_of(3), args=args, train_dataset=datasets.Dataset.from_list(list(map(columns, texts))),
        processing_class=tokenizer, callbacks=[integration.GradDropCallback(skip_dropped=True)],
        **arguments, **({"optimizer_cls_and_kwargs": pair} if takes_it else {}),
    )  # fmt: skip
    if not takes_it:
        trainer.optimizer_cls_and_kwargs = pair
    start, grads = copy.deepcopy(trainer.model), []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.append([copy.deepcopy(param.grad) for param in trainer.model.parameters()])
    )
    trainer.train()
    optimizer = FusedGradDropAdamW(param_groups(start, weight_decay=0.1), lr=3e-3, mask=policy, seed=7)
    dropped = 0
    for number, of_step in enumerate(grads):
        optimizer.set_epoch(number * 2 // len(grads))
        for param, grad in zip(start.parameters(), of_step, strict=True):
            skipped = grad is None and param in optimizer.state
            param.grad = torch.zeros_like(param) if skipped else grad
            dropped += skipped
        optimizer.step()
    assert len(grads) >= 12 and dropped > 0
    for (its_name, a), b in zip(trainer.model.named_parameters(), start.parameters(), strict=True):
        assert bits(a) == bits(b), its_name
    assert all(param.requires_grad for param in trainer.model.parameters())


def sentence_model(folder):
    from sentence_transformers import SentenceTransformer

    if not (folder / "config.json").exists():
        transformers.set_seed(3)
        tokenizer = tokenizer_of(texts_of(48))
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=len(tokenizer), **SIZES, **none)
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_sentence_transformers(policy, tmp_path):
    """With a loss that has no parameters, and with one that has."""
    st = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    args = st.SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "out"), **VALUES)
    texts, has_parameters = texts_of(48), isinstance(policy, GradDropEpoch)

    def loss_of_model(model):
        transformers.set_seed(5)
        return losses.SoftmaxLoss(model, 16, 2) if has_parameters else losses.CosineSimilarityLoss(model)

    def trainer_of(model):
        loss = loss_of_model(model)
        label = [number % 2 for number in range(24)]
        rows = {"a": texts[:24], "b": texts[24:], "label": label if has_parameters else list(map(float, label))}
        return st.SentenceTransformerTrainer(
            model, args, train_dataset=datasets.Dataset.from_dict(rows), loss=loss,
            callbacks=[integration.GradDropCallback()],
            optimizer_cls_and_kwargs=integration.trainer_optimizer(
                args, policy, model=loss if has_parameters else None
            ),
        )  # fmt: skip

    trainer = trainer_of(sentence_model(tmp_path / "model"))
    batches, found = recorded(trainer)
    copied = sentence_model(tmp_path / "model")
    plain = loss_of_model(copied)
    loss_of = lambda inputs: plain(*trainer.collect_features(inputs))
    assert_plain_loop(trainer, plain if has_parameters else copied, loss_of, policy, batches, found)
    if has_parameters:
        assert not torch.equal(trainer.loss.classifier.weight, loss_of_model(copied).classifier.weight)
    else:
        assert_resumed(trainer, trainer_of(sentence_model(tmp_path / "model")), tmp_path / "out")
