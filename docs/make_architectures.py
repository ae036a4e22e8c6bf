"""Which architectures of transformers can be what here: docs/architectures.md, from trying each with tiny weights.

    python docs/make_architectures.py            # writes the page
    python docs/make_architectures.py llama gpt2 # prints some rows

A cell is the outcome of a real attempt: a teacher gives targets, a student takes two steps against a teacher and is
loaded again with the same logits, a ternary one does the same, and a GGUF file is written, read back and run through
our engine, and through llama.cpp where that is installed. A refusal is quoted; anything else that goes wrong ends the
script.
"""

import contextlib
import io
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.config import TernaryConfig
from limbeck.data.tokenizer import load_tokenizer
from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import architecture
from limbeck.export.architectures.own import OWN
from limbeck.export.disk import DiskTensors
from limbeck.export.gguf import GGUFExport
from limbeck.export.verify import weights_equal
from limbeck.models import keeps_documents_apart, load_causal_lm
from limbeck.serving.model import GgufModel
from limbeck.students.build import make_ternary
from limbeck.students.weights_file import rename_weights

VOCABULARY, LENGTH = 4096, 24
BASE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None}  # fmt: skip
EXPERTS = {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16,
           "norm_topk_prob": True, "decoder_sparse_step": 1}  # fmt: skip
SHAPES = {
    "llama": BASE,
    "mistral": {**BASE, "sliding_window": None},
    "qwen2": BASE,
    "qwen3": {**BASE, "head_dim": 16},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "gemma3_text": {**BASE, "head_dim": 16, "sliding_window": 16},
    "phi3": BASE,
    "smollm3": BASE,
    "olmo2": BASE,
    "granite": BASE,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64},
    "gpt_neox": {**BASE, "num_key_value_heads": None},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "retnet_hrm": {**BASE, "num_key_value_heads": None, "H_cycles": 2, "L_cycles": 2},
    "mhc_llama": {**BASE, "mhc_streams": 3},
    "compressed_qwen3_moe": {**EXPERTS, "expert_layers": [{"method": "latent", "rank": 64},
                                                          {"method": "shared_core", "rank": 8}]},
    "gpt_oss": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
}  # fmt: skip


def new_model(model_type: str):
    """A tiny random model of the architecture."""
    torch.manual_seed(0)
    keys = {key: value for key, value in SHAPES[model_type].items() if key == "pad_token_id" or value is not None}
    config = AutoConfig.for_model(
        model_type, **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **keys}
    )
    if SHAPES[model_type].get("sliding_window", 0) is None:
        config.sliding_window = None
    return AutoModelForCausalLM.from_config(config).eval()


def rows():
    """Eight rows of two documents each."""
    torch.manual_seed(1)
    border = LENGTH // 2
    documents = [0] * border + [1] * (LENGTH - border)
    ids = torch.randint(1, VOCABULARY, (8, LENGTH))
    return [{"row_id": i, "input_ids": ids[i], "doc_ids": torch.tensor(documents)} for i in range(8)]


def attention_of(model) -> str:
    """What the architecture can do with several documents in a row."""
    return "per_document" if keeps_documents_apart(model) else "packed"


def shown(attention: str) -> str:
    """A cell."""
    return "yes" if attention == "per_document" else "yes, `attention: packed`"


def as_teacher(model_type: str) -> str:
    """It gives targets for the rows."""
    from limbeck.data.dataset import PackedRows
    from limbeck.training.collate import RowCollator

    model = new_model(model_type)
    attention = attention_of(model)
    teacher = LocalTeacher(model, top_k=8, attention=attention)
    targets = teacher.targets(PackedRows.from_batch(RowCollator()(rows())))
    mass = targets.at_temperature(1.0)[0].exp().sum(-1)
    if not bool(((mass > 0) & (mass <= 1.0001)).all()):
        raise RuntimeError(f"{model_type}: targets are no probabilities")
    return shown(attention)


def _trained(model_type: str, folder: Path, ternary: bool) -> tuple[str, str]:
    model = new_model(model_type)
    attention = attention_of(model)
    chosen = make_ternary(model, TernaryConfig(group_size="row")) if ternary else []
    arguments = DistillationArguments(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, attention=attention,
    )  # fmt: skip
    teacher = LocalTeacher(
        new_model("llama" if attention == "per_document" else model_type), top_k=8, attention=attention
    )
    trainer = DistillationTrainer(model=model, args=arguments, teacher=teacher, train_dataset=rows())
    trainer.train()
    trainer.save_model(str(folder / "final"))
    load_tokenizer("tiny-python").hf.save_pretrained(folder / "final")
    again = load_causal_lm(str(folder / "final"), dtype="float32").eval()
    ids = torch.arange(1, 13).unsqueeze(0)
    with torch.no_grad():
        one, other = (m(input_ids=ids, use_cache=False).logits for m in (model.eval(), again))
    if not torch.allclose(one, other, atol=1e-5):
        raise RuntimeError(f"{model_type}: the student that was loaded again is another one")
    return attention, f"{len(chosen)} matrices"


