"""`minilm run`: what it leaves, what it skips, what it refuses to mix."""

import fcntl
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from minilm import checkpoint, cli, metrics, run
from minilm.configfile import load, sections
from minilm.errors import UserError
from minilm.files import sha256
from minilm.stages.workspace import Workspace
from minilm.text.fables import stories
from minilm.text.prompts import prompt_sets

# Issue 9, item 14.
FIGURES = {
    "pretrain": "validation_loss validation_nats_per_character entropy_floor excess_loss "
    "parse_share tokens_per_second seconds",
    "preferences": "pairs bayes_accuracy bayes_log_loss",
    "reward": "accuracy log_loss ece gold_correlation seconds",
    "rlhf": "algorithm gold_win_rate gold_win_rate_low gold_win_rate_high gold_before gold_after "
    "proxy_before proxy_after kl parse_share_before parse_share_after seconds",
    "environment": "compute_dtype matmul_gflops jax jaxlib cpu cores device",
}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its time of change, the lock apart."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in found}


@pytest.mark.parametrize("section", FIGURES)
def test_the_summary_has_the_figures_that_scripts_read(tiny_run, section):
    found = read(tiny_run / "summary.json")[section]
    assert set(FIGURES[section].split()) <= found.keys()
    assert None not in [found[name] for name in FIGURES[section].split()]


def test_shares_and_losses_have_the_units_that_the_names_promise(tiny_run):
    s = read(tiny_run / "summary.json")
    pretrain, rlhf = s["pretrain"], s["rlhf"]
    excess = pretrain["validation_loss"] - pretrain["entropy_floor"]
    assert pretrain["excess_loss"] == pytest.approx(excess)
    assert 0.5 <= s["preferences"]["bayes_accuracy"] <= 1
    assert (
        0 <= rlhf["gold_win_rate_low"] <= rlhf["gold_win_rate"] <= rlhf["gold_win_rate_high"] <= 1
    )
    assert rlhf["kl"] > 0


def test_the_same_command_again_changes_nothing_and_says_so(tiny, tiny_run, processes):
    before = files(tiny_run)
    done = processes("run", tiny, "--out", tiny_run)
    assert done.code == 0
    assert "nothing changed" in done.output
    assert files(tiny_run) == before


def test_finding_that_nothing_changed_does_without_jax(tiny, tiny_run):
    """So that it takes a second, not ten."""
    words = ["run", str(tiny), "--out", str(tiny_run)]
    code = f"import sys; from minilm.cli import main; main({words}); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_key_that_an_older_version_lacked_changes_nothing_while_it_has_its_default(
    tiny, tiny_run, tmp_path, processes
):
    """An upgrade asked for --redo of stages whose new keys nobody had set."""
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    for name in ("done.json", "started.json"):
        path = out / "rlhf" / name
        stored = json.loads(path.read_text())
        del stored["sections"]["rlhf"]["kl_budget"]
        path.write_text(json.dumps(stored | {"hash": "of an older version"}))
    assert "nothing changed" in processes("run", tiny, "--out", out).output
    done = processes("run", tiny, "--out", out, "--rlhf.kl-budget=3.0")
    assert "stage rlhf was done with other settings; changed: rlhf.kl_budget\n" in done.output


@pytest.mark.parametrize(
    ("option", "stage"),
    [
        ("--pretrain.steps=41", "pretrain"),
        ("--corpus.documents=700", "pretrain"),
        ("--preferences.raters=2", "preferences"),
        ("--reward.optimizer.learning-rate=0.5", "reward"),
        ("--rlhf.kl-coef=0.5", "rlhf"),
    ],
)
def test_a_changed_key_of_a_finished_stage_stops_and_is_named(
    tiny, tiny_run, processes, option, stage
):
    before = files(tiny_run)
    done = processes("run", tiny, "--out", tiny_run, option)
    assert done.code == 2
    key = option.removeprefix("--").partition("=")[0].replace("-", "_")
    assert f"stage {stage} was done with other settings; changed: {key}\n" in done.output
    assert f"--redo {stage}" in done.output
    assert files(tiny_run) == before


