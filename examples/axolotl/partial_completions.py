"""Axolotl's DPO trainer for completions that stop mid-answer; dpo.yaml selects it with `trainer_cls`.

TRL, which Axolotl uses, tokenizes prompt and completion jointly and appends an end token. Here each piece is tokenized
separately and nothing is appended, as in inference.
"""

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer


class Trainer(AxolotlDPOTrainer):
    """Encodes the rows of pairs.jsonl; everything else is Axolotl's."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset.map(
            encode, fn_kwargs={"tokenizer": processing_class}, remove_columns=dataset.column_names
        )


def encode(row, tokenizer):
    """The token IDs of a pair: chat, prefix pieces and completions are tokenized separately; nothing is added."""
    chat = row["prompt"].removesuffix("".join(row["prefix"]))
    pieces = [chat, *row["prefix"], row["chosen"], row["rejected"]]
    *prompt, chosen, rejected = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": [i for ids in prompt for i in ids], "chosen_ids": chosen, "rejected_ids": rejected}
