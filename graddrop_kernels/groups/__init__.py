"""From a model to parameter groups; what a group holds and masks."""