def test_a_misspelt_name_in_a_finished_stage_is_told_as_a_misspelling(tiny, tiny_run, processes):
    done = processes("run", tiny, "--out", tiny_run, "--rlhf.algorithm=ppoo")
    assert done.code == 2
    assert "did you mean 'ppo'" in done.output


def test_redo_remakes_a_stage_and_keeps_the_old_one(tiny, tiny_copy, processes):
    old, before = read(tiny_copy / "rlhf" / "done.json"), files(tiny_copy / "reward")
    done = processes("run", tiny, "--out", tiny_copy, "--redo", "rlhf", "--rlhf.seed", 1)
    assert done.code == 0, done.output
    assert read(tiny_copy / "rlhf.old1" / "done.json") == old
    assert read(tiny_copy / "rlhf" / "done.json")["sections"]["rlhf"]["seed"] == 1
    assert checkpoint.find(tiny_copy).parent == tiny_copy / "rlhf" / "checkpoints"
    assert files(tiny_copy / "reward") == before


def test_a_kl_budget_keeps_the_last_policy_within_it(tiny, tiny_copy, processes):
    """The uninterrupted run is at `kls[0]` after 3 steps and at `kls[1]`, more, after 6."""
    records = metrics.read(tiny_copy / "rlhf" / "metrics.jsonl")
    kls = [r["kl"] for r in records if r["kind"] == "eval"][1:]
    assert kls[1] > kls[0] > 0
    between = ["--redo", "rlhf", "--rlhf.kl-budget", (kls[0] + kls[1]) / 2]
    done = processes("run", tiny, "--out", tiny_copy, *between)
    assert done.code == 0, done.output
    assert "stopped at step 6, back to the best, step 3" in done.output
    assert checkpoint.metadata(checkpoint.find(tiny_copy / "rlhf"))["step"] == 3
    tight = ["--redo", "rlhf", "--rlhf.kl-budget", kls[0] / 2]
    done = processes("run", tiny, "--out", tiny_copy, *tight)
    assert done.code == 2
    assert "at the first evaluation already" in done.output


def test_redo_of_a_stage_that_would_not_run_leaves_everything(tiny, tiny_run, processes):
    before = files(tiny_run)
    done = processes("reward", tiny, "--out", tiny_run, "--redo", "pretrain")
    assert (done.code, files(tiny_run)) == (2, before)


def test_redo_with_a_mistake_in_the_command_leaves_everything(tiny, tiny_run, processes):
    before = files(tiny_run)
    words = ["run", tiny, "--out", tiny_run, "--redo", "preferences"]
    for mistake in (["--judge.name", "lenght"], ["--pretrain.steps", 41]):
        done = processes(*words, *mistake)
        assert (done.code, files(tiny_run)) == (2, before), done.output


def test_a_single_stage_is_not_built_on_a_stage_made_from_other_config(tiny, tiny_run, processes):
    """Else a reward model's report card would be read with the wrong raters."""
    before = files(tiny_run)
    done = processes(
        "reward", tiny, "--out", tiny_run, "--redo", "reward", "--preferences.raters", 2
    )
    assert done.code == 2
    assert "changed: preferences.raters" in done.output
    assert files(tiny_run) == before


def test_training_and_evaluation_use_prompts_of_their_own(tiny, tiny_copy, monkeypatch):
    """What trains must not report: the evaluation prompts are read once, at the end."""
    ws = Workspace(load(tiny), tiny_copy, None, "float32")
    sets = prompt_sets(ws.config, ws.tokenizer, ws.held_out())
    trained, asked = [], []

    def make_collect(*arguments, **options):
        trained.extend(arguments[4])
        return lambda model, k: None

    def fit(*arguments, evaluate, **options):
        evaluate(types.SimpleNamespace(model=None))
        return None, {"seconds": 0.0}

    def evaluator(self, policy, prompt_set, samples_file=None):
        asked.append(prompt_set)
        return {}

    monkeypatch.setattr("minilm.stages.rlhf.make_collect", make_collect)
    monkeypatch.setattr("minilm.stages.rlhf.fit", fit)
    monkeypatch.setattr("minilm.stages.policy.PolicyEvaluator.__call__", evaluator)
    run.rlhf_and_evaluation(ws)
    assert [ws.tokenizer.decode(row) for row in trained] == sets.rlhf
    assert asked == ["development", "evaluation"]


