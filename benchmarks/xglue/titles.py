"""How methods are called in tables."""

MISSING = "–"

# The rows of the paper's tables, in their order; then what it describes or names besides.
TITLES = {
    "sft": "SFT",
    "gradfreeze-topdown": "GradFreeze-TopDown",
    "gradfreeze-bottomup": "GradFreeze-BottomUp",
    "graddrop": "GradDrop",
    "anneal-graddrop": "Anneal-GradDrop",
    "anneal-layer-graddrop": "Anneal-Layer-GradDrop",
    "layer-graddrop": "Layer-GradDrop",
    "graddrop-epoch": "GradDrop-Epoch",
    "graddrop-epoch-toggle": "GradDrop-Epoch-Toggle",
    "graddrop-redrawn-each-epoch": "GradDrop, redrawn each epoch",
    "gaussian-graddrop": "Gaussian GradDrop",
}
