"""DPO on the exported pairs, on one or several GPUs: accelerate launch --config_file accelerate.yaml dpo.py --config dpo.yaml

`trl dpo` reads the same rows, but tokenizes prompt and completion jointly and appends an end token to completions that
stop mid-answer. Here each piece is tokenized separately and nothing is appended, as in inference.
"""

from pathlib import Path

from datasets import load_dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


class PartialCompletions(DPOTrainer):
    """TRL's trainer for completions that stop mid-answer."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        with args.main_process_first():
            settings = {"fn_kwargs": {"tokenizer": processing_class}, "remove_columns": dataset.column_names}
            encoded = dataset.map(encode, **settings)
            fitting = encoded.filter(lambda row: args.max_length is None or length(row) <= args.max_length)
        if len(fitting) == 0:
            raise SystemExit(f"no pair fits in max_length = {args.max_length} tokens")
        if args.process_index == 0:
            print(f"{len(fitting)} pairs, {len(encoded) - len(fitting)} longer than max_length")
        return fitting


def encode(row, tokenizer):
    """The token IDs of a pair: chat, prefix pieces and completions are tokenized separately; nothing is added."""
    chat = row["prompt"].removesuffix("".join(row["prefix"]))
    pieces = [chat, *row["prefix"], row["chosen"], row["rejected"]]
    *prompt, chosen, rejected = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": [i for ids in prompt for i in ids], "chosen_ids": chosen, "rejected_ids": rejected}


def length(row):
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def main():
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config()
    training.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if (Path(model.model_name_or_path) / "adapter_config.json").is_file():
        raise SystemExit(
            f"{model.model_name_or_path} is an adapter: run merge.py first, or DPO would use the original base as the reference"
        )
    trainer = PartialCompletions(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_dataset(
            script.dataset_name, script.dataset_config, split=script.dataset_train_split
        ),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
