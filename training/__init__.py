"""CLeVER pretraining and its evaluations, run from a checkout: ``python -m training.pretrain RECIPE``."""
