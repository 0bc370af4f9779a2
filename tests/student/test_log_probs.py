"""Log-probabilities from hidden states, against the logits that transformers computes for each family."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sclite.errors import DataError
from sclite.student.log_probs import check_log_probs, hidden_states, pad, token_log_probs
from sclite.student.tokenization import TrainingSequence
from tests.toy import raises

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED = {
    "llama": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma2": {"final_logit_softcapping": 5.0, "head_dim": 16},
}


def built(family: str, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **settings)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.6)
    return model


@pytest.mark.parametrize("family", SCALED)
def test_scaled_and_capped_logits_are_those_of_transformers(family):
    model = built(family, **SCALED[family])
    ids = list(range(3, 23))
    with torch.no_grad():
        batch = pad([TrainingSequence(ids, [0.0] + [1.0] * 19)], 0)
        found, _ = token_log_probs(model, hidden_states(model, batch), batch)
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(found, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4)
    check_log_probs(model, ids)


def test_family_whose_logits_are_computed_otherwise_is_refused():
    model = built("recurrent_gemma", logits_soft_cap=2.0, head_dim=16)
    with raises(DataError, "recurrent_gemma models compute their logits"):
        check_log_probs(model, list(range(3, 23)))
