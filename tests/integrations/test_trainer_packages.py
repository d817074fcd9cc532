"""Trainers of other packages that are transformers' Trainer underneath: TRL, sentence-transformers."""

import copy

import pytest
import torch
from toy import bits
from trainer_runs import optimizer_in, recorded
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from graddrop_kernels import FusedGradDropAdamW, GradDropEpoch, LayerGradDrop, LinearAnneal, param_groups
from graddrop_kernels.demo import sib200
from graddrop_kernels.integrations.transformers import GradDropCallback, trainer_optimizer

datasets = pytest.importorskip("datasets")
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
    return PreTrainedTokenizerFast(
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
    set_seed(3)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config)
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=32, dataset_num_proc=None, **VALUES)

    def trainer_of(model):
        return trl.SFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_dict({"text": texts}), processing_class=tokenizer,
            optimizer_cls_and_kwargs=trainer_optimizer(args, policy), callbacks=[GradDropCallback()],
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


def sentence_model(folder):
    from sentence_transformers import SentenceTransformer

    if not (folder / "config.json").exists():
        set_seed(3)
        tokenizer = tokenizer_of(texts_of(48))
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES, **none)).save_pretrained(folder)
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
        set_seed(5)
        return losses.SoftmaxLoss(model, 16, 2) if has_parameters else losses.CosineSimilarityLoss(model)

    def trainer_of(model):
        loss = loss_of_model(model)
        label = [number % 2 for number in range(24)]
        rows = {"a": texts[:24], "b": texts[24:], "label": label if has_parameters else list(map(float, label))}
        return st.SentenceTransformerTrainer(
            model, args, train_dataset=datasets.Dataset.from_dict(rows), loss=loss, callbacks=[GradDropCallback()],
            optimizer_cls_and_kwargs=trainer_optimizer(args, policy, model=loss if has_parameters else None),
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
