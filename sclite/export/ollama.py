"""Write a Modelfile, run `ollama create`, and compare the created model's reply with the engine's."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError, ScliteError, UsageError
from sclite.export.cards import build_model_card
from sclite.export.chat_format import derive_format
from sclite.files import write_text
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.chat_template import render_chat
from sclite.student.ggufs import export_stage, gguf_path
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.sequence import TokenSequence
from sclite.student.ollama_api import call_ollama, ollama_url

REPLY_TOKENS, LOADING_SECONDS = 64, 600


def write_modelfile(run: Run, config: Config, name: str) -> tuple[Path, list[str]]:
    """Write export/Modelfile for a model's GGUF, and the model card. Returns the Modelfile and warnings for the user.

    Raises DataError for a system prompt that could end early.
    """
    out, warnings = gguf_path(run, name, config), []
    with Engine(out, parallel=1, context=512, gpu_layers=0, cache_gb=0.1) as engine:
        jinja, tokens, max_context = engine.chat_template, engine.special_tokens, engine.trained_context
        bos, adds_bos = tokens["bos_token"], engine.vocabulary.adds_bos
    try:
        render = lambda chat, answer: render_chat(jinja, chat, tokens, generation_prompt=answer)  # noqa: E731
        template = derive_format(render, bos).go_template(bos if adds_bos else "")
    except DataError as error:
        template = ""
        warnings.append(f"the Modelfile has no TEMPLATE, which Ollama before 0.30 needs: {error.message}")
    system, stop = prompts.solve_messages("", config.prompts.folder)[0]["content"], tokens["eos_token"]
    if '"""' in system or system.endswith('"'):
        hint = "change student_system.txt in prompts.folder"
        raise DataError('a Modelfile cannot contain a system prompt with """ in it or " at its end', hint)
    lines = [f"FROM ./{out.name}", *([f'TEMPLATE """{template}"""'] if template else [])]
    lines += [f'SYSTEM """{system}"""', f'PARAMETER stop "{stop}"']
    num_ctx = min(config.export.num_ctx, max_context)
    lines += [f"PARAMETER num_ctx {num_ctx}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    path = run.path("export/Modelfile")
    write_text(path, "\n".join(lines) + "\n")
    if manifest := run.manifest(export_stage(name, config)):
        warnings += manifest["figures"]["warnings"]
        card = build_model_card(config, run, name, "gguf", manifest["figures"])
        write_text(run.path("export/README.md"), card)
    return path, warnings


def check_ollama(name: str) -> None:
    """Raise UsageError for an invalid model name, ScliteError if ollama is missing."""
    if not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name):
        hint = "use letters, digits and . _ - / : as in my-model:v1"
        raise UsageError(f"export.ollama = {name!r} is not a valid model name", hint)
    if shutil.which("ollama") is None:
        hint = "install it: curl -fsSL https://ollama.com/install.sh | sh"
        raise ScliteError("ollama is not installed", hint)


def create_model(name: str, modelfile_path: Path) -> None:
    """Run `ollama create NAME -f MODELFILE`. Raises ScliteError if it fails."""
    command = ["ollama", "create", name, "-f", str(modelfile_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        hint = "is the server running? start it with: ollama serve"
        raise ScliteError(f"ollama create {name} failed: {done.stderr.strip().rpartition(chr(10))[2]}", hint)


def compare_replies(config: Config, gguf: Path, question: str) -> dict[str, Any]:
    """Ask the model `export.ollama` and the engine the same question, greedily.

    Returns prompt_tokens, ollama_prompt_tokens (None if Ollama does not count them), tokens and equal_tokens of the reply,
    and, where the two diverge, gap: by how many nats the engine prefers its own token (None: one reply has ended);
    `summary` is one line of text. Raises ScliteError if the prompt has another length or the first token differs, TeacherError
    if Ollama does not answer.
    """
    name, chat = config.export.ollama, prompts.solve_messages(question, config.prompts.folder)
    body = {
        "model": name,
        # the system prompt is in the Modelfile
        "messages": [dict(message) for message in chat if message["role"] != "system"],
        "stream": False,
        "keep_alive": 0,  # a prompt in the cache would not be counted the next time
        "options": {"temperature": 0, "seed": 0, "num_predict": REPLY_TOKENS},
    }
    found = call_ollama(ollama_url(), "/api/chat", body, LOADING_SECONDS)
    counted, message = found.get("prompt_eval_count"), found.get("message") or {}
    with Engine(gguf, parallel=1, context=config.eval.context) as engine:
        prompt = engine.chat_ids(chat)
        request = Request(chat, max_tokens=REPLY_TOKENS)
        (ours,) = engine.scheduler.run([TokenSequence(prompt.copy(), request=request, limit=REPLY_TOKENS)])
        reply, theirs = ours.text.decode(errors="replace").strip(), str(message.get("content") or "").strip()
        said, equal, text, gap = theirs.encode(), 0, b"", None
        for token in ours.ids[len(prompt) :]:  # those that Ollama wrote, too
            longer = text + engine.vocabulary.piece(token)
            if reply != theirs and not said.startswith(longer.lstrip()):
                break
            equal, text = equal + 1, longer
        other = engine.vocabulary.ids(said[len(text.lstrip()) :].decode(errors="replace"))
        if equal < ours.generated and other:
            at = len(prompt) + equal
            (scored,) = engine.scheduler.run([TokenSequence(ours.ids[:at], {at - 1: None})])
            gap = float(scored.read[at - 1][ours.ids[at]] - scored.read[at - 1][other[0]])
    differs = ""
    if counted is not None and counted != len(prompt):
        differs = f"gets a prompt of {counted} tokens instead of {len(prompt)}"
    elif reply != theirs and not equal:
        differs = f"begins with {theirs[:20]!r} instead of {reply[:20]!r}"
    if differs:
        message = f"{name} in Ollama is not the exported model: it {differs}"
        hint = f"update Ollama (before 0.30 it needs the Modelfile's TEMPLATE); to remove the model: ollama rm {name}"
        raise ScliteError(message, hint)
    length = "prompt of unknown length" if counted is None else f"prompt of {counted} tokens"
    tokens = f"{ours.generated} greedy tokens"
    summary = f"Ollama agrees: {length}, {tokens}"
    if reply != theirs:
        where = "where one ends" if gap is None else f"where sclite prefers its own token by {gap:.2f} nats"
        summary = f"Ollama agrees for {equal} of {tokens}, up to {where}; {length}"
    counts = {"prompt_tokens": len(prompt), "ollama_prompt_tokens": counted, "tokens": ours.generated}
    return {**counts, "equal_tokens": equal, "gap": gap, "summary": summary}
