"""What compressing a model means for its config and for the names of its tensors, known before a weight is read.

The one idea: fewer experts, fewer layers and narrower feed-forward layers stay the architecture they were, which
everybody loads; experts in another form are an architecture of ours (`compressed_…`).
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.compression.layers import candidates
from limbeck.compression.pruning import evenly_spaced, with_attention
from limbeck.compression.reader import PER_LAYER
from limbeck.config import ModelSource
from limbeck.config.compress import CompressConfig
from limbeck.errors import ConfigError
from limbeck.manifests import CompressedLayer
from limbeck.models import model_config, resolve_model
from limbeck.registration import MOE_BASES
from limbeck.students.compressed.experts import set_experts

#: Decoders without routed experts whose layers and widths can be cut.
DENSE_BASES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")

#: What an architecture calls its block of experts and an expert's gate, up and down projection on disk.
_USUAL_NAMES = ("mlp.", "gate_proj", "up_proj", "down_proj")
_OTHER_NAMES = {"mixtral": ("block_sparse_moe.", "w1", "w3", "w2")}


@dataclass(frozen=True)
class CompressionPlan:
    """A model and what is to be done with it.

    Attributes:
        name: as the recipe names it.
        source: its folder.
        config: its transformers config.
        section: what is to be done.
    """

    name: str
    source: Path
    config: Any
    section: CompressConfig

    @classmethod
    def of(cls, section: CompressConfig, model: ModelSource) -> "CompressionPlan":
        """The plan for a folder or hub id.

        Raises:
            ConfigError: its architecture cannot be compressed in that way, or has fewer of what is to be kept.
        """
        plan = cls(model.name, Path(resolve_model(model.name)), model_config(model, "compress.model"), section)
        plan.check()
        return plan

    def fetched(self, revision: str | None = None) -> "CompressionPlan":
        """The same plan with the weights of a hub id in a folder here."""
        return CompressionPlan(self.name, fetched_folder(self.source, self.name, revision), self.config, self.section)

    def check(self) -> None:
        """Refuse what the architecture has not. Raises as `of`."""
        section, config = self.section, self.config
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(
                f"{self.name} is quantised, and what is compressed has to be plain weights. Name the model that it was "
                "made from."
            )
        kind = config.model_type
        known = MOE_BASES if section.method is not None else (*DENSE_BASES, *MOE_BASES)
        if kind not in known or (section.keep_ffn is not None and kind not in DENSE_BASES):
            wanted = {
                "compress.method": (section.method, MOE_BASES),
                "compress.keep_ffn": (section.keep_ffn, DENSE_BASES),
                "compress.keep_layers": (section.keep_layers, (*DENSE_BASES, *MOE_BASES)),
            }
            key, value, types = next((k, v, t) for k, (v, t) in wanted.items() if v is not None and kind not in t)
            raise ConfigError(
                f"{key} is {value} and {self.name} is a {kind}; it is for {', '.join(types)}."
                + (" Dense models take compress.keep_layers and compress.keep_ffn." if kind in DENSE_BASES else "")
            )
        for key, most in (("keep_layers", config.num_hidden_layers), ("keep_ffn", config.intermediate_size)):
            value = getattr(section, key)
            if value is not None and value > most:
                raise ConfigError(f"compress.{key} is {value} and {self.name} has {most}.")
        if section.method is None:
            return
        _, hidden, inside = self.sizes
        if section.rank is not None:
            most = hidden if section.method == "latent" else min(hidden, inside)
            latent = section.method == "latent"
            if section.rank > most or (latent and (section.rank == 0 or section.rank % 8)):
                raise ConfigError(
                    f"compress.rank is {section.rank} and the matrices of {self.name} are {inside} × {hidden}; "
                    f"{section.method} takes {'multiples of 8 up to ' if latent else '0 to '}{most}."
                )
        candidates(section, config, self.sizes, bool(section.calibration_rows))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, hidden width, width inside an expert."""
        config = self.config
        inside = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(config.num_experts), int(config.hidden_size), int(inside)

    @property
    def is_own(self) -> bool:
        """True when the result is an architecture of ours."""
        return self.section.method not in (None, "prune")

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that stay, where no text tells which."""
        count = int(self.config.num_hidden_layers)
        keep = self.section.keep_layers
        if keep is None:
            return list(range(count))
        return with_attention(evenly_spaced(count, keep), getattr(self.config, "layer_types", None))

    def outside(self, names: Sequence[str]) -> list[str]:
        """Of the tensors that belong to no layer those that the model has; some checkpoints bring others."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        ignored = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]._keys_to_ignore_on_load_unexpected or []
        return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]

    def embedding(self, names: Sequence[str]) -> str:
        """The name on disk of the embedding."""
        return next(name for name in names if name.endswith("embed_tokens.weight"))

    def on_disk(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A smaller tensor under the names that the result's architecture has on disk."""
        if self.section.method != "prune":
            yield name, value
            return
        block, gate, up, down = _OTHER_NAMES.get(self.config.model_type, _USUAL_NAMES)
        if not name.startswith("mlp.experts."):
            yield name.replace("mlp.", block), value
            return
        half = value.shape[1] // 2
        for number, matrix in enumerate(value):
            stem = f"{block}experts.{number}."
            if name.endswith("down_proj"):
                yield f"{stem}{down}.weight", matrix
            else:
                yield f"{stem}{gate}.weight", matrix[:half]
                yield f"{stem}{up}.weight", matrix[half:]

    def unchanged(self, inside: str, name: str) -> str:
        """A tensor that stays: its runtime name in an architecture of ours, else the one it had on disk."""
        return inside if self.is_own else name.split("layers.", 1)[1].split(".", 1)[1]


def fetched_folder(folder: Path, name: str, revision: str | None) -> Path:
    """The folder itself, or that of a hub id's files once they are here."""
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    others = ["consolidated*", "*/*"]  # the same weights in another layout
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=others))


