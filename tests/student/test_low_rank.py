"""A linear layer and its LoRA as one product: the same figures as PEFT's own."""

from types import SimpleNamespace

import pytest

from sclite.student import low_rank
from sclite.student.load import load_student
from tests.tiny import tiny_llama
from tests.train.test_sft import config_of

RELATIVE = 1e-4


def adapted(**shape):
    """A model of one linear layer with a LoRA whose factors are both not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    bias = shape.pop("bias", False)
    model = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=bias))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **shape))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def layer_of(model):
    return model.base_model.model[0]


def slopes(model, rows):
    """(output, slope of the input, slopes of the factors) for a loss that weighs every output differently."""
    import torch

    torch.manual_seed(1)
    x = torch.randn(3, rows, 48, requires_grad=True)
    out = model(x)
    loss = (out * torch.randn(out.shape)).sum()
    factors = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(loss, [x, *factors])]


def close(one, other):
    return all(bool((a - b).abs().max() <= RELATIVE * b.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.fixture
def counted(monkeypatch):
    """How often the one product was used."""
    calls = SimpleNamespace(count=0)
    made = low_rank._joined()

    class Counted:
        @staticmethod
        def apply(*given):
            calls.count += 1
            return made.apply(*given)

    monkeypatch.setattr(low_rank, "_joined", lambda: Counted)
    return calls


def test_outputs_and_slopes_are_those_of_peft(counted):
    model = adapted()
    usual = slopes(model, 70)
    low_rank.join_products(model)
    assert close(slopes(model, 70), usual)
    assert counted.count == 1


def test_a_short_input_goes_the_usual_way(counted):
    model = adapted()
    low_rank.join_products(model)
    slopes(model, 5)
    assert counted.count == 0


@pytest.mark.parametrize(
    "shape", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "bias": True}, {"bias": True}]
)
def test_what_is_no_plain_lora_goes_the_usual_way(counted, shape):
    model = adapted(**shape).train()
    low_rank.join_products(model)
    slopes(model, 70)
    assert counted.count == 0


def test_without_its_adapter_and_merged_the_layer_says_what_it_should(counted):
    import torch

    model, x = adapted(), torch.randn(70, 48)
    low_rank.join_products(model)
    with torch.no_grad():
        whole = model(x)
        with model.disable_adapter():
            bare = model(x)
        assert counted.count == 1
        assert torch.equal(bare, layer_of(model).base_layer(x))
        assert not torch.allclose(bare, whole)
        layer_of(model).merge()
        assert torch.allclose(model(x), whole, atol=1e-5)
    assert counted.count == 1


def test_the_student_that_is_trained_on_a_cpu_has_it_in_all_its_layers(tmp_path, counted):
    import torch

    config = config_of(tiny_llama(tmp_path / "model"))
    model, _ = load_student(config.student, config.sft, train=True)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 70, dtype=torch.long))
    assert counted.count == 7 * model.config.num_hidden_layers
