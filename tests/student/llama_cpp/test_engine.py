"""The batched llama.cpp student, on a real GGUF, against transformers."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sclite.errors import DataError, DeviceError
from sclite.student.base import Request, ScoreRequest
from sclite.student.llama_cpp import engine as llama_engine
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.sequence import TokenSequence, sample
from tests.toy import raises, sample_texts, tiny_gguf, wait_until

PIECES = ("<Step1>Add 17 and 25.\n", "</Step1>\n", "<Step2>It is  42 €.\n")
OPTIONS = ("<Cause>", "</Step")


def chat(question, system="Solve in steps."):
    return ({"role": "system", "content": system}, {"role": "user", "content": question})


def questions(count):
    return [text.split("\n")[0] for text in sample_texts(count, seed=3)]


@pytest.fixture(scope="module")
def gguf(folder, tmp_path_factory):
    return tiny_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def trained(folder):
    """Transformers' model and tokenizer of the same folder."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(gguf):
    with Engine(gguf, parallel=4, context=1024, exact=True) as engine:
        yield engine


def replies(engine, requests):
    """By the numbers of the requests."""
    return {reply.index: reply for reply in engine.generate(requests)}


def ids_of(tokenizer, messages, pieces=()):
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for piece in pieces:
        ids = ids + tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def log_probabilities(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def test_ids_match_transformers_and_sentencepiece(engine, folder, trained):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    draw = random.Random(0)
    letters = "abcdefgnopst 0123456789\n\n  <>/StepCauseKeynumber.,+=éß漢😀\taaAA"
    texts = ["".join(draw.choices(letters, k=draw.randint(0, 60))) for _ in range(300)]
    texts += ["</Step1>\n<Cause>", "  two  spaces ", "<|im_end|x", *sample_texts(30, seed=9)]
    for text in texts:
        ids = engine.vocabulary.ids(text)
        assert ids == model.encode(text) == trained[1](text, add_special_tokens=False).input_ids, text
        assert b"".join(engine.vocabulary.piece(token) for token in ids).decode() == text
    # control tokens are parsed in prompts but not in pieces
    assert engine.vocabulary.ids("<|im_end|>", special=True) == [2]
    assert 2 not in engine.vocabulary.ids("<|im_end|>")


def test_greedy_replies_match_transformers(engine, trained):
    model, tokenizer = trained
    requests = [Request(chat(q), pieces=PIECES[: i % 4], max_tokens=24) for i, q in enumerate(questions(12))]
    found = replies(engine, requests)
    assert sorted(found) == list(range(12))
    for index, request in enumerate(requests):
        ids = ids_of(tokenizer, request.messages, request.pieces)
        settings = {"attention_mask": torch.ones(1, len(ids)), "max_new_tokens": 24, "do_sample": False}
        wanted = model.generate(torch.tensor([ids]), **settings)
        new = wanted[0, len(ids) :].tolist()
        reply = found[index]
        assert reply.prompt_tokens == len(ids)
        text = b"".join(engine.vocabulary.piece(token) for token in new).decode("utf-8", "replace")
        assert (reply.text, reply.tokens) == (text, len(new))
        assert reply.finish == ("stop" if new[-1] == 2 else "length")


def test_scores_match_transformers(engine, trained):
    model, tokenizer = trained
    requests = [ScoreRequest(chat(q), PIECES, (2, 0), (OPTIONS, OPTIONS)) for q in questions(9)]
    scores = {score.index: score for score in engine.score(requests)}
    first, second = (tokenizer(option, add_special_tokens=False).input_ids[0] for option in OPTIONS)
    assert first != second
    for index, request in enumerate(requests):
        for mark, found in zip(request.marks, scores[index].log_odds, strict=True):
            ids = ids_of(tokenizer, request.messages, request.pieces[: mark + 1])
            row = log_probabilities(model, ids)[-1]
            assert found == pytest.approx(row[first] - row[second], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "others", "whole"),
    [
        (("</Step1>", "</Answer>"), (), True),
        (("<Cause>", "</Step1>"), ("<Key>",), True),  # as decisions are scored
        (("</Step1>", "1"), ("<Cause>", "<Key>"), False),
    ],
)
def test_whole_options_are_scored_if_a_first_token_is_not_unique(engine, trained, options, others, whole):
    """`<Cause>` and `<Key>` share their first token in this vocabulary; compared with one forward pass per option."""
    model, tokenizer = trained
    ids = [tokenizer(option, add_special_tokens=False).input_ids for option in (*options, *others)]
    assert (len({option[0] for option in ids}) < len(ids)) == bool(whole or others)
    (score,) = engine.score([ScoreRequest(chat("2 + 2?"), PIECES, (2, 0), (options, options), others)])
    for mark, found in zip((2, 0), score.log_odds, strict=True):
        context = ids_of(tokenizer, chat("2 + 2?"), PIECES[: mark + 1])
        sums = []
        for option in (option[: None if whole else 1] for option in ids[:2]):
            rows = log_probabilities(model, context + option)[len(context) - 1 :]
            sums.append(sum(rows[i, token] for i, token in enumerate(option)))
        assert found == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_a_single_option_is_compared_with_any_other_text(engine, trained):
    """After the prompt (mark -1) and after a piece; a text of p has the log-odds log(p / (1 - p))."""
    model, tokenizer = trained
    options = ((PIECES[0], None), (PIECES[1], None))
    (score,) = engine.score([ScoreRequest(chat("2 + 2?"), PIECES, (-1, 0), options)])
    for piece, found in enumerate(score.log_odds):
        context = ids_of(tokenizer, chat("2 + 2?"), PIECES[:piece])
        new = ids_of(tokenizer, chat("2 + 2?"), PIECES[: piece + 1])[len(context) :]
        rows = log_probabilities(model, context + new)[len(context) - 1 :]
        likely = np.exp(sum(rows[i, token] for i, token in enumerate(new)))
        assert found == pytest.approx(np.log(likely / (1 - likely)), abs=1e-3)


