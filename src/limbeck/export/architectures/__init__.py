"""What each architecture is called and how it lies in GGUF, one module a family.

Add one with a class that extends `base.Architecture`, registered in `limbeck.registry.ARCHITECTURES` by the
`model_type` of transformers, and its module here.
"""

from limbeck.export.architectures import gemma3, llama, olmo2, own, phi3, qwen3, qwen3_next  # noqa: F401
