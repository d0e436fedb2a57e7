"""The reward model's batches, its report card by hand, and scores that no batch moves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm.config import Config, ModelConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.files import write_json, write_jsonl
from minilm.model import Transformer
from minilm.rewards import Normalization
from minilm.stages import reward as r
from minilm.stages.workspace import Workspace
from minilm.terms import configured
from minilm.text.preferences import Pair, rows_of
from minilm.text.tokenizer import train_tokenizer

TINY = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)  # fmt: skip
TOKENIZER = train_tokenizer(TokenizerConfig(kind="characters"), ["abcdefgh "])


def random_model() -> Transformer:
    shape = jax.eval_shape(
        lambda: Transformer(TINY, TOKENIZER.vocab_size, scalar_head=True, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


MODEL = random_model()
PAIRS = [
    Pair("ab", "c", "de", 4, 5),
    Pair("ab", "fgh", "c", 3, 5),
    Pair("ab", "fgh", "de", 5, 5),
    Pair("h", "a", "bb bb", 1, 2),
    Pair("cc c", "a", "b", 2, 3),
    Pair("cc c", "b", "efgefg", 3, 3),
]


def score(prompts, completions, **options) -> np.ndarray:
    options = {"max_tokens": 48, "batch_size": 4} | options
    return r.score_texts(MODEL, TOKENIZER, prompts, completions, **options)


def pair_losses(pairs) -> np.ndarray:
    """−y log σ(Δ) − (1 − y) log σ(−Δ), each completion scored in a call of its own."""
    gaps = np.concatenate([score([p.prompt] * 2, [p.chosen, p.rejected]) for p in pairs])
    gaps = gaps.astype(np.float64).reshape(-1, 2) @ [1, -1]
    share = np.array([p.votes_chosen / p.votes for p in pairs])
    return share * np.log1p(np.exp(-gaps)) + (1 - share) * np.log1p(np.exp(gaps))


def test_groups_pay_what_pairs_pay_one_by_one():
    """Each completion is scored once and serves all its pairs; absent pairs weigh nothing."""
    groups = r._groups(PAIRS, TOKENIZER, max_tokens=32)
    assert [len(g.rows) for g in groups] == [3, 2, 3]
    assert [len(g.pairs) for g in groups] == [3, 1, 2]
    shape = r._shape(groups)
    loss = jax.jit(lambda m, b: (r.PREFERENCE.totals(r.forward(m, b), b), r.PREFERENCE.counts(b)))
    found = [loss(MODEL, r._batch(groups[i : i + 2], 2, shape)) for i in (0, 2)]  # 2 and 1 groups
    total = sum(float(totals["bradley_terry"]) for totals, _ in found)
    assert sum(float(counts["bradley_terry"]) for _, counts in found) == len(PAIRS)
    assert total == pytest.approx(pair_losses(PAIRS).sum(), rel=1e-5)
    right = sum(float(totals["accuracy"]) for totals, _ in found)
    gaps = score([p.prompt for p in PAIRS], [p.chosen for p in PAIRS]) - score(
        [p.prompt for p in PAIRS], [p.rejected for p in PAIRS]
    )
    majority = np.array([2 * p.votes_chosen > p.votes for p in PAIRS])
    assert right == np.sum((gaps > 0) == majority)


def test_a_prompt_with_many_completions_falls_apart_into_pairs(monkeypatch):
    monkeypatch.setattr(r, "MAX_GROUP", 2)
    groups = r._groups(PAIRS, TOKENIZER, max_tokens=32)
    assert [len(g.pairs) for g in groups] == [1] * 6
    labels = [share for g in groups for *_, share in g.pairs]
    assert labels == [p.votes_chosen / p.votes for p in PAIRS]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [([12, 9, 30], 3), ([8, *9 * [2]], 10), ([30, *9 * [2]], 435 + 9), ([40, 40, 40], 3 * 780)],
)
def test_completions_stay_together_where_that_pads_little(sizes, groups):
    """Twelve each were 66 pairs a prompt, and each text was scored eleven times."""
    pairs = [
        Pair("b" * (k + 1), "a" * i, "a" * j, 1, 1)
        for k, size in enumerate(sizes)
        for i, j in itertools.combinations(range(1, size + 1), 2)
    ]
    found = r._groups(pairs, TOKENIZER, max_tokens=64)
    assert len(found) == groups
    assert sum(len(g.pairs) for g in found) == len(pairs)


def test_long_pairs_are_left_out_and_nothing_left_is_an_error():
    kept = r._groups(PAIRS, TOKENIZER, max_tokens=8)
    assert sum(len(g.pairs) for g in kept) == 5  # "cc c" with "efgefg" has 12 tokens
    with pytest.raises(UserError, match="all 6 pairs are longer") as caught:
        r._groups(PAIRS, TOKENIZER, max_tokens=4)
    assert caught.value.where == "reward.max_tokens"


def test_scores_do_not_depend_on_the_batch():
    """gpt-neox#1285: the same text scored otherwise in other company."""
    prompts, texts = ["ab", "", "cc c", "h", "a"], ["c", "abcdefgh" * 4, "", "bb", "a"]
    together = score(prompts, texts)
    alone = np.concatenate([score([p], [t]) for p, t in zip(prompts, texts, strict=True)])
    np.testing.assert_allclose(together, alone, atol=3e-5)
    np.testing.assert_allclose(score(prompts[::-1], texts[::-1]), together[::-1], atol=3e-5)