def test_more_logits_than_one_batch_may_read_are_read_in_several(engine, trained, monkeypatch):
    ids, before = ids_of(trained[1], chat("3 + 4?"), PIECES), engine.scheduler.steps
    monkeypatch.setattr("sclite.student.llama_cpp.scheduler.MOST_READ", 10)
    found = engine.log_probabilities(ids)
    assert engine.scheduler.steps - before == -(-len(ids) // 10)
    assert np.abs(found - log_probabilities(trained[0], ids)).max() < 1e-3


def test_log_probabilities_match_transformers_and_a_fast_cache_nearly(engine, gguf, trained):
    ids = ids_of(trained[1], chat("3 + 4?"), PIECES)
    expected = log_probabilities(trained[0], ids)
    assert np.abs(engine.log_probabilities(ids) - expected).max() < 1e-3
    with Engine(gguf, parallel=2, context=512) as fast:
        assert np.abs(fast.log_probabilities(ids) - expected).mean() < 1e-2


def test_finished_sequence_frees_its_slot(gguf):
    with Engine(gguf, parallel=2, context=512) as engine:
        lengths = [40, 4, 4, 4, 4, 4, 4, 4, 4]
        requests = [Request(chat(q), max_tokens=n) for q, n in zip(questions(9), lengths, strict=True)]
        order = [reply.index for reply in engine.generate(requests)]
        assert order == [1, 2, 3, 4, 5, 6, 7, 8, 0]
        assert engine.scheduler.steps < 50  # the long one dominates: 40 steps, not 4 * 8 more


def test_decoding_sequences_are_in_slot_order(gguf, monkeypatch):
    """llama.cpp computes sequences with separate caches together only if their numbers are consecutive."""
    lengths = [9, 3, 12, 5, 7, 4, 11, 6, 8, 3, 10, 5]
    requests = [Request(chat(q), max_tokens=n) for q, n in zip(questions(12), lengths, strict=True)]
    with Engine(gguf, parallel=4, context=512) as engine:
        scheduler, seen = engine.scheduler, []
        decode = scheduler.api.llama_decode

        def watched(*arguments):
            decoding = [slot for slot, seq in scheduler.active.items() if len(seq.ids) - seq.past == 1]
            owners = [scheduler.batch.seq_id[place][0] for place in range(len(decoding))]
            seen.append((sorted(decoding), owners))
            return decode(*arguments)

        monkeypatch.setattr(scheduler.api, "llama_decode", watched)
        assert len(list(engine.generate(requests))) == 12
    assert any(len(decoding) == 4 for decoding, _ in seen)
    for decoding, owners in seen:
        assert owners == decoding


def test_common_prefix_is_computed_once_and_changes_no_reply(gguf):
    requests = [Request(chat(q, system="Solve in steps. " * 12), max_tokens=16) for q in questions(8)]
    requests += requests[:3]
    with Engine(gguf, parallel=4, context=512, exact=True) as engine:
        common = len(engine.vocabulary.ids("<|im_start|>system\n" + "Solve in steps. " * 12, special=True))
        shared = replies(engine, requests)
        assert common > 80
        computed = sum(reply.prefill_tokens for reply in shared.values())
        assert sum(reply.prompt_tokens for reply in shared.values()) - computed >= 10 * common
    for index, request in enumerate(requests):
        with Engine(gguf, parallel=1, context=512, exact=True) as alone:
            (reply,) = alone.generate([request])
        assert reply.prefill_tokens == reply.prompt_tokens
        assert shared[index].text == reply.text


def test_next_request_with_the_same_prefix_uses_the_cache(engine):
    (first,) = engine.generate([Request(chat("How many apples?"), max_tokens=30)])
    (second,) = engine.generate([Request(chat("How many apples?"), pieces=PIECES, max_tokens=3)])
    assert second.prompt_tokens > first.prompt_tokens
    assert second.prefill_tokens <= second.prompt_tokens - first.prompt_tokens + 1
    scored = ScoreRequest(chat("How many apples?"), PIECES, (0,), (OPTIONS,))
    after_the_mark = sum(len(engine.vocabulary.ids(piece)) for piece in PIECES[1:])
    # odds are read at the token before
    assert next(engine.score([scored])).prefill_tokens == 1 + after_the_mark


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        (("😀",), [bytes([byte]) for byte in "é漢😀".encode()], "é漢😀"),  # characters of several tokens
        (("b", "a"), [b"x", b"yabc"], "xya"),  # the first one in the text ends it
        (("bc", "a", "z"), [b"x", b"yabc"], "xya"),
    ],
)
def test_stop_strings_are_found_in_whole_characters(stops, pieces, text):
    sequence = TokenSequence([1], request=Request((), stop=stops), limit=99)
    vocabulary = SimpleNamespace(ends=(), piece=pieces.__getitem__)
    for logits in np.eye(len(pieces)):
        sequence.take([], logits[None], vocabulary)
    assert (sequence.text.decode(), sequence.finish) == (text, "stop")


