"""The student's first weights, compressed from a model."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from limbeck.config import Recipe
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.manifests import CompressedManifest, PackedManifest
from limbeck.models import model_identity, require_context
from limbeck.registry import STAGES
from limbeck.stages.base import Stage

if TYPE_CHECKING:
    from limbeck.compression.plan import CompressionPlan


@STAGES.register("compress")
class CompressStage(Stage):
    """A model, and rows that its layers are measured on, to a smaller model."""

    command = "compress"
    label = "compressed"

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, where the recipe compresses."""
        section = recipe.compress
        if section is None:
            return []
        after = ["pack"] if section.calibration_rows else []
        return [cls(recipe, "compress", recipe.compress_dir, after=after, named=section.output_dir)]

    @cached_property
    def _plan(self) -> "CompressionPlan":
        from limbeck.compression.plan import CompressionPlan

        assert self.recipe.compress is not None
        return CompressionPlan.of(self.recipe.compress, self.recipe.compress_source)

    def inputs(self) -> dict[str, Any]:
        """The model, what is done with it, and the rows."""
        recipe, section, source = self.recipe, self.recipe.compress, self.recipe.compress_source
        assert section is not None
        inputs = {"model": model_identity(source.name, source.revision), "compress": section.effective()}
        if not section.calibration_rows:
            return inputs
        packed = PackedManifest.read(recipe.packed_dir)
        rows = min(section.calibration_rows, packed.splits["train"].rows)
        text = {"packed": packed.fingerprint, "rows": rows, "attention": recipe.dataset.attention}
        return {**inputs, "calibration": text}

    def check(self) -> None:
        """The model's architecture can be compressed in that way, and can be measured on the rows."""
        source = self.recipe.compress_source
        if source.trust_remote_code:
            raise ConfigError(
                f"teacher.trust_remote_code is true and compress takes architectures of transformers alone. "
                f"Leave it out if transformers knows that of {source.name}."
            )
        config, dataset = self._plan.config, self.recipe.dataset
        if not self.recipe.compress or not self.recipe.compress.calibration_rows:
            return
        require_context(config, dataset.max_length, "model that is compressed", "less calibration text")
        kinds = set(getattr(config, "layer_types", None) or [])
        if dataset.attention == "per_document" and "linear_attention" in kinds:
            raise ConfigError(
                f"dataset.attention is per_document and {source.name} has linear attention, which carries one document "
                "into the next. Set dataset.attention: packed."
            )
        if self.recipe.tokenizer.train_vocab_size is None:
            size = recipe_tokenizer(self.recipe).model_keys["vocab_size"]
            if size > config.get_text_config().vocab_size:
                raise ConfigError(
                    f"the rows have ids of {size:,} tokens and {source.name} knows {config.vocab_size:,}. Compress a "
                    "model of the tokenizer's vocabulary."
                )

    def needs(self) -> str:
        """The model, the method, and the text."""
        section = self.recipe.compress
        assert section is not None
        how = section.method or "fewer layers or channels"
        return f"{self.recipe.compress_source.name} by {how}, {section.calibration_rows} calibration rows"

    def make(self, folder: StageFolder, *, force: bool) -> CompressedManifest:
        """Compress."""
        from limbeck.compression.run import Compression
        from limbeck.data.dataset import PackedDataset

        recipe, section = self.recipe, self.recipe.compress
        assert section is not None
        rows = None
        if section.calibration_rows:
            rows = PackedDataset(recipe.packed_dir, max_rows=section.calibration_rows)
        plan = self._plan.fetched(recipe.compress_source.revision)
        return Compression(plan, rows, recipe.dataset.attention, folder, recipe.training.device).run(force=force)

    def weights(self) -> dict[str, str]:
        """Checksums of the compressed model."""
        return CompressedManifest.read(self.path).weights

    def read(self) -> dict[str, Any]:
        """`compression`: each layer's method, error and weights."""
        manifest = CompressedManifest.read(self.path)
        layers = [layer.model_dump(mode="json") for layer in manifest.layers]
        return {"compression": {"model": manifest.model, "bytes": manifest.bytes, "layers": layers}}

    def text(self, found: dict[str, Any]) -> str:
        """The table."""
        manifest = CompressedManifest.read(self.path)
        lines = [f"{'layer':>5}  {'how':<24}  {'relative error':>14}  {'weights before':>14}  {'after':>12}"]
        for layer in manifest.layers:
            sizes = f"{layer.before:>14,}  {layer.after:>12,}"
            lines.append(f"{layer.layer:>5}  {layer.how:<24}  {layer.error:>14.4f}  {sizes}")
        before, after = (sum(getattr(layer, key) for layer in manifest.layers) for key in ("before", "after"))
        if before:
            lines.append(f"{'all':>5}  {'':<24}  {'':>14}  {before:>14,}  {after:>12,}  ({after / before:.1%})")
        return "\n".join(lines)
