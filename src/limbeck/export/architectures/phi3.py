"""Phi 3 and 4: queries, keys and values in one matrix, gate and up projection in another, there as here."""

from typing import Any

from limbeck.export.architectures.base import PartlyRotated
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("phi3")
class Phi3(PartlyRotated):
    """Phi 3, 3.5 and 4, dense, with one RoPE for all lengths."""

    name = "phi3"
    heads_fill_width = True
    windows_by_layer = False

    def add_numbers(self, writer: Any) -> None:
        """No window, said aloud: older llama.cpp takes one of 2,047 where nothing is said."""
        super().add_numbers(writer)
        writer.add_sliding_window(0)