def test_a_text_is_read_at_its_end_of_text_even_where_it_was_cut():
    ids = r.encode(TOKENIZER, "ab", "c")
    assert ids == [1, *TOKENIZER.encode("abc"), 1]
    long = score(["ab"], ["c" * 60], max_tokens=16)
    fits = score(["ab"], ["c" * 12], max_tokens=16)  # 1 + 2 + 12 + 1
    np.testing.assert_allclose(long, fits, atol=1e-6)


def test_without_a_limit_a_text_is_read_to_its_end():
    prompts, texts = ["ab"] * 2, ["c de fgh", "abcdefgh" * 9]
    whole = score(prompts, texts, max_tokens=None)
    np.testing.assert_allclose(whole, score(prompts, texts, max_tokens=200), atol=1e-5)
    cut = score(prompts, texts, max_tokens=48)
    assert cut[1] != pytest.approx(whole[1], abs=1e-4)


def test_batches_of_long_texts_are_smaller_and_score_the_same(monkeypatch):
    prompts, texts = ["ab", "h", "c"], ["c" * 40, "de", "fgh" * 9]
    shapes, whole = [], score(prompts, texts)
    monkeypatch.setattr(r, "ATTENDED", 2 * 48**2)

    def batched(function, arrays, size):
        shapes.append((size, arrays[0].shape[1]))
        return np.concatenate([function(*(x[n : n + 1] for x in arrays)) for n in range(3)])

    monkeypatch.setattr(r, "batched", batched)
    np.testing.assert_allclose(score(prompts, texts), whole, atol=3e-5)
    score(prompts, texts, max_tokens=16)
    score(["a"] * 3, ["b" * 200] * 3, max_tokens=None)
    assert shapes == [(2, 48), (4, 16), (1, 208)]


def test_one_long_text_does_not_widen_the_others(monkeypatch):
    prompts, texts = ["ab"] * 9, [*["c de fgh"] * 4, "abcdefgh" * 40, *["fgh"] * 4]
    whole, shapes = score(prompts, texts, max_tokens=400), []
    batched = r.batched

    def watched(function, arrays, size):
        shapes.append(arrays[0].shape)
        return batched(function, arrays, size)

    monkeypatch.setattr(r, "batched", watched)
    np.testing.assert_allclose(score(prompts, texts, max_tokens=None), whole, atol=3e-5)
    assert sorted(shapes) == [(1, 336), (4, 16), (4, 16)]