def as_student(model_type: str) -> str:
    """Two steps against a teacher, saved and loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        return shown(_trained(model_type, Path(folder), ternary=False)[0])


def as_ternary(model_type: str) -> str:
    """The same with every matrix between hidden states ternary."""
    with tempfile.TemporaryDirectory() as folder:
        return f"yes, {_trained(model_type, Path(folder), ternary=True)[1]}"


def to_gguf(model_type: str) -> str:
    """Written, read back, and run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        model = new_model(model_type)
        architecture(model.config)
        make_ternary(model, TernaryConfig(group_size=64))
        model.save_pretrained(folder)
        rename_weights(folder)
        load_tokenizer("tiny-python").hf.save_pretrained(folder)
        export = GGUFExport(folder)
        found = export.write(Path(name) / "m.gguf")
        if wrong := weights_equal(export, Path(name) / "m.gguf"):
            raise RuntimeError(f"{model_type}: {wrong[0]} differs in the file")
        runners = {"limbeck's engine": _by_engine}
        if find_spec("llama_cpp") is not None and not export.layout.architecture.name.startswith(OWN):
            runners["llama.cpp"] = _by_llama_cpp
        for who, logits in runners.items():
            _compare(model, Path(name) / "m.gguf", who, logits)
        kind = export.layout.choose(DiskTensors(folder))
        return f"yes ({export.layout.architecture.name}, {kind})" if found else "no"


IDS = list(range(5, 25))


def _by_llama_cpp(path: Path) -> torch.Tensor:
    import numpy as np
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False)
    llama.eval(IDS)
    found = torch.from_numpy(np.array(llama.scores[: len(IDS)], dtype=np.float32))
    llama.close()
    return found


def _by_engine(path: Path) -> torch.Tensor:
    return torch.from_numpy(GgufModel(path).line().extend(IDS, every=True))


def _compare(model, path: Path, who: str, logits: Callable[[Path], torch.Tensor]) -> None:
    theirs = logits(path).log_softmax(-1)
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    if kl > 0.01:
        raise RuntimeError(f"{path}: {who} computes something else (KL {kl:.4f})")


COLUMNS: dict[str, Callable[[str], str]] = {
    "teacher": as_teacher, "student": as_student, "ternary": as_ternary, "GGUF": to_gguf,
}  # fmt: skip


def cell(model_type: str, attempt: Callable[[str], str]) -> str:
    """What came of an attempt; a refusal is its reason."""
    try:
        return attempt(model_type)
    except LimbeckError as error:
        said = str(error).removeprefix("student.ternary: ")
        return f"no: {re.split(r'[:;,.] ', said)[0].rstrip('.')}"


def row(model_type: str) -> str:
    """A line of the table."""
    return f"| {model_type} | " + " | ".join(cell(model_type, attempt) for attempt in COLUMNS.values()) + " |"


PAGE = """# Architectures

What transformers calls `model_type`, and what limbeck does with it: each cell was tried with tiny random weights by
`python docs/make_architectures.py`, which wrote this page. A teacher gives targets; a student takes steps against a
teacher and is loaded again with the same logits; a ternary one too, with every matrix between hidden states (GPT-2's
`Conv1D` among them); a GGUF file is read back equal, and limbeck's engine and llama.cpp (which refuses `limbeck-…` by
name) compute with it what torch does. Other causal LMs of transformers go the same ways: the model itself is asked
whether it is causal and keeps documents apart.

{table}

`attention: packed` is `dataset.attention: packed`: the architecture carries something from one document of a packed row
to the next, so rows are attended to as one text.
"""


def main(names: list[str]) -> None:
    """Print rows, or write the page."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):
        lines = [row(name) for name in names or SHAPES]
    head = f"| model_type | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}"
    table = "\n".join([head, *lines])
    if names:
        sys.stdout.write(table + "\n")
    else:
        (Path(__file__).parent / "architectures.md").write_text(PAGE.format(table=table))


if __name__ == "__main__":
    main(sys.argv[1:])
