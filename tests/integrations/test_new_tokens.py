"""new_token_rows(): the rows of new tokens in the embeddings and the head of a language model, and in Trainer."""

import functools

import pytest
import torch
from lazy import Lazy
from toy import refused

from graddrop_kernels import FusedGradDropAdamW, SampleBlocks, TrainRows, new_token_rows, param_groups

transformers, peft = Lazy("transformers"), Lazy("peft")
OLD, NEW = 20, 27
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}


def bert():
    """Tied, with a bias per token."""
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=OLD, **SMALL))


def llama(tied=False):
    config = transformers.LlamaConfig(vocab_size=OLD, tie_word_embeddings=tied, num_key_value_heads=2, **SMALL)
    return transformers.LlamaForCausalLM(config)


def t5():
    """Tied over encoder, decoder and head."""
    config = transformers.T5Config(vocab_size=OLD, d_model=8, d_kv=4, num_heads=2, num_layers=2, d_ff=16)
    return transformers.T5ForConditionalGeneration(config)


def resized(model):
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


MODELS = {  # how it is made, and the parameters with a row per token
    "bert": (bert, {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}),
    "llama": (llama, {"model.embed_tokens.weight", "lm_head.weight"}),
    "llama, tied": (functools.partial(llama, tied=True), {"model.embed_tokens.weight"}),
    "t5": (t5, {"shared.weight"}),
}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("rest", ["dense", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_head_are_found(name, rest, seed):
    make, names = MODELS[name]
    model = resized(make())
    policy = new_token_rows(model, OLD, rest)
    assert policy == TrainRows({name: slice(OLD, None) for name in names}, rest)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = FusedGradDropAdamW(model.named_parameters(), lr=0.1, weight_decay=0.5, mask=policy)
    for i in range(5):
        step(model, optimizer, seed + i)
    for name, param in model.named_parameters():
        moved = (param != before[name]).view(len(param), -1)
        if name in names:
            assert moved[OLD:].all() and not moved[:OLD].any() and param.shape[0] == NEW
            assert optimizer.state[param]["exp_avg"].shape[0] == NEW - OLD
        else:
            assert moved.all() if rest == "dense" else not moved.any()


def test_beside_lora(seed):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(resized(llama()), config)
    policy = new_token_rows(model, OLD)
    assert all("modules_to_save" in name for name in policy.rows) and len(policy.rows) == 2
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: param.detach().clone() for name, param in trained.items()}
    optimizer = FusedGradDropAdamW(trained.items(), lr=0.1, weight_decay=0.5, mask=policy)
    step(model, optimizer, seed)
    for name, param in trained.items():
        moved = param != before[name]
        assert not moved[:OLD].any() and moved[OLD:].all() if name in policy.rows else moved.any()


def test_of_a_compiled_model():
    assert new_token_rows(torch.compile(resized(bert())), OLD) == new_token_rows(resized(bert()), OLD)


def test_the_old_size_is_that_of_the_checkpoint(tmp_path):
    bert().save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with refused(ValueError, r"old_vocab_size=20\) must be an int from 1 to 19", "resize_token_embeddings"):
        new_token_rows(model)
    assert new_token_rows(resized(model)) == new_token_rows(model, OLD)


@pytest.mark.parametrize("size", [0, NEW, 30, 20.0, True])
def test_sizes_that_leave_no_rows(size):
    with refused(ValueError, f"old_vocab_size={size!r}", "from 1 to 26", "27 rows", "resize_token_embeddings"):
        new_token_rows(resized(bert()), size)


def test_what_is_no_such_model():
    with refused(TypeError, "Linear has no get_input_embeddings", "TrainRows"):
        new_token_rows(torch.nn.Linear(2, 2), 1)
    with refused(ValueError, "checkpoint '' of the model is not to be found", "old_vocab_size="):
        new_token_rows(resized(bert()))
    with refused(ValueError, "neither the input embeddings of BertForMaskedLM nor its head are trained"):
        new_token_rows(resized(bert()).requires_grad_(False), OLD)
    with refused(ValueError, "in a parameter group with another mask", "pass model.named_parameters()"):
        FusedGradDropAdamW(param_groups(resized(bert())), mask=new_token_rows(resized(bert()), OLD))


# In Trainer.


def trained(mask, tmp_path):
    from graddrop_kernels.integrations.transformers import GradDropCallback, trainer_optimizer

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, NEW, (16, 6), generator=generator)
    model = resized(bert())
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, weight_decay=0.1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=trainer_optimizer(args, mask=mask, model=model), callbacks=[GradDropCallback()],
    )  # fmt: skip
    trainer.train()
    return before, model, trainer


@pytest.mark.parametrize("given", ["with the size", "of the checkpoint", "a policy"])
def test_trainer_trains_the_rows(given, tmp_path, monkeypatch):
    if given == "of the checkpoint":
        monkeypatch.setattr("graddrop_kernels.integrations.new_tokens._of_checkpoint", lambda model: OLD)
    mask = {
        "with the size": functools.partial(new_token_rows, old_vocab_size=OLD),
        "of the checkpoint": new_token_rows,
        "a policy": new_token_rows(resized(bert()), OLD),
    }[given]
    before, model, trainer = trained(mask, tmp_path)
    moved = {name: param != before[name] for name, param in model.named_parameters()}
    rows = moved["bert.embeddings.word_embeddings.weight"].any(dim=1)
    assert rows[OLD:].all() and not rows[:OLD].any()
    assert all(each.any() for each in moved.values())
    assert {group["mask"] for group in trainer.optimizer.param_groups} == {new_token_rows(model, OLD).to_json()}


def test_the_log_names_the_blocks_whose_turn_it_is(tmp_path):
    _, model, trainer = trained(SampleBlocks(k=1, every=2), tmp_path)
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    index = next(i for i, group in enumerate(optimizer.param_groups) if group["mask"] is not None)
    blocks = [f"bert.encoder.layer.{number}" for number in range(2)]
    expected = []
    for done in range(4):
        optimizer.param_groups[index]["completed_steps"] = done
        for group in optimizer.param_groups:
            group["completed_steps"] = done
        kept = [block for block in blocks if optimizer.mask(f"{block}.output.dense.weight").all()]
        expected.append(", ".join(kept))
    logged = [entry["graddrop_active_blocks"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == expected and all(len(each.split(", ")) == 1 for each in logged)
