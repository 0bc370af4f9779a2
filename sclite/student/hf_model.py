"""A transformers model as a student: batched generation with the model that is trained."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sclite.signature import digest
from sclite.student.base import Reply, Request, Student
from sclite.student.cuda_memory import free_memory, is_out_of_memory
from sclite.student.log_probs import autocast
from sclite.student.tokenization import end_id, piece_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


class HFModel(Student):
    """A transformers model as a student that does not score. Sampling is seeded per batch of `batch_size` requests."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "Tokenizer", batch_size: int = 64):
        from transformers import GenerationConfig

        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        # llama.cpp, in chat and evaluation, ignores the checkpoint's settings: Qwen2.5 has a repetition penalty
        model.generation_config = GenerationConfig()

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Generate in batches with one temperature and set of stop strings, halved for good if GPU memory runs out."""
        import torch

        start, tokenizer = 0, self.tokenizer
        ends = list({end_id(tokenizer), tokenizer.eos_token_id} - {None})
        while start < len(requests):
            batch = requests[start : start + self.batch_size]
            first, prompts = batch[0], []
            for request in batch:
                pieces = piece_ids(tokenizer, request.pieces)
                prompts.append([*prompt_ids(tokenizer, request.messages), *chain(*pieces)])
            settings: dict[str, Any] = {"do_sample": first.temperature > 0}
            if first.temperature > 0:
                settings |= {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
                torch.manual_seed(int(digest([[r.seed for r in batch], prompts[0]]), 16) % 2**63)
            if first.stop:
                settings |= {"stop_strings": list(first.stop), "tokenizer": tokenizer}
            inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
            try:
                with torch.inference_mode(), autocast(self.model):
                    out = self.model.generate(  # type: ignore[operator]  # torch.nn.Module hides its type
                        **inputs,
                        max_new_tokens=max(request.max_tokens for request in batch),
                        eos_token_id=ends,
                        pad_token_id=tokenizer.pad_token_id,
                        **settings,
                    )
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = len(batch) // 2
                free_memory()
                continue
            new_rows = out[:, inputs["input_ids"].shape[1] :].tolist()
            for index, (request, prompt, row) in enumerate(zip(batch, prompts, new_rows, strict=True), start):
                stop_at = next((i for i, token in enumerate(row) if token in ends), None)
                new = row[:stop_at]
                text = str(tokenizer.decode(new, skip_special_tokens=True))
                finish = "length" if stop_at is None else "stop"
                for stop in request.stop:
                    if stop in text:
                        text, finish = text[: text.index(stop) + len(stop)], "stop"
                yield Reply(index, text, len(new), len(prompt), finish, prefill_tokens=len(prompt))
            start += len(batch)