def test_sampling_depends_on_the_seed_not_on_the_batch(gguf):
    def sampled(seed):
        return Request(chat("5 + 6?"), max_tokens=12, temperature=0.9, top_p=0.95, seed=seed)

    with Engine(gguf, parallel=8, context=512) as engine:
        found = replies(engine, [sampled(seed) for seed in range(8)])
    together = [found[seed].text for seed in range(8)]
    with Engine(gguf, parallel=4, context=512) as engine:  # fewer use a different attention
        alone = [next(engine.generate([sampled(seed)])).text for seed in range(8)]
    # rounding differs between batches, so a draw at the boundary of two tokens may flip
    assert sum(one == other for one, other in zip(alone, together, strict=True)) >= 6
    assert len(set(together)) > 4


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_samples_follow_top_p_probabilities(top_p):
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))
    request = Request((), temperature=1.0, top_p=top_p)
    wanted = {0.3: [0, 1, 0, 0], 0.9: [0, 0.526, 0.158, 0.316], 1.0: [0.05, 0.5, 0.15, 0.3]}[top_p]
    draw = np.random.default_rng(0)
    found = np.bincount([sample(logits, request, draw) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(found - wanted).max() < 0.03


def test_flat_nucleus_is_kept_whole():
    logits = np.zeros(5000, dtype=np.float32)
    logits[0] = 12.0  # each of the others is below 1e-4 of it; together they have 3 % of the mass
    request, draw = Request((), temperature=1.0, top_p=0.999), np.random.default_rng(0)
    assert len({sample(logits, request, draw) for _ in range(2000)}) > 20


def test_oversized_prompt_is_an_error_and_affects_no_other(engine):
    requests = [Request(chat("word " * 2000), max_tokens=5), Request(chat("1 + 1?"), max_tokens=5)]
    found = replies(engine, requests)
    assert found[0].finish == "error"
    assert "context" in found[0].error
    assert found[1].tokens == 5
    (score,) = engine.score([ScoreRequest(chat("word " * 2000), PIECES, (0,), (OPTIONS,))])
    assert np.isnan(score.log_odds[0])


def test_as_many_sequences_are_decoded_at_once_as_fit_with_their_caches(gguf, monkeypatch):
    """2 layers of 256 float16 keys and values: 2,048 bytes per token, 524,288 per sequence of 256 tokens."""
    monkeypatch.setattr("sclite.student.llama_cpp.engine.SMALL", 0)
    for sequences, parallel in ((0.5, 1), (4.9, 4), (12.1, 12), (40, 32)):
        with Engine(gguf, context=256, cache_gb=sequences * 524_288 / 1e9) as engine:
            assert engine.parallel == parallel


def test_same_requests_give_the_same_texts_in_every_run(gguf):
    lengths = [9, 40, 12, 25, 37, 4, 31, 16, 28, 3, 40, 5]
    requests = [Request(chat(q), max_tokens=n) for q, n in zip(questions(12), lengths, strict=True)]
    texts = []
    for _ in range(2):
        with Engine(gguf, parallel=8, context=512) as engine:
            texts.append(replies(engine, requests))
    assert texts[0] == texts[1]


def test_threads_share_one_engine_which_scores_during_generation(engine):
    def ask(question):
        return next(engine.generate([Request(chat(question), max_tokens=10)])).text

    alone = list(map(ask, questions(6)))
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, questions(6))) == alone
    seen = []
    for reply in engine.generate([Request(chat(q), max_tokens=8 + i) for i, q in enumerate(questions(8))]):
        (score,) = engine.score([ScoreRequest(chat("2 + 2?"), PIECES, (1,), (OPTIONS,))])
        seen.append((reply.index, score.log_odds))
    assert sorted(index for index, _ in seen) == list(range(8))


