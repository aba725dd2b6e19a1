"""CLeVER pretraining and its evaluations: ``python -m training.pretrain RECIPE`` in a checkout."""
