"""What is wanted of a teacher's predictions, whoever makes them."""

from dataclasses import dataclass

from limbeck.config import LossConfig, SamplingConfig, TeacherConfig
from limbeck.config.base import default
from limbeck.errors import ConfigError


@dataclass(frozen=True)
class TargetSpec:
    """Which part of a teacher's distributions is kept.

    Attributes:
        top_k: K, ids kept per position; None keeps the vocabulary.
        temperatures: declared temperatures, whose normalisers are kept; 1 is among them.
        attention: per_document or packed, as for the student.
        sampling: head + sampled tail instead of top-k.
        sampling_temperature: the temperature of the draws: the largest declared when None is given; None without
            sampling.
    """

    top_k: int | None = default(TeacherConfig, "top_k")
    temperatures: tuple[float, ...] = (1.0, default(LossConfig, "temperature"))
    attention: str = "per_document"
    sampling: SamplingConfig | None = None
    sampling_temperature: float | None = None

    def __post_init__(self) -> None:
        drawn_at = (self.sampling_temperature or max(self.temperatures)) if self.sampling is not None else None
        object.__setattr__(self, "sampling_temperature", drawn_at)

    def support_of(self, vocab_size: int) -> int:
        """Ids that a position can have."""
        if self.sampling is not None:
            return self.sampling.head + self.sampling.draws
        return self.top_k or vocab_size

    def check(self, vocab_size: int) -> None:
        """Refuse what no teacher with this vocabulary can give.

        Raises:
            ConfigError: 1 is not among the temperatures, or K exceeds the vocabulary.
        """
        if 1.0 not in self.temperatures:
            raise ConfigError(f"the declared temperatures are {list(self.temperatures)}; 1 must be one of them.")
        support = self.support_of(vocab_size)
        if support > vocab_size:
            raise ConfigError(
                f"teacher.top_k (K) is {support} and the teacher's vocabulary has {vocab_size} ids. "
                "Lower teacher.top_k, or set it to null for the whole vocabulary."
            )
