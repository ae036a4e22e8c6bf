"""RetNet-HRM beside its definition: the forms of retention, documents and padding, decoding, memory, halting."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.models import keeps_documents_apart, require_causal
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.modeling import RetNetHRMForCausalLM

V = 61
PLAIN = {}
CYCLES = {"H_cycles": 2, "L_cycles": 3}
TITANS = {"H_cycles": 2, "L_cycles": 2, "memory": True, "segments": 2, "halting": True}
KINDS = pytest.mark.parametrize("kind", [PLAIN, CYCLES, TITANS], ids=["retnet", "hrm", "titans"])


def model(kind, dtype=torch.float64, seed=0, **keys):
    """A small model whose weights are large enough that everything in it shows."""
    torch.manual_seed(seed)
    config = RetNetHRMConfig(**{
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "chunk_size": 8, "memory_heads": 2, "memory_chunk": 4, "eos_token_id": None, **kind, **keys,
    })  # fmt: skip
    made = RetNetHRMForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.12)
    if made.model.halting is not None:
        torch.nn.init.normal_(made.model.halting.weight, std=0.5)
        torch.nn.init.zeros_(made.model.halting.bias)
    return made.to(dtype)


def tokens(rows, length, seed=1):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- the definition, one row at a time, with nothing of the package but the weights ---------------------------------


def _rms(x, weight=None, eps=1e-6):
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def _turned(x):
    """`[T, H, K]` with neighbours as complex numbers, turned by position · 10000^(−linspace)."""
    length, _, width = x.shape
    theta = 10000.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(length)[:, None] * theta)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.reshape(length, -1, width // 2, 2)) * turn).flatten(-2)


def _retention(module, x):
    length, heads = len(x), module.heads
    q = _turned((x @ module.q_proj.weight.T).reshape(length, heads, -1))
    k = _turned((x @ module.k_proj.weight.T).reshape(length, heads, -1)) / math.sqrt(module.head_k_dim)
    v = (x @ module.v_proj.weight.T).reshape(length, heads, -1)
    out = torch.zeros_like(v)
    for head in range(heads):
        gamma = 1.0 - 2.0 ** (-5 - head)
        for n in range(length):
            for m in range(n + 1):
                out[n, head] += gamma ** (n - m) * (q[n, head] @ k[m, head]) * v[m, head]
    gate = x @ module.g_proj.weight.T
    return (gate * gate.sigmoid() * _rms(out).flatten(-2)) @ module.o_proj.weight.T


def _stack(stack, u, halted):
    for layer in stack.layers:
        new = u + _retention(layer.retention, _rms(u, layer.retention_norm.weight))
        x, mlp = _rms(new, layer.mlp_norm.weight), layer.mlp
        gate = x @ mlp.gate_proj.weight.T
        new = new + (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        u = torch.where(halted, u, new)
    return _rms(u, stack.norm.weight)


def _memory(memory, u):
    out = torch.zeros_like(u)
    heads, width, size = memory.heads, u.shape[1] // memory.heads, memory.chunk
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = ((u @ p.weight.T)[:, part] for p in (memory.q_proj, memory.k_proj, memory.v_proj))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        rates = (u @ memory.rates.weight.T + memory.rates.bias).sigmoid().reshape(-1, 3, heads)[..., head]
        held, step = torch.zeros(width, width, dtype=u.dtype), torch.zeros(width, width, dtype=u.dtype)
        for start in range(0, len(u), size):
            now = slice(start, start + size)
            out[now, part] = q[now] @ held
            if start + size <= len(u):
                theta, alpha, eta = rates[now].unbind(-1)
                gradient = k[now].T @ torch.diag(theta) @ (k[now] @ held - v[now])
                step = eta.mean() * step - (2.0 / size) * gradient
                held = (1 - alpha.mean()) * held + step
    return u + ((u @ memory.g_proj.weight.T).sigmoid() * out) @ memory.o_proj.weight.T


@torch.no_grad()
def defined(model, ids):
    """Logits `[T, V]` of one document."""
    body, config = model.model, model.config
    x = body.embed_tokens.weight[ids] * config.embedding_scale
    high, low, halted = x, torch.zeros_like(x), torch.zeros(len(ids), 1, dtype=torch.bool)
    for segment in range(config.segments):
        for h in range(config.H_cycles):
            for _ in range(config.L_cycles):
                low = torch.where(halted, low, _stack(body.low, low + high + x, halted))
            u = high + low
            if body.memory is not None and h == config.H_cycles - 1:
                u = torch.where(halted, u, _memory(body.memory, u))
            high = torch.where(halted, high, _stack(body.high, u, halted))
        if body.halting is not None and segment + 1 < config.segments:
            halted = halted | ((high @ body.halting.weight + body.halting.bias) > 0)[:, None]
    return high @ model.lm_head.weight.T


# -- the forms ------------------------------------------------------------------------------------------------------


@KINDS
def test_all_forms_are_the_definition(kind):
    made, ids = model(kind), tokens(2, 29)
    wanted = torch.stack([defined(made, row) for row in ids])
    with torch.no_grad():
        found = {}
        for name, size in {"chunkwise": 8, "parallel": 29, "recurrent": 1, "one tail": 20}.items():
            made.config.chunk_size = size
            found[name] = made(ids, use_cache=False).logits
        made.config.chunk_size = 8
        for name, cuts in {"carried": [0, 11, 12, 20, 29], "token by token": list(range(30))}.items():
            cache, parts = None, []
            for start, end in pairwise(cuts):
                out = made(ids[:, start:end], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            found[name] = torch.cat(parts, dim=1)
    for name, logits in found.items():
        assert float((logits - wanted).abs().max()) < 1e-12, name


@KINDS
def test_nothing_of_the_future_leaks(kind):
    made, ids = model(kind), tokens(1, 24)
    other = ids.clone()
    other[0, 13] = (other[0, 13] + 1) % V
    with torch.no_grad():
        one, two = made(ids, use_cache=False).logits, made(other, use_cache=False).logits
    assert torch.equal(one[:, :13], two[:, :13])
    assert not torch.equal(one[:, 13:], two[:, 13:])
    require_causal(made, "student")


@KINDS
def test_documents_of_a_packed_row_are_each_alone(kind):
    made = model(kind)
    lengths = (5, 8, 1, 10)  # a border inside a chunk, on one, and a document of one token
    ids = tokens(2, sum(lengths))
    places = torch.cat([torch.arange(n) for n in lengths]).repeat(2, 1)
    with torch.no_grad():
        packed = made(ids, position_ids=places, use_cache=False).logits
        cached = made(ids, position_ids=places, use_cache=True).logits
    alone = torch.cat([torch.stack([defined(made, row) for row in part]) for part in ids.split(lengths, dim=1)], dim=1)
    assert float((packed - alone).abs().max()) < 1e-12
    assert float((cached - alone).abs().max()) < 1e-12
    assert keeps_documents_apart(made.float())


@KINDS
def test_a_document_that_begins_later_forgets_the_carried_state(kind):
    made, ids = model(kind), tokens(1, 20)
    places = torch.cat([torch.arange(9, 12), torch.arange(8)]).unsqueeze(0)
    with torch.no_grad():
        cache = made(ids[:, :9], use_cache=True).past_key_values
        rest = made(ids[:, 9:], position_ids=places, past_key_values=cache).logits[0]
    assert float((rest[3:] - defined(made, ids[0, 12:])).abs().max()) < 1e-12
    assert float((rest[:3] - defined(made, ids[0, :12])[9:]).abs().max()) < 1e-12


@KINDS
def test_padding_changes_nothing(kind):
    made, ids = model(kind), tokens(2, 17)
    wanted = torch.stack([defined(made, row) for row in ids])
    for left, right in ((5, 0), (0, 6), (9, 3)):
        pad = [torch.full((2, n), 7) for n in (left, right)]
        row = torch.cat([pad[0], ids, pad[1]], dim=1)
        mask = torch.zeros_like(row)
        mask[:, left : left + 17] = 1
        with torch.no_grad():
            out = made(row, attention_mask=mask, use_cache=True)
            rest = made(ids[:, :3], attention_mask=torch.cat([mask, torch.ones(2, 3)], dim=1),
                        past_key_values=out.past_key_values).logits  # fmt: skip
        assert float((out.logits[:, left : left + 17] - wanted).abs().max()) < 1e-12
        longer = torch.stack([defined(made, torch.cat([row, row[:3]])) for row in ids])
        assert float((rest - longer[:, 17:]).abs().max()) < 1e-12


@KINDS
def test_padding_behind_a_row_whose_positions_are_0_begins_no_document(kind):
    made, ids = model(kind), tokens(1, 9)
    row, mask = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1), torch.ones(1, 12)
    mask[:, 9:] = 0
    places = torch.cat([torch.arange(9), torch.zeros(3, dtype=torch.long)]).unsqueeze(0)
    with torch.no_grad():
        cache = made(row, attention_mask=mask, position_ids=places, use_cache=True).past_key_values
        rest = made(ids[:, :4], position_ids=torch.arange(9, 13).unsqueeze(0), past_key_values=cache).logits
    wanted = defined(made, torch.cat([ids[0], ids[0, :4]]))[9:]
    assert float((rest[0] - wanted).abs().max()) < 1e-12


@KINDS
def test_a_mask_of_the_new_tokens_alone_continues_the_text(kind):
    made, ids = model(kind), tokens(1, 15)
    with torch.no_grad():
        cache = made(ids[:, :10], use_cache=True).past_key_values
        rest = made(ids[:, 10:], attention_mask=torch.ones(1, 5), past_key_values=cache).logits
    assert float((rest[0] - defined(made, ids[0])[10:]).abs().max()) < 1e-12


def test_positions_and_masks_mean_what_generate_gives_them():
    made, ids = model(CYCLES), tokens(1, 12)
    mask = torch.ones(1, 16)
    mask[:, :4] = 0
    places = (mask.long().cumsum(-1) - 1).clamp_min(0)
    row = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        found = made(row, attention_mask=mask, position_ids=places, use_cache=False).logits
    assert float((found[0, 4:] - defined(made, ids[0])).abs().max()) < 1e-12


# -- decoding -------------------------------------------------------------------------------------------------------


@KINDS
def test_generation_follows_the_full_forward_in_float32(kind):
    made, ids = model(kind, torch.float32), tokens(2, 9)
    out = made.generate(
        ids, max_new_tokens=20, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        whole = made(out.sequences, use_cache=False).logits
    steps = torch.stack(out.logits, dim=1)
    assert float((steps - whole[:, 8:-1]).abs().max()) < 1e-5 * max(1.0, float(whole.abs().max()))


@KINDS
def test_a_padded_batch_generates_what_each_prompt_does_alone(kind):
    made = model(kind, torch.float32)
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 11, 7)]
    longest = max(map(len, prompts))
    row = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    batch = made.generate(row, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for number, prompt in enumerate(prompts):
        alone = made.generate(prompt.unsqueeze(0), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(batch[number, longest:], alone[0, len(prompt) :])


def test_narrow_weights_forget_as_wide_ones_do():
    """In bfloat16 γ of the fifth head would be 1: decoding would never forget, and the forms would part."""
    made = model({}, torch.float32, num_attention_heads=8, hidden_size=64, chunk_size=64)
    ids = tokens(1, 700)
    found = []
    with torch.no_grad():
        wanted = made(ids, use_cache=False).logits[:, -1]
        for whole in (True, False):
            narrow = copy.deepcopy(made).bfloat16()
            cache = None if whole else narrow(ids[:, :1], use_cache=True).past_key_values
            for place in range(1, 700 if not whole else 1):
                logits = narrow(ids[:, place : place + 1], past_key_values=cache).logits
            logits = narrow(ids, use_cache=False).logits if whole else logits
            found.append(float((logits[:, -1].float() - wanted).abs().max() / wanted.abs().max()))
    assert found[1] < 2 * found[0] + 0.01, found


@pytest.mark.parametrize("name", ["halting", "rates"])
def test_rates_and_halting_are_not_rounded_by_autocast(name):
    made = model(TITANS, torch.float32)
    module = made.model.halting if name == "halting" else made.model.memory.rates
    x = torch.randn(2, 5, 32)
    wanted = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert name == "rates" or torch.equal(module(x), wanted)
    seen = []
    if name == "rates":
        module.register_forward_hook(lambda m, given, out: seen.append((given[0], out)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made(tokens(1, 9), use_cache=False)
        assert all(torch.equal(out, module(given)) for given, out in seen[:1])


def test_prompts_are_read_in_parts():
    made, ids = model(CYCLES, torch.float32), tokens(1, 11)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **settings), made.generate(ids, prefill_chunk_size=4, **settings))


def test_beams_are_those_of_a_model_without_a_cache():
    made, ids = model(CYCLES, torch.float64), tokens(2, 6)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(ids, **settings), made.generate(ids, use_cache=False, **settings))


@KINDS
def test_a_state_is_as_large_after_many_tokens_as_after_one(kind):
    made = model(kind, torch.float32)
    sizes = []
    with torch.no_grad():
        for length in (1, 16, 300):
            cache = made(tokens(1, length), use_cache=True).past_key_values
            sizes.append(cache.nbytes())
            assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_a_state_cannot_be_cropped_and_the_message_says_so():
    with pytest.raises(NotImplementedError, match="recurrent state"):
        model(PLAIN)(tokens(1, 4), use_cache=True).past_key_values.crop(2)


# -- as a model of transformers -------------------------------------------------------------------------------------


@KINDS
def test_saved_and_loaded_it_is_the_same_model(kind, tmp_path):
    made, ids = model(kind, torch.float32), tokens(1, 12)
    made.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, again.eval()(ids).logits)


@KINDS
def test_activation_checkpointing_gives_the_same_gradients(kind):
    ids, found = tokens(2, 20), []
    for checkpointing in (False, True):
        made = model(kind).train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    for name, grad in found[0].items():
        wanted = found[1][name]
        assert (grad is None) == (wanted is None), name
        if grad is not None:
            torch.testing.assert_close(grad, wanted, msg=name)


def test_states_are_not_carried_where_activations_are_computed_twice():
    made, ids = model(TITANS).train(), tokens(2, 10)
    made.gradient_checkpointing_enable({"use_reentrant": False})
    out = made(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.past_key_values is None
    assert all(parameter.grad is not None for parameter in made.parameters())


@KINDS
def test_every_parameter_has_a_gradient(kind):
    made, ids = model(kind).train(), tokens(2, 20)
    logits = made(ids, labels=ids)
    halting = made.halting_logits(made.model(ids).last_hidden_state)
    (logits.loss + (0.0 if halting is None else halting.mean())).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0.0, name


@pytest.mark.parametrize("kind", [PLAIN, CYCLES, {"memory": True}], ids=["retnet", "hrm", "memory"])
def test_it_compiles_into_one_graph(kind):
    made, ids = model(kind, torch.float32).train(), tokens(2, 20)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    # How many chunks a memory has in a row of several documents is known from the row alone.
    places = None if "memory" in kind else torch.cat([torch.arange(8), torch.arange(12)]).repeat(2, 1)
    found, wanted = (f(ids, position_ids=places, use_cache=False).logits for f in (compiled, made))
    torch.testing.assert_close(found, wanted)


def test_the_gradient_goes_through_the_last_cycles_alone():
    """z_L's first cycles are made without a gradient: with one trained cycle of three the others are constants."""
    made = model({"H_cycles": 1, "L_cycles": 3, "L_bp_cycles": [1]}).train()
    ids, counted = tokens(1, 6), []
    made.model.low.register_forward_hook(lambda module, given, out: counted.append(out.requires_grad))
    made(ids)
    assert counted == [False, False, True]
    both = model(CYCLES).train()
    counted.clear()
    both.model.low.register_forward_hook(lambda module, given, out: counted.append(out.requires_grad))
    both(ids)
    assert counted == [False, False, True, False, True, True]


