"""One command that proves and measures the library on a GPU: ``python -m benchmarks.gpu``.

It needs Python, PyTorch, numpy and pytest, and no network. ``schedule`` lists what runs, ``run`` starts it, ``page``
writes the summary. Nothing here is imported by the package, and importing this file imports nothing.
"""
