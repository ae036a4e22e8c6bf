"""Qwen 2 and 3, dense and with experts: nothing is rearranged but the experts."""

from limbeck.export.architectures.base import Architecture, WithExperts
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("qwen2")
class Qwen2(Architecture):
    """Qwen 2 and 2.5, whose queries, keys and values have biases."""

    name = "qwen2"
    heads_fill_width = True


@ARCHITECTURES.register("qwen3")
class Qwen3(Architecture):
    """Qwen 3."""

    name = "qwen3"


@ARCHITECTURES.register("qwen3_moe")
class Qwen3MoE(WithExperts):
    """Qwen 3 with experts."""

    name = "qwen3moe"
