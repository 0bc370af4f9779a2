"""The closing lines of `sclite export`."""

import pytest

from sclite import exports
from sclite.export import parity
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights


@pytest.mark.parametrize(("student", "fits"), [("dpo", "train"), ("sft", "eval PROBLEMS")])
def test_next_command_after_an_export_keeps_the_settings_of_the_file(sclite, monkeypatch, student, fits):
    """Otherwise it would replace the file, or fit another file's threshold. `train` fits only the DPO student's."""
    run = Run("runs/default")
    run.path(adapter_weights(student)).parent.mkdir(parents=True)
    run.path(adapter_weights(student)).write_bytes(b"weights")
    figures = {"gguf": str(run.path(f"export/{student}-q8_0.gguf")), "files": {}, "parity": {"skipped": None}}
    monkeypatch.setattr(exports, "export", lambda _: [Report("export", figures=dict(figures))])
    monkeypatch.setattr(parity, "summarize", lambda _: "compared")
    false, true = (f" --set export.imatrix={value}" for value in ("false", "true"))
    for options, settings in (
        ("--no-imatrix", false),
        ("--keep-template --imatrix", f"{true} --set export.keep_template=true"),
        (f"--quant q8_0,f16{false} --set seed=1", f"{false} --set export.quant=q8_0,f16"),
        ("", ""),
    ):
        ended = sclite("export", *options.split())
        following = f"Next: sclite {fits} --run runs/default{settings} (fits the review threshold)"
        assert ended.out.splitlines()[-1] == following, ended.err
