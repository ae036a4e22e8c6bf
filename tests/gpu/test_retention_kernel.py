"""flash-linear-attention's retention kernel beside our own retention, on a GPU."""

import importlib.util

import pytest
import torch

from limbeck.students.retnet_hrm import gpu
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.modeling import RetNetHRMForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]


def _model() -> RetNetHRMForCausalLM:
    torch.manual_seed(0)
    config = RetNetHRMConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        H_cycles=2, L_cycles=2,
    )  # fmt: skip
    return RetNetHRMForCausalLM(config).cuda().train()


@pytest.mark.parametrize("documents", [False, True])
def test_the_kernel_gives_the_same_numbers(monkeypatch, documents):
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = torch.randint(0, 128, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    places = torch.arange(300).repeat(2, 1)
    if documents:
        places[0] = torch.cat([torch.arange(70), torch.arange(230)])
        places[1] = torch.cat([torch.arange(200), torch.arange(1), torch.arange(99)])
    asked = []
    real = gpu._kernel()
    monkeypatch.setattr(gpu, "_kernel", lambda: lambda *a, **k: asked.append(1) or real(*a, **k))
    found = []
    for serves in (True, False):
        monkeypatch.setattr("limbeck.students.retnet_hrm.modeling.kernel_serves", lambda x, serves=serves: serves)
        model = _model()
        loss = model(ids, position_ids=places.cuda(), labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert len(asked) == 6  # H·L + H applications of one layer each, and none the second time
    (loss, grads), (wanted, reference) = found
    torch.testing.assert_close(loss, wanted, rtol=2e-3, atol=2e-3)  # the kernel multiplies in TF32
    for name, grad in grads.items():
        scale = float(reference[name].abs().max()) + 1e-12
        assert float((grad - reference[name]).abs().max()) <= 2e-2 * scale, name


def test_generation_continues_what_the_kernel_read():
    model = _model().eval()
    ids = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        whole = model(text, use_cache=False).logits
    torch.testing.assert_close(whole[:, 49:-1].argmax(-1), text[:, 50:])
