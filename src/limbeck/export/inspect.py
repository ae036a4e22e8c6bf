"""What is in a GGUF file: tensors, types, sizes, bits a weight."""

from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.export.blocks import teach_gguf_q2
from limbeck.export.bounds import check_gguf


def inspect_gguf(path: Path) -> dict[str, Any]:
    """The file's architecture, metadata and tensors.

    Raises:
        LimbeckError: it is missing or no GGUF file.
    """
    import gguf

    teach_gguf_q2()
    if not path.is_file():
        raise LimbeckError(f"{path} does not exist. Name a .gguf file.")
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise LimbeckError(f"{path} is no GGUF file that can be read ({error}).") from None
    tensors = [
        {
            "name": tensor.name,
            "type": tensor.tensor_type.name.lower(),
            "shape": [int(size) for size in reversed(tensor.shape.tolist())],
            "bytes": int(tensor.n_bytes),
            "bits_per_weight": 8.0 * int(tensor.n_bytes) / max(int(tensor.n_elements), 1),
        }
        for tensor in reader.tensors
    ]
    metadata = {name: _value(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "architecture": metadata.get("general.architecture"),
        "weights": weights,
        "bits_per_weight": 8.0 * sum(int(t.n_bytes) for t in reader.tensors) / max(weights, 1),
        "metadata": metadata,
        "tensors": tensors,
    }


def _value(field: Any) -> Any:
    """A field's value; of a long list its length alone."""
    value = field.contents()
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries"
    return value if not isinstance(value, str) or len(value) <= 200 else f"{len(value)} characters"


def describe(found: dict[str, Any]) -> str:
    """The same as text: a line a tensor, then totals."""
    width = max((len(tensor["name"]) for tensor in found["tensors"]), default=4)
    lines = [f"{key} = {value}" for key, value in found["metadata"].items()]
    lines.append("")
    for tensor in found["tensors"]:
        shape = " × ".join(str(size) for size in tensor["shape"])
        lines.append(
            f"{tensor['name']:<{width}}  {tensor['type']:<6} {shape:>20}  {tensor['bytes']:>12,} bytes  "
            f"{tensor['bits_per_weight']:.4g} bits/weight"
        )
    lines.append(
        f"\n{len(found['tensors'])} tensors, {found['weights']:,} weights, {found['bytes']:,} bytes, "
        f"{found['bits_per_weight']:.3f} bits/weight"
    )
    return "\n".join(lines)