@pytest.fixture
def ws(tmp_path) -> Workspace:
    ws = Workspace(Config(), tmp_path, None, "float32")
    TOKENIZER.save(ws.tokenizer_file)
    return ws


def report_on(pairs, scores: dict[str, float], ws, monkeypatch):
    """`evaluate` where a completion's score is looked up."""
    monkeypatch.setattr(
        r, "score_texts", lambda m, t, prompts, texts, n: np.array([scores[x] for x in texts])
    )
    return r.evaluate([MODEL], pairs, ws)


def test_the_report_card_by_hand(ws, monkeypatch):
    """Accuracy and log-loss are expectations over the label, since its probability is known."""
    gold = {"a": 1.0, "b": 0.0, "c": -2.0}
    pairs = [
        Pair("p", x, y, 1, 1, gold[x], gold[y]) for x, y in (("a", "b"), ("c", "a"), ("b", "c"))
    ]
    scores = {"a": 0.5, "b": 1.0, "c": -1.0}  # orders a and b wrongly
    report, raw = report_on(pairs, scores, ws, monkeypatch)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    p = [sigmoid(1), sigmoid(-3), sigmoid(2)]  # that the chosen one is preferred
    right = [1 - p[0], 1 - p[1], p[2]]
    gaps = [-0.5, -1.5, 2.0]
    losses = [
        -q * math.log(sigmoid(g)) - (1 - q) * math.log(sigmoid(-g))
        for q, g in zip(p, gaps, strict=True)
    ]
    assert report["accuracy"] == pytest.approx(np.mean(right))
    assert report["log_loss"] == pytest.approx(np.mean(losses))
    assert report["gold_correlation"] == pytest.approx(0.5)  # ranks 3 2 1 against 2 3 1
    # Both ways round: predictions σ(±0.5), σ(±1.5), σ(±2); every one in a bin of its own.
    gap = [abs(sigmoid(g) - q) for g, q in zip(gaps, p, strict=True)]
    assert report["ece"] == pytest.approx(np.mean(gap))
    assert sum(n for *_, n in report["reliability"]) == 6
    assert sorted(raw) == [-1.0, 0.5, 1.0]  # each completion once


def test_ties_count_half_and_votes_stand_in_for_gold(ws, monkeypatch):
    pairs = [Pair("p", "a", "b", 3, 4), Pair("q", "a", "b", 4, 4)]
    report, _ = report_on(pairs, {"a": 1.0, "b": 1.0}, ws, monkeypatch)
    assert report["accuracy"] == 0.5
    assert report["log_loss"] == pytest.approx(math.log(2))
    assert report["gold_correlation"] is None


def batch_of(pairs):
    groups = r._groups(pairs, TOKENIZER, max_tokens=32)
    return r._batch(groups, len(groups), r._shape(groups))


def test_a_completion_s_rating_is_its_rater_s_or_the_share_of_votes_it_won():
    rating = batch_of(PAIRS).rating
    # "c" won 4 of 5 against "de" and lost 2 of 5 against "fgh".
    np.testing.assert_allclose(rating[0], [(0.8 + 0.4) / 2, 0.1, 0.8], rtol=1e-6)
    np.testing.assert_allclose(rating[1], [0.5, 0.5, 0.0], rtol=1e-6)  # no third one
    stars = {"a": 5.0, "b": 2.0, "c": 3.0}
    rated = [
        Pair("a", x, y, rating_chosen=stars[x], rating_rejected=stars[y])
        for x, y in (("a", "b"), ("c", "b"), ("a", "c"))
    ]
    np.testing.assert_array_equal(batch_of(rated).rating[0], [5.0, 2.0, 3.0])


