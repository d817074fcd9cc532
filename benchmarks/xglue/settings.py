"""Settings that determine the numbers of a run, their defaults, and the name of the run's files."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from .methods import METHODS
from .tasks import TASKS

LARGE, SMALL, TINY = "xlm-roberta-large", "e5-small", "tiny"
PRECISIONS, SELECTIONS = ("bf16", "float32"), ("en", "all")
VARIED = ("method", "seed", "lr")  # the settings in which runs of one configuration differ


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Fields are the command line's options. ``settings_for`` knows the defaults per task and
    model.

    languages: languages to test in, English first. lr: peak, of the pretrained body; the head's is ``head_lr_factor``
    times it. batch_size: examples per optimizer step, over all processes and micro-batches. warmup: share of the steps.
    max_grad_norm: of all parameters; 0 for no clipping. p: of policies with a constant one. anneal_start, anneal_end:
    see ``LinearAnneal``. blocks_per_epoch: of GradFreeze; None spreads the blocks over the epochs. dropout: of
    activations, for sft only; masked methods have none. precision: "bf16" (autocast) or "float32". select: the best
    epoch has the best English dev score ("en"), or the best mean over all dev languages ("all", the habit of XGLUE's
    papers, not zero-shot). test_every_epoch: test every epoch, not only the best one. train_examples, eval_examples:
    use only this many, the first ones. prefix: text before every input (e5's "query: ").
    """

    task: str
    method: str
    seed: int
    model: str
    languages: tuple[str, ...]
    lr: float
    head_lr_factor: float
    batch_size: int
    accumulation: int
    epochs: int
    max_length: int
    stride: int
    weight_decay: float
    warmup: float
    max_grad_norm: float
    adam_eps: float
    p: float
    anneal_start: float
    anneal_end: str
    blocks_per_epoch: int | None
    dropout: float
    precision: str
    select: str
    dev_all: bool
    test_every_epoch: bool
    train_examples: int | None
    eval_examples: int | None
    prefix: str

    @property
    def dev_languages(self) -> tuple[str, ...]:
        """Returns the languages whose dev score is computed after every epoch."""
        return self.languages if self.dev_all or self.select == "all" else self.languages[:1]

    @property
    def configuration(self) -> dict:
        """Returns all but method, seed and lr: what runs in one table must have in common. Plain JSON values."""
        return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k not in VARIED}))

    @property
    def file(self) -> Path:
        """Returns the result's path below the folder of results: one name per settings, equal for equal ones."""
        model = re.sub(r"[^A-Za-z0-9.]+", "-", Path(self.model).name)
        digest = hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:8]
        return Path(self.task, f"{model}-{digest}", f"{self.method}-lr{self.lr:g}-seed{self.seed}.json")


def settings_for(task: str, model: str = LARGE, **given) -> Settings:
    """Makes the settings of a run: ``given``, and for what is missing or None the defaults of the task and the model.

    Learning rate, batch, epochs and lengths are those that others published for the task (see ``tasks.TASKS``: the
    GradDrop paper prints none). AdamW's eps 1e-8 and clipping at 1.0 are Unicoder's, as are a weight decay and a
    warm-up of 0. On stand-ins, and for any small model, weight decay is 0.01, warm-up 10 % and the head's learning rate
    ten times the body's, as in this library's demo. e5-small trains at 1e-4 at least.

    Raises:
        ValueError: an unknown name, or a value out of its range; names the option.
    """
    _one_of("task", task, TASKS)
    published, small = TASKS[task].settings, model in (SMALL, TINY)
    ours = small or not TASKS[task].official
    defaults = {
        "method": "graddrop", "seed": 0, "languages": TASKS[task].languages,
        "lr": max(published.lr, 1e-4) if small else min(published.lr, 1e-5) if not TASKS[task].official
        else published.lr,
        "head_lr_factor": 10.0 if small else 1.0, "batch_size": published.batch_size, "accumulation": 1,
        "epochs": published.epochs, "max_length": published.max_length, "stride": published.stride,
        "weight_decay": 0.01 if ours else 0.0, "warmup": 0.1 if ours else 0.0, "max_grad_norm": 1.0, "adam_eps": 1e-8,
        "p": 0.2, "anneal_start": 0.9, "anneal_end": "paper", "blocks_per_epoch": None, "dropout": 0.0,
        "precision": "bf16", "select": "en", "dev_all": False, "test_every_epoch": False, "train_examples": None,
        "eval_examples": None, "prefix": "query: " if model == SMALL and TASKS[task].kind != "token" else "",
    }  # fmt: skip
    unknown = given.keys() - defaults.keys()
    if unknown:
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
    values = defaults | {name: value for name, value in given.items() if value is not None}
    values["languages"] = tuple(values["languages"])
    settings = Settings(task=task, model=model, **values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raises ValueError for settings that cannot be run, naming option, value and remedy."""
    task = TASKS[settings.task]
    _one_of("method", settings.method, METHODS)
    for language in settings.languages:
        _one_of("languages", language, task.languages)
    languages = settings.languages
    if languages[:1] != ("en",) or len(set(languages)) < len(languages):
        raise ValueError(f"--languages {' '.join(languages)}: each once, English (en) first")
    for name, values in {"precision": PRECISIONS, "select": SELECTIONS, "anneal_end": ("paper", "zero")}.items():
        _one_of(name, getattr(settings, name), values)
    for name in ("batch_size", "accumulation", "epochs", "train_examples", "eval_examples", "blocks_per_epoch"):
        _range(settings, name, 1, None)
    for name in ("seed", "stride", "weight_decay", "max_grad_norm"):
        _range(settings, name, 0, None)
    for name in ("p", "anneal_start", "dropout", "warmup"):
        _range(settings, name, 0, 1)
    for name in ("lr", "head_lr_factor", "adam_eps"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"--{_option(name)} {getattr(settings, name)}: must be more than 0")
    if settings.max_length < 8 or (task.kind == "span" and settings.stride > settings.max_length // 2):
        raise ValueError(
            f"--max-length {settings.max_length} --stride {settings.stride}: at least 8 sub-words, and windows of a "
            "long context may share half of them at most"
        )
    if settings.batch_size % settings.accumulation:
        raise ValueError(
            f"--gradient-accumulation {settings.accumulation}: must divide --batch-size {settings.batch_size}, which "
            "counts the examples of an optimizer step"
        )
    if settings.dropout and settings.method != "sft":
        raise ValueError(f"--dropout {settings.dropout}: the paper turns it off beside a mask; for --method sft only")


def _option(name: str) -> str:
    return "gradient-accumulation" if name == "accumulation" else name.replace("_", "-")


def _one_of(name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"--{_option(name)} {value}: must be one of {', '.join(known)}")


def _range(settings: Settings, name: str, low, below) -> None:
    value = getattr(settings, name)
    if value is not None and (value < low or (below is not None and value >= below)):
        wanted = f"at least {low}" if below is None else f"in [{low}, {below})"
        raise ValueError(f"--{_option(name)} {value}: must be {wanted}")
