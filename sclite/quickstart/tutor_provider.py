"""The embedded tutor as a LiteLLM provider, so that the quickstart's teacher is reached like any other."""

from sclite.quickstart import tutor
from sclite.teacher.provider import import_litellm

PROVIDER = "embedded"
MODEL = f"{PROVIDER}/tutor"


def register() -> None:
    """Make `embedded/tutor` known to LiteLLM; give this to Teacher as `prepare`. Its replies are free and the same
    each time."""
    litellm = import_litellm()

    class Tutor(litellm.CustomLLM):
        def completion(self, *args, messages, model, model_response, **options):
            text = tutor.reply(messages)
            asked, said = sum(len(m["content"].split()) for m in messages), len(text.split())
            model_response.model = model
            model_response.choices[0].message.content = text
            model_response.choices[0].finish_reason = "stop"
            model_response.usage = litellm.Usage(
                prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said
            )
            return model_response

        async def acompletion(self, *args, **options):
            return self.completion(*args, **options)

    others = [item for item in litellm.custom_provider_map if item["provider"] != PROVIDER]
    litellm.custom_provider_map = [*others, {"provider": PROVIDER, "custom_handler": Tutor()}]
    litellm.utils.custom_llm_setup()
    free = {
        "litellm_provider": PROVIDER,
        "mode": "chat",
        "input_cost_per_token": 0.0,
        "output_cost_per_token": 0.0,
    }
    litellm.register_model({MODEL: free})