def written_config(plan: CompressionPlan, layers: Sequence[int], records: Sequence[CompressedLayer]) -> dict[str, Any]:
    """The config of the result."""
    return changed_config(plan, layers, [record.description for record in records]).to_dict()  # type: ignore[no-any-return]


def planned_config(plan: CompressionPlan) -> Any:
    """The config of the result before it is there; None where only the calibration will tell (`auto`).

    Which layers stay may be chosen by the text; how many is known.
    """
    section = plan.section
    if section.method == "auto":
        return None
    layers = plan.layers
    description: dict[str, Any] = {"method": "none"}
    if section.method is not None:
        (description,) = candidates(section, plan.config, plan.sizes, bool(section.calibration_rows))
    routed = [description if _is_routed(plan.config, number) else {"method": "none"} for number in layers]
    return changed_config(plan, layers, routed)


def _is_routed(config: Any, number: int) -> bool:
    """True for layers with routed experts."""
    step = getattr(config, "decoder_sparse_step", 1) or 1
    return number not in (getattr(config, "mlp_only_layers", None) or []) and (number + 1) % step == 0


def changed_config(plan: CompressionPlan, layers: Sequence[int], described: Sequence[dict[str, Any]]) -> Any:
    """The model's config with fewer layers, narrower ones, fewer experts, or experts in another form."""
    config, section = copy.deepcopy(plan.config), plan.section
    config.num_hidden_layers = len(layers)
    for key in PER_LAYER:
        if getattr(config, key, None):
            setattr(config, key, [getattr(plan.config, key)[number] for number in layers])
    if hasattr(config, "mlp_only_layers"):
        dense = [place for place, number in enumerate(layers) if not _is_routed(plan.config, number)]
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1
    if section.keep_ffn is not None:
        config.intermediate_size = section.keep_ffn
    pruned = [entry["experts"] for entry in described if entry["method"] == "prune"]
    if section.method == "prune" and pruned:
        set_experts(config, pruned[0])
    if not plan.is_own:
        return config
    from limbeck.students.compressed.models import compressed_config, compressed_model

    base = config.model_type
    kind = compressed_config(base)
    compressed_model(base)
    config.__class__ = kind
    config.expert_layers = [None if entry["method"] == "none" else entry for entry in described]
    config.architectures = [compressed_model(base).__name__]
    return config