def test_abandoned_run_frees_its_slots(engine):
    requests = [Request(chat(q), max_tokens=30) for q in questions(9)]
    run = engine.generate(requests)
    next(run)
    run.close()
    wait_until(lambda: not engine.scheduler.active and not engine.scheduler.waiting)
    assert len(list(engine.generate(requests))) == 9


def test_streamed_text_comes_in_pieces_and_adds_up_to_the_reply(engine):
    request = Request(chat("1 + 1?"), max_tokens=40)
    (whole,) = engine.generate([request])
    *pieces, reply = engine.stream(request)
    assert reply == whole
    assert "".join(pieces) == whole.text
    assert list(engine.stream(request, None, False)) == [whole.text, whole]
    stop = whole.text[9:13]
    *pieces, reply = engine.stream(Request(chat("1 + 1?"), max_tokens=40, stop=("never", stop)))
    assert "".join(pieces) == reply.text == whole.text[: whole.text.index(stop) + len(stop)]
    assert (reply.finish, whole.finish) == ("stop", "length")


def test_streamed_scores_and_oversized_prompts(engine):
    ask = ScoreRequest(chat("2 + 2?"), PIECES, (0,), (OPTIONS,))
    (streamed,), (scored,) = engine.stream(ask), engine.score([ask])
    assert streamed.log_odds == pytest.approx(scored.log_odds, abs=1e-4)  # what is cached rounds differently
    (reply,) = engine.stream(Request(chat("word " * 2000)))
    assert reply.finish == "error"


def test_cancelling_from_another_thread_frees_the_slot_and_keeps_the_text(gguf):
    with Engine(gguf, parallel=1, context=1024) as engine:
        cancel, seen = threading.Event(), []
        ask = Request(chat("1 + 1?"), max_tokens=900, temperature=0.5)

        def read():
            seen.extend(engine.stream(ask, cancel))

        thread = threading.Thread(target=read)
        thread.start()
        wait_until(lambda: seen)
        cancel.set()
        (other,) = engine.generate([Request(chat("3 + 4?"), max_tokens=5)])
        thread.join()
        *pieces, reply = seen
        assert reply.finish == "cancelled"
        assert 0 < reply.tokens < 900
        assert "".join(pieces) == reply.text
        assert other.tokens == 5
        (scores,) = engine.score([ScoreRequest(chat("2 + 2?"), PIECES, (0,), (OPTIONS,))], cancel)
        assert np.isnan(scores.log_odds).all()