def test_until_includes_its_stage_and_goes_no_further(tiny, tmp_path, processes):
    words = ["--corpus.kind", "pydoc", "--until", "pretrain"]
    done = processes("run", tiny, "--out", tmp_path / "run", *words)
    assert done.code == 0, done.output
    summary = read(tmp_path / "run" / "summary.json")
    assert summary.keys() == {"pretrain", "environment"}
    assert 0 < summary["pretrain"]["validation_nats_per_character"] < 10
    assert summary["pretrain"]["entropy_floor"] is None
    assert (tmp_path / "run" / "report.html").exists()


def test_local_text_takes_the_same_door(tiny, tmp_path, processes):
    text = tmp_path / "book.txt"
    told = "\r\n\n".join(story.text for story in stories(seed=5, count=300, size="small"))
    text.write_text(told, newline="")
    words = ["--corpus.kind", "text", "--corpus.files", text]
    out = tmp_path / "run"
    done = processes("pretrain", tiny, "--out", out, *words)
    assert done.code == 0, done.output
    (held_out,) = map(json.loads, (out / "pretrain" / "held_out.jsonl").read_text().splitlines())
    assert told.endswith(held_out["text"])  # the end, "\r\n" and all
    text.write_text("Another book. " * 400)
    done = processes("pretrain", tiny, "--out", out, *words)
    assert done.code == 2
    assert f"changed: the input {text}" in done.output


def test_init_takes_the_pretrained_model_of_another_run(tiny, tiny_run, tmp_path, processes):
    out = tmp_path / "run"
    done = processes("run", tiny, "--out", out, "--init", tiny_run, "--until", "reward")
    assert done.code == 0, done.output
    assert not (out / "pretrain").exists()
    ours, theirs = (read(folder / "reward" / "done.json") for folder in (out, tiny_run))
    assert ours["hash"] == theirs["hash"]
    for figures in (ours["summary"], theirs["summary"]):
        del figures["seconds"]
    assert ours["summary"] == theirs["summary"]

    other = shutil.copytree(tiny_run, tmp_path / "other")
    pretrained = read(other / "pretrain" / "done.json")
    (other / "pretrain" / "done.json").write_text(json.dumps(pretrained | {"hash": "another"}))
    done = processes("run", tiny, "--out", out, "--init", other)
    assert done.code == 2
    assert "changed: the input pretrain" in done.output


def test_init_from_another_world_is_refused_by_key(tiny, tiny_run, tmp_path, processes):
    words = ["--init", tiny_run, "--corpus.size", "full", "--model.num-layers", 2]
    done = processes("run", tiny, "--out", tmp_path / "run", *words)
    assert done.code == 2
    assert "corpus.size, model.num_layers" in done.output


