"""The GGUFs of a run, and the inputs of each."""

from pathlib import Path
from typing import Any

from sclite.config import Config
from sclite.run import Run
from sclite.signature import digest
from sclite.student.adapters import adapter_weights

LORA_FILE = "-lora.gguf"  # the end of an adapter-only GGUF's name


def gguf_path(run: Run, name: str, config: Config) -> Path:
    """The GGUF of base, sft or dpo, in the first quantization type."""
    return run.path(f"export/{name}-{config.export.types[0]}.gguf")


def source_digest(config: Config, run: Run, name: str) -> str:
    """A short hash of the inputs of the GGUF of base, sft or dpo, independent of the quantization type."""
    return digest({**inputs_of(config, run, name), "quant": ""})


def inputs_of(config: Config, run: Run, name: str) -> dict[str, Any]:
    """The inputs that decide the GGUF of base, sft or dpo."""
    return {
        "adapter": run.file_digest(adapter_weights(name)) if name != "base" else "",
        "student": digest(config.student.model),
        "quant": config.export.quant,
        "imatrix": config.export.imatrix,
        "keep_template": config.export.keep_template,
    }


def export_stage(name: str, config: Config) -> str:
    """The stage that writes the GGUFs of base, sft or dpo in the configured quantization types."""
    return f"export-{name}-{'+'.join(config.export.types)}"


def exports_of(run: Run, name: str) -> list[dict[str, Any]]:
    """The manifests of the exports of base, sft or dpo, the newest last."""
    paths = run.path("done").glob(f"export-{name}-*.json")
    stages = [path.stem for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]
    return [manifest for stage in stages if (manifest := run.manifest(stage)) is not None]


def find_ggufs(run: Run, name: str) -> list[Path]:
    """The GGUFs made from the current adapter of base, sft or dpo, else those of unknown origin. Reads no GGUF."""
    adapter, exports = run.file_digest(adapter_weights(name)), exports_of(run, name)
    known = {file: each["inputs"]["adapter"] for each in exports for file in each["figures"]["files"]}
    found = [path for path in run.path("export").glob(f"{name}-*.gguf") if not path.name.endswith(LORA_FILE)]
    made = [path for path in found if adapter and known.get(path.name) == adapter]
    return made or [path for path in found if not adapter or path.name not in known]
