"""The bundled tutor as a LiteLLM provider, so that it is called like any other teacher."""

from typing import Any

from sclite.quickstart import tutor
from sclite.teacher.provider import import_litellm

PROVIDER = "embedded"
MODEL = f"{PROVIDER}/tutor"


def register() -> None:
    """Register `embedded/tutor` with LiteLLM; pass this to Teacher as `prepare`. Replies are free and deterministic."""
    litellm: Any = import_litellm()

    class Tutor(litellm.CustomLLM):
        async def acompletion(self, *args, messages, model, model_response, **options):
            text = tutor.reply(messages)
            asked = sum(len(message["content"].split()) for message in messages)
            model_response.model = model
            model_response.choices[0].message.content = text
            model_response.choices[0].finish_reason = "stop"
            model_response.usage = litellm.Usage(prompt_tokens=asked, completion_tokens=len(text.split()))
            return model_response

    others = [item for item in litellm.custom_provider_map if item["provider"] != PROVIDER]
    litellm.custom_provider_map = [*others, {"provider": PROVIDER, "custom_handler": Tutor()}]
    litellm.utils.custom_llm_setup()
    free = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
    litellm.register_model({MODEL: {"litellm_provider": PROVIDER, "mode": "chat", **free}})
