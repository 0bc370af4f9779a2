"""Axolotl's DPO trainer on pairs whose completions stop in mid-answer; named by `trainer_cls` in dpo.yaml.

TRL, which Axolotl builds on, puts an end token after every plain text completion and tokenises it joined with its prompt.
Here each piece is tokenised by itself and ends where it ends, as the student will see it.
"""

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer


class Trainer(AxolotlDPOTrainer):
    """Prepares rows of pairs.jsonl; all else is Axolotl's."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset.map(
            encode, fn_kwargs={"tokenizer": processing_class}, remove_columns=dataset.column_names
        )


def encode(row, tokenizer):
    """The token ids of a pair: of the chat, of each piece of the assistant's prefix, of each side, with nothing added."""
    chat = row["prompt"].removesuffix("".join(row["prefix"]))
    pieces = [chat, *row["prefix"], row["chosen"], row["rejected"]]
    *prompt, chosen, rejected = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": [i for ids in prompt for i in ids], "chosen_ids": chosen, "rejected_ids": rejected}