def test_segments_are_trained_each_and_their_states_detached():
    made, ids = model({**CYCLES, "segments": 2}).train(), tokens(2, 12)
    outputs = made.model(ids)
    first, second = outputs.segments
    assert torch.equal(second, outputs.last_hidden_state)
    losses = [made.loss_function(made.lm_head(z), ids, vocab_size=V) for z in (first, second)]
    torch.testing.assert_close(made(ids, labels=ids).loss, (losses[0] + losses[1]) / 2)
    # What the second segment starts from is the first one's end, without its gradient.
    (grad,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
    assert grad is None


def test_halting_saves_segments_and_generation_knows_which():
    made, ids = model(TITANS), tokens(2, 30)
    with torch.no_grad():
        used = made.model(ids, use_cache=False).segments_used
        assert set(used.unique().tolist()) == {1, 2}
        made.model.halting.bias.fill_(1e3)  # everything halts after the first segment
        everything = made(ids, use_cache=False).logits
        made.config.segments, made.config.halting = 1, False
        once = made(ids, use_cache=False).logits
    torch.testing.assert_close(everything, once)


def test_a_halted_step_computes_no_products_but_keys_and_values():
    made, ids = model(TITANS, torch.float32), tokens(1, 6)
    made.model.halting.bias.data.fill_(1e3)
    asked = []
    for layer in [*made.model.high.layers, *made.model.low.layers]:
        layer.mlp.register_forward_hook(lambda *a: asked.append("mlp"))
        layer.retention.k_proj.register_forward_hook(lambda *a: asked.append("keys"))
    with torch.no_grad():
        cache = made(ids, use_cache=True).past_key_values
        asked.clear()
        made(ids[:, :1], past_key_values=cache)
    applications = 2 * 2 * (2 + 1) * 2  # segments, H, L + 1 stacks, layers of each
    assert asked.count("keys") == applications
    assert asked.count("mlp") == applications // 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"num_hidden_layers": 3, "L_cycles": 1}, "two stacks"),
        ({"halting": True}, "segments is 1"),
        ({"memory": True, "memory_heads": 5}, "memory_heads"),
        ({"L_cycles": 2, "L_bp_cycles": [0]}, "L_bp_cycles"),
        ({"segments": 0}, "at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"value_expansion": 0}, "value_expansion is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(keys, words):
    with pytest.raises(Exception, match=words):
        RetNetHRMConfig(**{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, **keys})


def test_transformers_knows_it_by_its_model_type():
    config = AutoConfig.for_model("retnet_hrm", hidden_size=32, num_attention_heads=2)
    assert isinstance(config, RetNetHRMConfig)
    assert copy.deepcopy(config).to_dict() == config.to_dict()