@pytest.mark.parametrize("name", ["plackett_luce", "rating", "ordinal", "language_model"])
def test_terms_over_lists_completions_and_tokens(name):
    """Each against its formula in float64, one list, completion or token at a time."""
    batch = jax.tree.map(jnp.asarray, batch_of(PAIRS))
    rows = {"objective": {name: {"weight": 2.0}, "bradley_terry": {"weight": 0.0}}}
    config = Config.model_validate(rows)
    objective = configured(r.PREFERENCE, "reward", config, 1)
    outputs = jax.jit(r.forward)(MODEL, batch)
    totals, counts = objective.totals(outputs, batch), objective.counts(batch)
    scores, rating = np.asarray(outputs.every, np.float64), np.asarray(batch.rating)
    real = [range(3), range(2), range(3)]
    expected = []
    for m, places in enumerate(real):
        order = sorted(places, key=lambda i: -rating[m, i])
        match name:
            case "plackett_luce":
                loss = 0.0
                for n, i in enumerate(order):
                    rivals = [j for j in order[n + 1 :] if rating[m, j] < rating[m, i]]
                    loss += math.log(sum(math.exp(scores[m, j]) for j in (i, *rivals)))
                    loss -= scores[m, i]
                expected.append(loss)
            case "rating":
                expected += [(scores[m, i] - rating[m, i]) ** 2 for i in places]
            case "ordinal":
                edges = np.array([-np.inf, -1.5, -0.5, 0.5, 1.5, np.inf])
                for i in places:
                    below = 1 / (1 + np.exp(scores[m, i] - edges))
                    grade = round(float(4 * rating[m, i]))
                    expected.append(-math.log(below[grade + 1] - below[grade]))
            case "language_model":
                told = np.asarray(outputs.logits, np.float64)[m]
                told -= np.log(np.exp(told).sum(-1, keepdims=True))
                for i in places:
                    ids = np.asarray(batch.tokens)[m, i, : int(batch.last[m, i]) + 1]
                    expected += [-told[i, t, token] for t, token in enumerate(ids[1:])]
    assert float(counts[name]) == len(expected)
    np.testing.assert_allclose(float(totals[name]), sum(expected), rtol=2e-4)
    np.testing.assert_allclose(
        float(objective.loss(totals, counts)), 2 * np.mean(expected), rtol=2e-4
    )


TEN = ["a" * n for n in range(1, 11)]
LONG_LIST = [
    Pair("h", TEN[j], TEN[i], rating_chosen=float(j), rating_rejected=float(i))
    for j in range(10)
    for i in range(j)
]


def test_a_list_of_ten_is_paid_for_as_a_whole(ws):
    """As 45 lists of two the best would have been picked out of two, nine times."""
    rows = {"plackett_luce": {"weight": 1.0}, "bradley_terry": {"weight": 0.0}}
    ws = space(ws, objective=rows)
    batch = jax.tree.map(jnp.asarray, r.Pairs(ws, LONG_LIST)[0])
    objective = configured(r.PREFERENCE, "reward", ws.config, 1)
    totals = objective.totals(jax.jit(r.forward)(MODEL, batch), batch)
    best_first = score(["h"] * 10, TEN).astype(np.float64)[::-1]
    expected = sum(math.log(np.exp(best_first[n:]).sum()) - best_first[n] for n in range(10))
    assert float(objective.counts(batch)["plackett_luce"]) == 1
    assert float(totals["plackett_luce"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "row", "lists"),
    [
        ("plackett_luce", {}, 1),
        ("rating", {}, 1),
        ("ordinal", {"options": {"high": 9}}, 1),
        ("language_model", {"stages": ("reward",)}, 1),
        ("language_model", {"stages": ("rlhf",)}, 45),
        ("centering", {}, 45),
    ],
)
def test_long_lists_stay_whole_where_a_term_reads_more_than_pairs(
    ws, name, row, lists, monkeypatch
):
    monkeypatch.setattr(r, "MAX_GROUP", 8)  # ten are too many
    objective = {name: {"weight": 0.1} | row}
    batches = r.Pairs(space(ws, objective=objective, reward={"batch_size": 1}), LONG_LIST)
    assert (batches.steps, batches.left_out) == (lists, 0)