def test_solution_stays_in_the_cache_while_it_is_reviewed(gguf):
    with Engine(gguf, parallel=2, context=1024) as engine:
        for question in ("1 + 1?", "2 + 2?", "3 + 3?"):
            solve, review = (chat(text, "Solve in steps. " * 9) for text in (question, f"Check {question}"))
            (first,) = engine.generate([Request(solve, max_tokens=30)])
            scored = next(engine.score([ScoreRequest(review, PIECES, (0, 2), (OPTIONS,) * 2, ("<Key>",))]))
            assert 0 < scored.prefill_tokens < 2 * len(engine.chat_ids(review))
            (rest,) = engine.generate([Request(solve, (first.text[:20],), max_tokens=3)])
            assert rest.prefill_tokens <= 1 + len(engine.vocabulary.ids(first.text[:20]))


def test_engine_that_is_closed_ends_its_runs(gguf):
    engine = Engine(gguf, parallel=1, context=512)
    text = engine.stream(Request(chat("1 + 1?"), max_tokens=400))
    next(text)
    engine.close()
    with pytest.raises(DeviceError, match="engine"):
        list(text)


def test_batch_that_cannot_be_computed_ends_its_runs_only(gguf, monkeypatch):
    with Engine(gguf, parallel=2, context=512) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler.api, "llama_decode", lambda *_: -3)
            with pytest.raises(DeviceError, match="code -3"):
                list(engine.generate([Request(chat("1 + 1?"), max_tokens=5)]))
        (reply,) = engine.generate([Request(chat("1 + 1?"), max_tokens=5)])
        assert reply.tokens == 5


def test_invalid_gguf_is_rejected_with_a_hint(tmp_path, gguf):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:5000])
    for path, message in ((tmp_path / "absent.gguf", "does not exist"), (broken, "cannot load")):
        with raises(DataError, message):
            Engine(path)


def test_llama_cpp_loads_silently_and_truncates_at_the_end_of_the_context(gguf, capfd):
    with Engine(gguf, parallel=2, context=256) as engine:
        (reply,) = engine.generate([Request(chat("1 + 1?"), max_tokens=100_000)])
        assert (reply.finish, reply.prompt_tokens + reply.tokens) == ("length", 256)
        assert engine.vocabulary.size == 512
        assert isinstance(engine.offloaded, bool)
        assert "llama" in engine.description
        assert "?" not in engine.description
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_cuda_build_of_llama_cpp_gets_the_libraries_of_torch(tmp_path, monkeypatch):
    """Its wheels contain none, and a machine with a driver alone has no others."""
    for name in ("llama_cpp/__init__.py", "llama_cpp/lib/libggml-cuda.so", "nvidia/cu13/lib/libcudart.so.13"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "llama_cpp/__init__.py").write_text("raise OSError")
    (tmp_path / "nvidia/cu13/lib/libcublas.so.13").touch()
    loaded = []
    monkeypatch.setattr(llama_engine.ctypes, "CDLL", lambda path, _: loaded.append(Path(path).name))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [each for each in sys.modules if each.partition(".")[0] in ("llama_cpp", "nvidia")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DeviceError, match="cannot be loaded"):
        llama_engine.llama.__wrapped__()
    assert loaded == ["libcudart.so.13", "libcublas.so.13"]
    (tmp_path / "llama_cpp/lib/libggml-cuda.so").unlink()
    with pytest.raises(DeviceError, match="cannot be loaded"):
        llama_engine.llama.__wrapped__()  # a CPU build
    assert len(loaded) == 2


def test_llama_cpp_that_cannot_be_loaded_is_an_error_with_a_remedy(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "llama_cpp.llama_cpp":
                raise RuntimeError("libcudart.so.12: cannot open shared object file")

    for name in [each for each in sys.modules if each.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DeviceError, match=r"cannot be loaded: libcudart\.so\.12") as error:
        llama_engine.llama.__wrapped__()
    assert "sclite doctor" in error.value.hint
