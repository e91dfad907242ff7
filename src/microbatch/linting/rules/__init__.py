"""The doctor's rules: their codes, names, weight and words, and a smallest loop that each one finds.

The loops of the rules are source that runs. They use these names, and import or create everything else:

    N            microbatches of one optimizer step
    steps        optimizer steps of the run
    epochs       passes over the loader
    loader       a list of microbatches ``(x, y)``
    batches      an endless iterator over the loader
    model        a module that takes ``x``
    criterion    the mean loss over the rows of one microbatch
    optimizer    an optimizer of the model, its gradients zeroed
    scheduler    a learning-rate scheduler of the optimizer
    scaler       a ``GradScaler``
    max_norm     the norm that gradients are clipped to
    log_scale    a parameter: the logarithm of an inverse temperature

``tests/linting/test_rules_measured.py`` gives them values, runs every loop, and holds the numbers in ``Rule.how_much``.
"""
