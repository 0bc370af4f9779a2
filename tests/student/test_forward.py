"""What rows have in common is computed once, and changes neither log-probabilities nor gradients."""

import pytest
import torch

from sclite.student import forward
from sclite.student.encode import Encoded
from sclite.student.forward import hidden_states, pad, token_log_probs

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def model_of(family: str, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **more)).train()


def rows_of(common: int, lengths=(25, 7, 40)) -> list[Encoded]:
    draw = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(3, 300, (count,), generator=draw).tolist()

    begin = ids(common)
    return [
        Encoded([*begin, row + 3, *ids(n)], [0.0] * common + [1.0] * (n + 1)) for row, n in enumerate(lengths)
    ]


def computed(model, batch):
    """(log-probabilities, gradients, tokens that went through the decoder)"""
    seen = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    )
    model.zero_grad()
    log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
    hook.remove()
    (log_probs * torch.linspace(0.5, 1.5, len(log_probs))).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return log_probs.detach(), gradients, sum(rows * width for rows, width in seen)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_common_beginning_is_computed_once_and_changes_no_gradient(family, monkeypatch):
    model, batch = model_of(family), pad(rows_of(50), 0)
    log_probs, gradients, tokens = computed(model, batch)
    assert tokens == 50 + 3 * 41
    monkeypatch.setattr(forward, "WORTH_SHARING", 10**6)
    others, other_gradients, all_tokens = computed(model, batch)
    assert all_tokens == 3 * 91
    assert torch.allclose(log_probs, others, atol=1e-5)
    assert torch.allclose(gradients, other_gradients, atol=1e-4)


def test_rows_that_are_the_same_keep_a_token_of_their_own():
    model, row = model_of("llama"), rows_of(50, (30,))[0]
    log_probs, _, tokens = computed(model, pad([row, row], 0))
    assert tokens == 80 + 2
    assert torch.allclose(log_probs[:31], log_probs[31:], atol=1e-5)


@pytest.mark.parametrize(
    "case", ["too little in common", "layers computed anew", "a window over the last tokens"]
)
def test_rows_are_computed_whole_where_they_cannot_go_on_from_their_beginning(case):
    common = 5 if case == "too little in common" else 50
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = model_of("gemma2", **windows) if case == "a window over the last tokens" else model_of("llama")
    if case == "layers computed anew":
        model.gradient_checkpointing_enable()
    batch = pad(rows_of(common), 0)
    assert computed(model, batch)[2] == batch.ids.numel()
