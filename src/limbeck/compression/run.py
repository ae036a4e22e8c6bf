"""A model compressed layer by layer, in the memory of one of its layers.

The one idea: the calibration text goes through the layers in turn, its hidden states in a file; each layer is read,
measured, made smaller and written before the next is read. A layer is done when its record is there, which is written
last, so whatever is killed goes on at the layer in hand and ends with the same bytes.

    checkpoint-0/
      layer-00000.safetensors …   outside-00000.safetensors …   model.safetensors.index.json  config.json
      work/hidden-00000.bin  work/layer-00000.json              until it is finished
      manifest.json               the table: what became of each layer, and its error

Shapes: R rows, B rows at once, T positions, H hidden width.
"""

import contextlib
import ctypes
import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from limbeck.compression.layers import DenseLayer, RoutedLayer
from limbeck.compression.plan import CompressionPlan, written_config
from limbeck.compression.pruning import kept_layers, with_attention
from limbeck.compression.reader import CheckpointReader, LayerModel
from limbeck.console import progress, say
from limbeck.data.dataset import PackedDataset
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import CompressedLayer, CompressedManifest
from limbeck.models import choose_device, choose_dtype
from limbeck.storage import (
    commit_file,
    copy_beside,
    read_json,
    sha256_file,
    temporary_for,
    write_json,
)

Tensor = torch.Tensor
_TOKENS = 4096  # in one forward pass
_WORK = "work"


