"""`limbeck export`: from a run's folder to a file that other programs read, with proof if wanted."""

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.config.recipe import ExportConfig
from limbeck.console import say
from limbeck.errors import ConfigError, LimbeckError
from limbeck.export.folder import refuse_foreign_folder
from limbeck.export.source import ExportSource, model_folder, ternary_settings
from limbeck.registration import OWN_TYPES
from limbeck.storage import atomic_write_text, folder_lock, leftovers_of, plain_disk_errors, read_json


def export_student(section: ExportConfig, run: Path, name: str, *, verify: bool = False) -> dict[str, Any]:
    """Write what the section asks for; returns paths, sizes and, with `verify`, the comparison.

    Args:
        section: format, types and where the file goes.
        run: a run's folder, a student's or a model's.
        name: what a GGUF file says it is, and is called where no name is given.
        verify: compare what was written with the student.

    Raises:
        LimbeckError: there is no model, it can not be expressed in the format, or the file is not exactly it.
    """
    folder = model_folder(run)
    require_group(section.group_size, ternary_settings(folder).get("group_size"))
    before = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {"model": str(folder), "checkpoint_mb": before / 1e6}
    if section.format == "packed":
        return {**result, **_packed(section, run, folder, verify)}
    if section.format == "hf":
        return {**result, **_plain(section, run, folder)}
    return {**result, **_gguf(section, run, folder, name, verify)}


def next_steps(format: str, output: str, name: str) -> list[str]:  # noqa: A002 (the key's name)
    """What to type to use an exported model, line by line."""
    modelfile = shlex.quote(str(Path(output).with_suffix(".Modelfile")))
    loads = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({output!r})"
    own_type = format != "gguf" and read_json(Path(output) / "config.json").get("model_type") in OWN_TYPES
    output, tag = shlex.quote(output), re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")
    own = f"limbeck generate {output} --prompt 'Once upon a time'"
    if format == "gguf":
        return [
            f"llama-cli -m {output} -p 'Once upon a time' -n 64",
            f"llama-server -m {output} --port 8080",
            f"ollama create {tag} -f {modelfile} && ollama run {tag}",
            f"limbeck inspect {output}",
        ]
    if format == "packed" or own_type:
        return [own, f"python -c {shlex.quote(f'import limbeck; {loads}')}"]
    return [own, f"vllm serve {output}", f"python -c {shlex.quote(loads)}"]


def _plain(section: ExportConfig, run: Path, folder: Path) -> dict[str, Any]:
    from limbeck.export.plain import difference, export_plain
    from limbeck.export.verify import held_out_rows

    require_precision(section.rest)
    source = ExportSource.open(folder)
    with _own_folder(section, run, folder) as target:
        size = export_plain(source, target, section.rest)
    say(f"plain checkpoint in {target}")
    rows = held_out_rows(run, section.verify_tokens)
    if rows is None:
        say(f"no held-out rows beside {run} (a data/ folder), so the difference from the student is not measured")
    measured = {} if rows is None else difference(source, target, rows)
    return {"output": str(target), "hf_mb": size / 1e6, **measured}


def _default_output(run: Path, folder: Path, name: str) -> Path:
    return (run if run != folder else folder.parent) / "export" / name


@contextlib.contextmanager
def _own(target: Path) -> Iterator[None]:
    """Be the only one who writes `target`, and say in one line when the disk will not have it."""
    with plain_disk_errors(target), folder_lock(target.parent, f".{target.name}.lock"):
        for left in leftovers_of(target):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


@contextlib.contextmanager
def _own_folder(section: ExportConfig, run: Path, folder: Path) -> Iterator[Path]:
    """The folder that the section's format is written to, for this process alone."""
    target = section.output or _default_output(run, folder, section.format)
    refuse_foreign_folder(target, section.format)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _own(target):
        yield target


def require_precision(rest: str) -> None:
    """Refuse a precision in which plain weights are not written.

    Raises:
        ConfigError: names those that there are.
    """
    from limbeck.export.plain import DTYPES

    if rest not in DTYPES:
        raise ConfigError(f"--rest is {rest} and --format hf writes {', '.join(DTYPES)}; choose one of them.")


def require_group(wanted: int | None, trained: int | str | None) -> None:
    """Refuse other groups than those of training.

    Raises:
        ConfigError: names both.
    """
    if wanted is not None and wanted != trained:
        raise ConfigError(
            f"--group-size is {wanted} and the student was trained with groups of {trained}. Leave it out, or train "
            "with student.ternary.group_size."
        )


def _packed(section: ExportConfig, run: Path, folder: Path, verify: bool) -> dict[str, Any]:
    from limbeck.export.packed import export_packed, verify_packed

    source = ExportSource.open(folder)
    if not source.ternary:
        raise LimbeckError(f"{folder} has no ternary weights to pack. Train it with student.ternary.")
    with _own_folder(section, run, folder) as target:
        found = export_packed(source, target, section.rest)
    say(f"packed checkpoint in {target}")
    result = {
        "output": str(target),
        "packed_mb": found["bytes"] / 1e6,
        "bits_per_ternary_weight": found["bits_per_ternary_weight"],
    }
    if verify:
        result["weights_equal"] = verify_packed(source, target)
        if not result["weights_equal"]:
            raise LimbeckError(f"{target} does not hold the student's codes and scales exactly.")
    return result


def _gguf(section: ExportConfig, run: Path, folder: Path, name: str, verify: bool) -> dict[str, Any]:
    from limbeck.export.architectures.own import OWN
    from limbeck.export.gguf import GGUFExport
    from limbeck.export.verify import compare_with_llama_cpp, held_out_rows, weights_equal

    export = GGUFExport(folder, section.type, section.embedding, name)
    target = section.output or _default_output(run, folder, f"{name}.gguf")
    if target.suffix != ".gguf":
        target = target / f"{name}.gguf"
    with _own(target):
        found = export.write(target)
        atomic_write_text(target.with_suffix(".Modelfile"), f"FROM ./{target.name}\n")
    say(f"GGUF in {target}")
    result: dict[str, Any] = {"output": str(target), "type": found["type"], "gguf_mb": found["bytes"] / 1e6}
    if not verify:
        return result
    wrong = weights_equal(export, target)
    result["weights_equal"] = not wrong
    if wrong:
        some = ", ".join(wrong[:3])
        raise LimbeckError(f"{target} is not exactly the student: {len(wrong)} tensors differ ({some}).")
    rows = held_out_rows(run, section.verify_tokens)
    if export.layout.architecture.name.startswith(OWN):
        say("llama.cpp does not know this architecture; `limbeck eval` scores the file with limbeck's own engine")
    elif rows is None:
        say(f"no held-out rows beside {run} (a data/ folder), so nothing is run through llama.cpp")
    elif find_spec("llama_cpp") is None:
        say("llama-cpp-python is not installed (`pip install limbeck[verify]`), so nothing is run through llama.cpp")
    else:
        result.update(compare_with_llama_cpp(export, target, rows))
    return result