def test_the_normalisation_is_read_back_and_its_absence_is_said(ws):
    with pytest.raises(UserError, match="no normalisation of the reward"):
        r.load_normalization(ws.stage("reward"))
    write_json(ws.stage("reward") / "evaluation.json", {"normalization": {"mean": 1.5, "std": 2.0}})
    assert r.load_normalization(ws.stage("reward")) == Normalization(1.5, 2.0)
    write_json(ws.stage("reward") / "evaluation.json", {"normalization": {"mean": 1.5}})
    with pytest.raises(UserError, match="no normalisation of the reward"):
        r.load_normalization(ws.stage("reward"))


def space(ws: Workspace, **sections) -> Workspace:
    """The same folder under another config, with PAIRS to train and to evaluate on."""
    for name in ("train", "held_out"):
        write_jsonl(ws.stage("preferences") / f"{name}.jsonl", rows_of(PAIRS))
    return Workspace(Config.model_validate(sections), ws.out, None, "float32")


def test_held_out_pairs_are_left_out_as_training_ones_are(ws, monkeypatch, capsys):
    """Cut, "cc c" with "efgefg" would be another text, or the one that it is held against."""
    monkeypatch.setattr(r, "_train", lambda *args: (MODEL, 0.0))
    found = r.reward(space(ws, reward={"max_tokens": 8}))
    assert (found["held_out_pairs"], found["held_out_left_out"]) == (5, 1)
    assert found["pairs_left_out"] == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 6 pairs to train on and 1 of 6 held out are longer than reward.max_tokens" in said
    everything = r.reward(space(ws, reward={"max_tokens": 32}))
    assert "left out" not in capsys.readouterr().out
    assert (everything["held_out_pairs"], everything["held_out_left_out"]) == (6, 0)
    with pytest.raises(UserError, match="all 6 held-out pairs are longer"):
        r.reward(space(ws, reward={"max_tokens": 4}))


def test_the_scale_of_users_pairs_needs_some_prompts_alone_and_cuts_no_completion(ws, monkeypatch):
    asked, limits = [], []

    def sample(model, tokenizer, prompts, key, **dials):
        asked.append((list(prompts), dials))
        return None, ["a" * dials["max_new_tokens"]] * len(prompts)

    def score_texts(model, tokenizer, prompts, texts, max_tokens):
        rows = [r.encode(tokenizer, p, t) for p, t in zip(prompts, texts, strict=True)]
        limits.append((max(map(len, rows)), max_tokens))
        return np.arange(len(rows), dtype=np.float32)

    monkeypatch.setattr(r, "sample", sample)
    monkeypatch.setattr(r, "texts_of", lambda samples, tokenizer: samples)
    monkeypatch.setattr(r, "score_texts", score_texts)
    monkeypatch.setattr(Workspace, "load", lambda ws, name, scalar_head: MODEL)
    many = ["ab" * (n % 20) + "c" * (n // 20) for n in range(1000)]
    scores = r._reference_scores(MODEL, many, ws)
    assert len(scores) == r.REFERENCES
    (prompts, _), ((longest, limit),) = asked[0], limits
    assert set(prompts) < set(many)
    assert longest <= limit
    few = ["ab", "c"]
    assert len(r._reference_scores(MODEL, few, ws)) == 2
    assert asked[1][0] == few


def test_ratings_that_grades_would_clip_are_refused_before_the_first_step(ws):
    """One to five stars under the default scale of 0 to 1 were all the highest grade."""
    stars = [Pair("a", "b", "c", rating_chosen=5.0, rating_rejected=2.0)]
    rows = {"ordinal": {"weight": 1.0}}
    with pytest.raises(UserError, match="2 of 2 ratings are not from low to high") as refused:
        r.Pairs(space(ws, objective=rows), stars)
    assert "allowed: 0.0 to 1.0" in str(refused.value)
    rows["ordinal"] |= {"options": {"low": 1, "high": 5}}
    assert r.Pairs(space(ws, objective=rows), stars).steps == 1
    with pytest.raises(UserError, match="are not from low to high"):
        r.Pairs(space(ws, objective=rows), PAIRS)  # shares of votes
