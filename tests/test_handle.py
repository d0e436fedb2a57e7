"""`minilm.Run`: what a notebook does with a trained run."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import minilm
from minilm import Run, checkpoint, cli
from minilm.configfile import load
from minilm.errors import UserError
from minilm.files import write_json
from minilm.model import sequence_score
from minilm.stages.reward import encode, load_normalization
from minilm.stages.workspace import load_model


@pytest.fixture(scope="module")
def run(tiny_run):
    return minilm.Run(tiny_run)


def test_a_run_is_its_last_policy(run, tiny_run):
    assert run.checkpoint == checkpoint.find(tiny_run / "rlhf")
    assert run.metadata["stage"] == "rlhf"


def test_the_config_is_the_one_it_was_made_with(run, tiny):
    assert run.config == load(tiny)


def test_metrics_are_read_by_stage(run):
    assert list(run.metrics) == ["pretrain", "reward", "rlhf"]
    assert [r["step"] for r in run.metrics["rlhf"] if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_generation_is_a_function_of_the_seed(run):
    texts = run.generate(["A fox", "One day"], max_new_tokens=12, seed=3)
    assert len(texts) == 2
    assert texts == run.generate(["A fox", "One day"], max_new_tokens=12, seed=3)
    assert texts != run.generate(["A fox", "One day"], max_new_tokens=12, seed=4)


def test_a_stream_in_pieces_is_the_greedy_completion(run):
    pieces = list(run.stream("A fox", max_new_tokens=24, temperature=0.0))
    (whole,) = run.generate("A fox", max_new_tokens=24, temperature=0.0)
    # Half a character at the very end is not shown.
    assert "".join(pieces) == whole.rstrip("�")
    assert len([piece for piece in pieces if piece]) > 1


def test_prompts_of_about_one_length_share_a_compilation(run):
    from minilm.generate import _advance_jit

    for prompt in ("A fox", "A", "One day a"):
        list(run.stream(prompt, max_new_tokens=16))
    before = _advance_jit._cache_size()
    list(run.stream("A wolf", max_new_tokens=16, seed=1))
    assert _advance_jit._cache_size() == before


def test_scores_are_in_units_of_the_reference_completions(run, tiny_run):
    """Mean 0 and standard deviation 1 over the distinct held-out completions."""
    rows = [
        json.loads(line)
        for line in (tiny_run / "preferences" / "held_out.jsonl").read_text().splitlines()
    ]
    texts = sorted({(r["prompt"], r[k]) for r in rows for k in ("chosen", "rejected")})
    scores = run.score([p for p, _ in texts], [c for _, c in texts])
    assert scores.mean() == pytest.approx(0, abs=1e-3)
    assert scores.std() == pytest.approx(1, abs=1e-3)
    by_path = minilm.Run(checkpoint.find(tiny_run / "reward"))
    np.testing.assert_array_equal(by_path.score(*map(list, zip(*texts, strict=True))), scores)
    alone = run.score([texts[0][0]], [texts[0][1]])
    np.testing.assert_allclose(alone, scores[:1], atol=1e-3)


def test_a_long_text_is_scored_whole_as_rlhf_reads_it(run, tiny_run):
    """Cut at `reward.max_tokens`, two completions that differ after it scored the same."""
    text = " The fox ran home." * (run.config.reward.max_tokens // 4)
    found = run.score(["Once."] * 2, [text, text + " The hen slept."])
    assert found[0] != found[1]
    model, _ = load_model(checkpoint.find(tiny_run / "reward"))
    ids = [encode(run.tokenizer, "Once.", text + end) for end in ("", " The hen slept.")]
    assert min(map(len, ids)) > run.config.reward.max_tokens
    scale = load_normalization(tiny_run / "reward")
    for row, score in zip(ids, found, strict=True):
        tokens, last = jnp.array([row]), jnp.array([len(row) - 1])
        raw = sequence_score(model, tokens, jnp.ones_like(tokens), last)
        assert score == pytest.approx((float(raw[0]) - scale.mean) / scale.std, abs=1e-3)


def test_a_stage_and_a_checkpoint_open_too(tiny_run):
    pretrained = minilm.Run(tiny_run / "pretrain")
    again = minilm.Run(str(pretrained.checkpoint))
    assert pretrained.metadata["stage"] == again.metadata["stage"] == "pretrain"
    assert pretrained.generate(max_new_tokens=8) == again.generate(max_new_tokens=8)


def test_what_is_no_run_says_so(tmp_path, tiny_run):
    with pytest.raises(UserError, match="no checkpoint here"):
        minilm.Run(tmp_path)
    with pytest.raises(UserError, match="does not write"):
        minilm.Run(tiny_run / "reward").generate("A fox")
    with pytest.raises(UserError, match="not a reward model"):
        minilm.Run(tiny_run / "pretrain").score(["a"], ["b"])


def test_the_command_prints_prompt_and_completion(tiny_run, processes):
    words = ["generate", tiny_run, "--prompt", "A fox", "--max-new-tokens", 8, "--count", 2]
    first, second = processes(*words), processes(*words)
    assert first.code == 0, first.output
    assert first.output.count("A fox") == 2
    assert first.output == second.output


def test_a_prompt_longer_than_anything_trained_on_is_told(tiny_run, capsys):
    words = ["generate", str(tiny_run), "--max-new-tokens", "1", "--prompt"]
    assert cli.main([*words, "A fox"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*words, "A fox ran. " * 60]) == 0
    said = capsys.readouterr().err
    assert "the model was trained on rows of 96, so what follows may be noise" in said


def test_rows_that_fine_tuning_learnt_from_count_too(tiny_copy, capsys):
    write_json(tiny_copy / "sft" / "done.json", {"sections": {"sft": {"sequence_length": 4096}}})
    words = ["generate", str(tiny_copy), "--max-new-tokens", "1", "--prompt"]
    assert cli.main([*words, "A fox ran. " * 60]) == 0
    assert capsys.readouterr().err == ""


def test_each_prompt_is_scored_with_one_completion(run):
    with pytest.raises(UserError, match="2 prompts, 1 completions"):
        run.score(["A fox", "A hen"], [" ran."])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_adds_rewards_to_pairs_completions_and_texts(tiny_run, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows = [
        {"prompt": "Once", "chosen": " a fox.", "rejected": " a hen.", "kept": 1},
        {"prompt": "Once", "completion": " a fox."},
        {"text": "Once a fox."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["score", str(tiny_run), "--file", str(file), "--out", str(out)]) == 0
    pair, completion, text = rows_of(out)
    assert pair["reward_chosen"] == completion["reward"]
    better = "chosen" if pair["reward_chosen"] > pair["reward_rejected"] else "rejected"
    assert (pair["preferred"], pair["kept"]) == (better, 1)
    expected = Run(tiny_run).score(["Once", ""], [" a fox.", "Once a fox."])
    assert [completion["reward"], text["reward"]] == pytest.approx(expected.tolist(), abs=1e-3)


def test_score_names_a_row_that_has_nothing_to_score(tiny_run, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"prompt": "a", "chosen": "b"}\n')
    assert cli.main(["score", str(tiny_run), "--file", str(file)]) == 2
    said = capsys.readouterr().err
    assert "row 2" in said
    assert "`chosen` and `rejected`" in said


def test_score_prefers_by_what_it_does_not_round_away(tiny_run, tmp_path, monkeypatch):
    file, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows = [{"prompt": "Once", "chosen": f" {n}.", "rejected": f" no {n}."} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = np.array([1.00002, 1.00001, 0.5, 0.5, -0.00001, 0.00001])
    monkeypatch.setattr(Run, "score", lambda self, prompts, completions: told)
    assert cli.main(["score", str(tiny_run), "--file", str(file), "--out", str(out)]) == 0
    scored = rows_of(out)
    assert [row["preferred"] for row in scored] == ["chosen", "tie", "rejected"]
    assert scored[0]["reward_chosen"] == scored[0]["reward_rejected"] == 1.0


def test_score_reads_conversations_as_training_does(tiny_run, tmp_path, monkeypatch):
    file, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"

    def said(role, text):
        return {"role": role, "content": text}

    asked = [said("user", "Why?")]
    answers = {k: [said("assistant", t)] for k, t in (("chosen", " Air."), ("rejected", " No."))}
    rows = [
        {"prompt": asked, **answers},
        {key: [*asked, *answer] for key, answer in answers.items()},
        {"prompt": asked, "completion": answers["chosen"], "kept": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def score(self, prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return np.arange(len(prompts), dtype=np.float64)

    monkeypatch.setattr(Run, "score", score)
    assert cli.main(["score", str(tiny_run), "--file", str(file), "--out", str(out)]) == 0
    good, bad = ("Why?", " Air."), ("Why?", " No.")
    assert seen == [good, bad, good, bad, good]
    *pairs, completion = rows_of(out)
    assert [pair["preferred"] for pair in pairs] == ["rejected", "rejected"]
    assert completion == rows[2] | {"reward": 4.0}  # the row itself is left as it was