def test_init_whose_text_has_changed_since_is_refused(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("once upon a time")
    config = load(tiny, ["--corpus.kind", "text", "--corpus.files", str(text)])
    (tmp_path / "init" / "pretrain").mkdir(parents=True)
    made_from = {
        "sections": sections(config, ("seed", "corpus", "tokenizer", "model")),
        "inputs": {str(text): sha256(text)[:16]},
    }
    (tmp_path / "init" / "pretrain" / "done.json").write_text(json.dumps(made_from))
    cases = ("once upon a time", "nothing to do"), ("another", "text.txt"), ("", "nothing to do")
    for words, problem in cases:  # where the text is not at hand, the model serves all the same
        text.write_text(words) if words else text.unlink()
        with pytest.raises(UserError, match=problem):
            run.run(config, tmp_path / "run", init=tmp_path / "init", only="pretrain")


def test_a_judge_of_the_users_own_is_an_input_of_what_it_labels_and_pays(
    tiny, tmp_path, monkeypatch
):
    path = tmp_path / "mine_twice.py"
    path.write_text("def s(prompts, texts): return [0.0] * len(texts)")
    monkeypatch.syspath_prepend(tmp_path)
    read = {}
    for key in ("judge.name", "preferences.rater-judge"):
        config = load(tiny, [f"--{key}", "mine_twice:s"])
        read[key] = [list(run._files_read(stage, config)) for stage in ("preferences", "rlhf")]
    one = [str(path)]
    assert read == {"judge.name": [one, one], "preferences.rater-judge": [one, []]}
    assert run._files_read("rlhf", load(tiny, ["--judge.name", "builtins:len"])) == {}


@pytest.mark.parametrize(
    ("stage", "present", "missing"),
    [
        ("rlhf", (), "pretrain"),
        ("rlhf", ("pretrain", "preferences"), "reward"),
        ("reward", ("preferences",), "pretrain"),
        ("preferences", (), "pretrain"),
    ],
)
def test_a_stage_without_its_inputs_is_an_error(
    tiny, tiny_run, tmp_path, processes, stage, present, missing
):
    for name in present:
        shutil.copytree(tiny_run / name, tmp_path / "run" / name)
    done = processes(stage, tiny, "--out", tmp_path / "run")
    assert done.code == 2
    assert f"needs the result of {missing}, which is not there" in done.output
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_users_own_pairs_without_a_judge_serve_to_the_end(tiny, tiny_run, tmp_path, processes):
    """TRL's {prompt, chosen, rejected}, extra columns and all."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Prompt {n % 8}.", "chosen": f" Good {n}.", "rejected": f" Bad {n}.", "id": n}
        for n in range(24)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--init", tiny_run, "--preferences.file", pairs, "--judge.name", "none"]
    done = processes("run", tiny, "--out", tmp_path / "run", *words)
    assert done.code == 0, done.output
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["preferences"]["pairs"] + summary["preferences"]["held_out_pairs"] == 24
    assert summary["preferences"]["bayes_accuracy"] is None
    assert summary["reward"]["pairs_left_out"] == 0
    count = summary["preferences"]["held_out_pairs"]
    points = round(196 * (0.25 / count) ** 0.5)
    assert f"{count} held-out pairs: they tell an accuracy to about ±{points} points" in done.output
    assert 0 <= summary["reward"]["accuracy"] <= 1
    assert summary["rlhf"]["gold_win_rate"] is None
    assert summary["rlhf"]["kl"] > 0
    assert "Good 3." in "".join(
        (tmp_path / "run" / "preferences" / f"{name}.jsonl").read_text()
        for name in ("train", "held_out")
    )


def test_a_page_that_cannot_be_made_costs_no_run(tiny, tiny_copy, monkeypatch, capsys):
    """Nor does a run that was killed before summary and page were written stay without them."""

    def broken(out):
        raise RuntimeError("no page today")

    expected = read(tiny_copy / "summary.json")
    (tiny_copy / "summary.json").unlink()
    (tiny_copy / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("minilm.report.write", broken)
        assert cli.main(["run", str(tiny), "--out", str(tiny_copy)]) == 0
    assert read(tiny_copy / "summary.json") == expected
    assert not (tiny_copy / "report.html").exists()
    assert cli.main(["run", str(tiny), "--out", str(tiny_copy)]) == 0
    assert (tiny_copy / "report.html").exists()


def test_one_process_at_a_time_works_in_a_run_folder(tiny, tiny_copy, processes):
    with (tiny_copy / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = processes("run", tiny, "--out", tiny_copy)
    assert done.code == 2
    assert "another process works in this run folder" in done.output
    assert processes("run", tiny, "--out", tiny_copy).code == 0


def test_the_folder_is_named_after_the_config(tiny, tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", str(tiny)]) == 0
    assert "are done in runs/tiny" in capsys.readouterr().out
