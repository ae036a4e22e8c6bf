"""The file of a ternary checkpoint's weights: a name that nothing but limbeck looks for.

The one idea: what does not know limbeck would take the shadow weights of a ternary student for its weights, or leave
those of a packed one random, with no more than a warning. So they lie in `ternary.safetensors`: whoever looks for
`model.safetensors` finds none and says so, and the quantiser, which runs before files are looked for, names the file.
"""

import json
from pathlib import Path

from limbeck.storage import atomic_write_text, read_json, write_json

KEY = "weights_file"
_STEM, _OWN = "model", "ternary"
_README = """This is a ternary student. Its weights lie in `ternary.safetensors`, which transformers finds after
`import limbeck`:

    import limbeck
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("FOLDER")

For programs without limbeck: `limbeck export FOLDER --format hf` (a plain folder) or `--format gguf` (llama.cpp).
"""


def rename_weights(folder: Path) -> None:
    """Give the weights in a ternary model's folder their own name, and write it into its config.json."""
    index = folder / f"{_STEM}.safetensors.index.json"
    renamed: dict[str, str] = {}
    for path in sorted(folder.glob(f"{_STEM}*.safetensors")):
        renamed[path.name] = _OWN + path.name.removeprefix(_STEM)
        path.rename(folder / renamed[path.name])
    if index.is_file():
        found = read_json(index)
        found["weight_map"] = {name: renamed[file] for name, file in found["weight_map"].items()}
        write_json(folder / f"{_OWN}.safetensors.index.json", found)
        index.unlink()
    if renamed:
        config = read_json(folder / "config.json")
        sharded = (folder / f"{_OWN}.safetensors.index.json").is_file()
        config["quantization_config"][KEY] = f"{_OWN}.safetensors" + (".index.json" if sharded else "")
        atomic_write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        atomic_write_text(folder / "README.md", _README)
