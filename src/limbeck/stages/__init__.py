"""The stages of `limbeck run`, one module each: what a stage is made from, how it is made, read back and printed.

Add one with a class that fulfils `base.Stage`, registered in `limbeck.registry.STAGES`, and its name here, in the order
in which stages are asked what of them a recipe wants.
"""

from limbeck.stages import tokenizer, pack, compress, cache, train, evaluate, generate, export  # noqa: F401, I001
