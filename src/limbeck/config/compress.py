"""The section about compressing a teacher into the student's first weights."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from limbeck.config.base import Count, Section

METHODS = ("latent", "shared_core", "core_delta", "prune", "auto")


class CompressConfig(Section):
    """Compress a model in closed form; the result is what the student starts from."""

    model: str | None = Field(None, description="Folder or hub id of what is compressed; default the teacher.")
    method: Literal["latent", "shared_core", "core_delta", "prune", "auto"] | None = Field(
        None,
        description="How routed experts are held: `latent`: in a space of `rank`; `shared_core`: a core with low-rank "
        "wrappers; `core_delta`: a base with low-rank additions; `prune`: fewer; `auto`: layer by layer what errs "
        "least.",
    )
    keep: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Share of the experts' weights that stays; default 0.5 where `rank` is not given."
    )
    rank: Count | None = Field(None, description="Rank of the factorisation, in place of `keep`.")
    keep_layers: PositiveInt | None = Field(None, description="Layers that stay, of any decoder.")
    keep_ffn: PositiveInt | None = Field(None, description="Feed-forward channels that stay, of a dense decoder.")
    calibration_rows: Count = Field(
        128, description="Training rows that the layers are measured on; 0: by the weights alone."
    )
    output_dir: Path | None = Field(None, description="Its folder; default OUTPUT_DIR/checkpoint-0.")

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompressConfig":
        if self.method is None and self.keep_layers is None and self.keep_ffn is None:
            raise ValueError(
                "compress says nothing to do; set method (latent is a good first choice) for a mixture of experts, "
                "keep_layers or keep_ffn for a dense model"
            )
        if self.keep is not None and self.rank is not None:
            raise ValueError(f"compress.keep is {self.keep} and compress.rank is {self.rank}; give one of the two")
        if self.method is None and (self.keep is not None or self.rank is not None):
            raise ValueError("compress.keep and compress.rank are about routed experts; set compress.method too")
        if self.method in ("prune", "auto") and self.rank is not None:
            raise ValueError(f"compress.rank is {self.rank} and compress.method {self.method} goes by keep")
        return self

    def effective(self) -> dict[str, Any]:
        """What the result depends on beside the model and the text, however it was written."""
        share = self.share if self.method is not None and self.rank is None else None
        return {**self.model_dump(include={"method", "rank", "keep_layers", "keep_ffn"}), "keep": share}

    @property
    def share(self) -> float:
        """Of the experts' weights, where no rank is given."""
        return 0.5 if self.keep is None else self.keep
