"""Mixtures of experts on a GPU: experts that stay in the CPU's memory, and layers compressed on the device."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import save_model
from limbeck import DistillationArguments, DistillationTrainer, LocalTeacher
from limbeck.compression.plan import CompressionPlan
from limbeck.compression.run import Compression
from limbeck.config import ModelSource, StudentConfig
from limbeck.config.compress import CompressConfig
from limbeck.folders import StageFolder
from limbeck.models import load_causal_lm
from limbeck.students.build import build_student
from limbeck.training.offload import ExpertOffload, expert_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def moe(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES)).eval()


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_experts_elsewhere_train_as_on_the_device(kind, packed, tmp_path):
    start = save_model(moe(), tmp_path / "start")
    ternary = {"preset": "experts", "group_size": 32}
    section = StudentConfig.model_validate({"model": str(start), "ternary": ternary})
    found = {}
    for where in (None, kind):
        offload = None if where is None else ExpertOffload(where, tmp_path / "files", "cuda")
        build = build_student if offload is None else offload.build
        student = build(section, {"vocab_size": 4096}, 0)
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                output_dir=str(tmp_path / str(where)), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
                logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, seed=0, data_seed=0,
                gradient_checkpointing=True,
            ),
            teacher=LocalTeacher(moe(5), top_k=8, device="cuda"), train_dataset=packed,
        )  # fmt: skip
        trainer.offload = offload
        trainer.train()
        found[where] = {name: value.detach().cpu() for name, value in student.state_dict().items()}
        if offload is not None:
            assert all(parameter.device.type == "cpu" for parameter in expert_tensors(student).values())
            assert student.get_input_embeddings().weight.device.type == "cuda"
    for name, value in found[None].items():
        torch.testing.assert_close(found[kind][name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["latent", "core_delta", "shared_core", "prune"])
def test_layers_are_compressed_on_the_device_as_on_a_cpu(method, packed, tmp_path):
    source = save_model(moe(), tmp_path / "teacher")
    section = CompressConfig(method=method, **({"keep": 0.5} if method == "prune" else {"rank": 16}))
    models = {}
    for device in ("cpu", "cuda"):
        folder = StageFolder(tmp_path / device, "compress", {"device": device})
        plan = CompressionPlan.of(section, ModelSource(str(source)))
        Compression(plan, packed, "per_document", folder, device).run()
        models[device] = load_causal_lm(str(tmp_path / device), dtype="float32").eval()
    ids = torch.arange(40)[None] * 7 % 4096
    with torch.no_grad():
        cpu, cuda = (models[device](ids).logits for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda, cpu, rtol=0, atol=1e-3)