class Compression:
    """One model on its way into a folder.

    Args:
        plan: what is to be done with which model.
        rows: calibration text; None: by the weights alone.
        attention: per_document or packed, as the rows are used.
        folder: where it goes.
        device: to compute on; default cuda where there is one.
    """

    def __init__(
        self,
        plan: CompressionPlan,
        rows: PackedDataset | None,
        attention: str,
        folder: StageFolder,
        device: str | None = None,
    ) -> None:
        self.plan, self.rows, self.attention, self.folder = plan, rows, attention, folder
        self.device = torch.device(choose_device(device))
        self.reader = CheckpointReader(plan.source)
        self._work = folder.path / _WORK

    def run(self, *, force: bool = False) -> CompressedManifest:
        """Compress, or go on; returns the manifest.

        Raises:
            LimbeckError: the checkpoint is not what its config says, or cannot be compressed as asked.
        """
        self.folder.begin(replace=force)
        self._work.mkdir(exist_ok=True)
        layers = self._chosen_layers()
        started = time.perf_counter()
        with progress("compressing layers", len(layers)) as bar:
            for place, number in enumerate(layers):
                if not self._record(place).exists():
                    self._compress(place, number)
                bar.advance()
        records = [CompressedLayer.model_validate(read_json(self._record(place))) for place in range(len(layers))]
        manifest = self._finish(layers, records)
        say(f"compressed {len(layers)} layers in {time.perf_counter() - started:.1f} s; weights in {self.folder.path}")
        return manifest

    # -- layers ----------------------------------------------------------------------------------------

    def _record(self, place: int) -> Path:
        return self._work / f"layer-{place:05d}.json"

    def _shard(self, place: int) -> Path:
        return self.folder.path / f"layer-{place:05d}.safetensors"

    def _chosen_layers(self) -> list[int]:
        """Numbers of the layers that stay: all, by what they change, or evenly spaced without a text."""
        plan = self.plan
        if plan.section.keep_layers is None or self.rows is None:
            return plan.layers
        path = self._work / "changes.json"
        found: list[float] = read_json(path) if path.exists() else []
        for number in range(len(found), plan.config.num_hidden_layers):
            found.append(self._change(number))
            write_json(path, found)
            self._forget(f"change-{number:05d}.bin")
        kept = kept_layers(found, plan.section.keep_layers)
        kept = with_attention(kept, getattr(plan.config, "layer_types", None), found)
        shown = ", ".join(f"{number}: {change:.3f}" for number, change in enumerate(found))
        say(f"layers change the hidden states by (1 − cos) {shown}; kept are {kept}")
        return kept

    def _change(self, number: int) -> float:
        """1 − cos of what goes into a layer and what comes out, the mean over the tokens."""
        model = self._model(number)
        total = count = 0.0
        into, after = self._hidden("change", number, model), self._new_hidden("change", number + 1, model)
        for where, inputs, counted in self._batches():
            x = into[where].to(self.device)
            y = model(x, **inputs)
            after[where] = y.to(after)
            cosine = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)[counted.to(x.device)]
            total, count = total + float((1.0 - cosine).double().sum()), count + len(cosine)
        self._keep_hidden("change", number + 1)
        return total / max(count, 1.0)

    def _compress(self, place: int, number: int) -> None:
        started = time.perf_counter()
        model = self._model(number)
        section = self.plan.section
        store = None if self.rows is None else self._mapped(self._work / "inputs.bin", model).flatten(0, 1)
        part: RoutedLayer | DenseLayer
        if model.is_routed and section.method is not None:
            part = RoutedLayer(model.layer, model.body.config, section, store)
        else:
            part = DenseLayer(model.layer, section, store)
        if store is not None:
            self._pass(model, part, place)
            return_freed_memory()
        smaller = part.smaller()
        tensors = {name: value.to("cpu", model.stored_dtype(name)) for name, value in smaller.tensors.items()}
        del part, model  # the layer's memory is free before the smaller one is written
        return_freed_memory()
        self._write(place, number, tensors)
        record = CompressedLayer(
            layer=number,
            description=smaller.description,
            error=smaller.error,
            before=smaller.before,
            after=smaller.after,
        )
        write_json(self._record(place), record.model_dump(mode="json"))
        self._forget(f"hidden-{place:05d}.bin")
        say(f"layer {number}: {record.how}, relative error {smaller.error:.4f}, {time.perf_counter() - started:.1f} s")

    def _model(self, number: int) -> LayerModel:
        stored = getattr(self.plan.config, "dtype", None) or torch.float32
        name = choose_dtype("auto", str(self.device))  # float32 where bfloat16 is emulated
        dtype = torch.float32 if name == "float32" else stored
        model = LayerModel(self.reader, self.plan.config, number, dtype)
        model.body.to(self.device)
        return model

    # -- calibration text ------------------------------------------------------------------------------

    def _pass(self, model: LayerModel, part: RoutedLayer | DenseLayer, place: int) -> None:
        """All rows through the layer, which is measured; what comes out is the next layer's input."""
        into, after = self._hidden("hidden", place, model), self._new_hidden("hidden", place + 1, model)
        for where, inputs, counted in self._batches():
            part.listen(counted.to(self.device))
            after[where] = model(into[where].to(self.device), **inputs).to(after)
        self._keep_hidden("hidden", place + 1)

    def _batches(self) -> Iterator[tuple[slice, dict[str, Any], Tensor]]:
        """Which rows, the model's inputs beside their hidden states, and which tokens are no filler."""
        assert self.rows is not None
        step = max(1, _TOKENS // self.rows.max_length)
        for start in range(0, len(self.rows), step):
            stop = min(start + step, len(self.rows))
            rows = self.rows.rows(range(start, stop))
            inputs = rows.to(self.device).model_inputs(self.attention)
            inputs.pop("input_ids")
            yield slice(start, stop), inputs, rows.doc_ids >= 0

    def _hidden(self, kind: str, place: int, model: LayerModel) -> Tensor:
        """What goes into the layer at a place, `[R, T, H]`; before the first one the embeddings."""
        assert self.rows is not None
        path = self._work / f"{kind}-{place:05d}.bin"
        if not path.exists():
            if place:
                raise LimbeckError(f"{path} is missing; delete {self.folder.path} and compress again.")
            name = self.plan.embedding(self.reader.outside())
            table = self.reader.tensor(name)
            made = self._new_hidden(kind, 0, model)
            for start in range(len(self.rows)):
                ids = self.rows.rows([start]).input_ids
                made[start] = torch.nn.functional.embedding(ids, table)[0].to(made)
            self._keep_hidden(kind, 0)
        return self._mapped(path, model)

    def _mapped(self, path: Path, model: LayerModel) -> Tensor:
        assert self.rows is not None
        shape = (len(self.rows), self.rows.max_length, self.plan.config.hidden_size)
        size, dtype = shape[0] * shape[1] * shape[2], next(model.layer.parameters()).dtype
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).reshape(shape)

    def _new_hidden(self, kind: str, place: int, model: LayerModel) -> Tensor:
        path = temporary_for(self._work / f"{kind}-{place:05d}.bin")
        path.unlink(missing_ok=True)
        return self._mapped(path, model)

    def _keep_hidden(self, kind: str, place: int) -> None:
        path = self._work / f"{kind}-{place:05d}.bin"
        commit_file(temporary_for(path), path)

    def _forget(self, name: str) -> None:
        (self._work / name).unlink(missing_ok=True)

    # -- files -----------------------------------------------------------------------------------------

    def _write(self, place: int, number: int, smaller: dict[str, Tensor]) -> None:
        """The layer's shard: what is smaller, and everything else as it was."""
        tensors = {}
        for name, value in smaller.items():
            for key, part in self.plan.on_disk(name, value):
                tensors[f"model.layers.{place}.{key}"] = part.contiguous()
        exchanged = any(name.startswith("mlp.experts.") for name in smaller)
        for inside, name in self.reader.names(number).items():
            experts = exchanged and inside.startswith("mlp.experts.")
            if not experts and inside not in smaller:
                kept = self.reader.tensor(name).clone()  # each that is mapped would map its whole file
                tensors[f"model.layers.{place}.{self.plan.unchanged(inside, name)}"] = kept
        self._save(self._shard(place), tensors)

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        temporary = temporary_for(path)
        save_file(tensors, temporary, metadata={"format": "pt"})
        commit_file(temporary, path)

    def _finish(self, layers: list[int], records: list[CompressedLayer]) -> CompressedManifest:
        """What belongs to no layer, the config, the index, the tokenizer; and then the manifest."""
        folder = self.folder.path
        for count, name in enumerate(self.plan.outside(self.reader.outside())):
            path = folder / f"outside-{count:05d}.safetensors"
            whole = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
            if not path.exists():
                self._save(path, {whole: self.reader.tensor(name)})
        files = sorted([*folder.glob("layer-*.safetensors"), *folder.glob("outside-*.safetensors")])
        index, total = {}, 0
        for path in files:
            for name, size in _tensor_sizes(path):
                index[name], total = path.name, total + size
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
        write_json(folder / "config.json", written_config(self.plan, layers, records))
        copy_beside(self.plan.source, folder)
        for path in self._work.glob("*.bin"):  # the records stay until all is said
            path.unlink()
        manifest = CompressedManifest(
            fingerprint=self.folder.fingerprint,
            model=self.plan.name,
            layers=records,
            bytes=total,
            weights={path.name: sha256_file(path) for path in files},
        ).write(folder)
        shutil.rmtree(self._work)
        return manifest


def return_freed_memory() -> None:
    """Give the system back what has been freed: glibc keeps it, and a layer would seem to take what two did."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of a file's tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_tensor(name)
            yield name, tensor.numel() * tensor.element_size()
