"""Labels against the probabilities they are drawn with, and files of the user's own."""

import json
import math

import numpy as np
import pytest

from minilm.config import PreferencesConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.text.preferences import (
    Pair,
    bayes_rates,
    check_worth_training_on,
    chosen_probability,
    fitting,
    label_pairs,
    label_probabilities,
    pairs_from,
    rater_agreement,
    rows_of,
)
from minilm.text.tokenizer import train_tokenizer


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def labelled(gold, *, completions=None, seed=0, raters=1, seen=None, **dials) -> list[Pair]:
    gold = np.asarray(gold, float)
    texts = completions or [[f"story {j}" for j in range(gold.shape[1])]] * len(gold)
    prompts = [f"prompt {i}" for i in range(len(gold))]
    config = PreferencesConfig(raters=raters, **dials)
    return label_pairs(prompts, texts, gold, np.random.default_rng(seed), config, seen)


def expected_vote(gap, **dials):
    return chosen_probability(np.asarray(gap, float), PreferencesConfig(**dials))


def within(count: int, expected: float, draws: int) -> bool:
    """A binomial count within 4.5 standard deviations: a false alarm in 150,000."""
    p = expected / draws
    return abs(count - expected) <= 4.5 * math.sqrt(draws * p * (1 - p))


def test_a_raters_probability_is_the_logistic_of_the_gap_over_the_temperature():
    found = expected_vote([0.0, 1.0, -3.0], rater_temperature=2.0)
    np.testing.assert_allclose(found, [0.5, sigmoid(0.5), sigmoid(-1.5)])
    flipped = expected_vote([2.0], flip_rate=0.1)
    np.testing.assert_allclose(flipped, 0.9 * sigmoid(2) + 0.1 * sigmoid(-2))


def test_huge_gaps_do_not_overflow():
    found = expected_vote([1e6, -1e6], rater_temperature=1e-3)
    assert found.tolist() == [1.0, 0.0]


def test_all_pairs_of_different_completions_are_labelled():
    pairs = labelled(
        [[1.0, 2.0, 2.0, 3.0]], completions=[["a", "b", "b", "c"]]
    )  # fmt: skip
    met = [frozenset((p.chosen, p.rejected)) for p in pairs]
    assert sorted(map(sorted, met)) == [["a", "b"], ["a", "b"], ["a", "c"], ["b", "c"], ["b", "c"]]


def test_gold_goes_with_its_text_whichever_was_chosen():
    gold = {"story 0": -1.0, "story 1": 0.5, "story 2": 2.0}
    pairs = labelled([list(gold.values())] * 200)
    assert all(
        (p.gold_chosen, p.gold_rejected) == (gold[p.chosen], gold[p.rejected]) for p in pairs
    )
    assert {p.chosen for p in pairs} == set(gold)


def test_the_chosen_one_has_the_votes():
    pairs = labelled([[0.0, 0.3]] * 500, raters=5)
    assert {p.votes for p in pairs} == {5}
    assert {p.votes_chosen for p in pairs} == {3, 4, 5}


@pytest.mark.parametrize("flip_rate", [0.0, 0.2])
def test_votes_follow_bradley_and_terry(flip_rate):
    """The better one is chosen as often as its probability says, flips included."""
    count, gap = 4000, 1.5
    pairs = labelled([[gap, 0.0]] * count, flip_rate=flip_rate, rater_temperature=0.8)
    p = sigmoid(gap / 0.8)
    p = (1 - flip_rate) * p + flip_rate * (1 - p)
    better = sum(x.chosen == "story 0" for x in pairs)
    assert within(better, count * p, count)


def test_the_number_of_votes_is_binomial():
    count, raters, gap = 3000, 4, 0.7
    pairs = labelled([[gap, 0.0]] * count, raters=raters)
    votes = [p.votes_chosen if p.chosen == "story 0" else raters - p.votes_chosen for p in pairs]
    p = sigmoid(gap)
    for n in range(raters + 1):
        expected = count * math.comb(raters, n) * p**n * (1 - p) ** (raters - n)
        assert within(votes.count(n), expected, count), n


def test_a_tie_goes_to_either():
    """Ties that always fell to the first completion would teach the model its place."""
    pairs = [p for p in labelled([[0.0, 0.0]] * 3000, raters=2) if p.votes_chosen == 1]
    assert len(pairs) > 1000
    assert within(sum(p.chosen == "story 0" for p in pairs), len(pairs) / 2, len(pairs))


@pytest.mark.parametrize("flip_rate", [0.0, 0.1])
def test_bayes_rates_against_enumeration(flip_rate):
    """Over both labels of each pair: what the best guesser gets right, and what it pays."""
    golds = [(0.0, 0.0), (1.0, -1.0), (-2.0, 0.5), (4.0, 0.0)]
    pairs = [Pair("p", "a", "b", gold_chosen=a, gold_rejected=b) for a, b in golds]
    right, loss = 0.0, 0.0
    for a, b in golds:
        clean = sigmoid((a - b) / 0.7)
        first = (1 - flip_rate) * clean + flip_rate * (1 - clean)
        for probability, guess in ((first, first >= 0.5), (1 - first, first < 0.5)):
            right += probability * guess / len(golds)
            loss -= probability * math.log(probability) / len(golds)
    raters = PreferencesConfig(rater_temperature=0.7, flip_rate=flip_rate)
    probabilities, known = label_probabilities(pairs, raters)
    found = bayes_rates(probabilities)
    assert known
    assert found == pytest.approx((right, loss), rel=1e-9)


def test_bayes_rates_of_certain_pairs_are_one_and_zero():
    accuracy, loss = bayes_rates(np.array([1.0]))
    assert (accuracy, loss) == (1.0, pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize(
    ("gold", "file"),
    [((None, None), None), ((1.0, None), None), ((80.0, 20.0), "their.jsonl")],
    ids=["no gold", "half of it", "a file of unknown raters"],
)
def test_where_the_raters_are_not_ours_the_label_is_the_share_of_votes(gold, file):
    """Gold of 0 to 100 in a user's file says nothing of a logistic rater at temperature 1."""
    pairs = [Pair("p", "a", "b", 3, 4, *gold), Pair("p", "a", "b", 3, 5, 1.0, 0.0)]
    found, known = label_probabilities(pairs, PreferencesConfig(file=file))
    np.testing.assert_allclose(found, [0.75, 0.6])
    assert not known


def test_pairs_survive_the_file():
    pairs = [
        Pair("Once, “the” fox.", " It\nran.", " Ït slept.", 4, 5, 1.25, -0.5),
        Pair("p", "a", "b"),
    ]
    rows = json.loads(json.dumps(rows_of(pairs)))
    assert pairs_from(rows, "pairs.jsonl") == pairs
    assert set(rows[1]) == {"prompt", "chosen", "rejected", "votes_chosen", "votes"}


def test_trls_own_form_is_read_and_extra_keys_are_ignored():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "rater": "ann", "label_flipped": True}]
    assert pairs_from(rows, "x") == [Pair("p", "a", "b")]


SAID = {"role": "assistant", "content": "a"}
GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing field 'rejected'"),
        (GOOD | {"chosen": 3}, "'chosen' must be a text"),
        (
            {"prompt": {"role": -2}, "chosen": [SAID], "rejected": [SAID | {"content": "b"}]},
            "'prompt' must be a text",
        ),
        (
            GOOD | {"rejected": GOOD["chosen"]},
            "'chosen' and 'rejected' are the same text: there is nothing to prefer",
        ),
        (GOOD | {"votes": "5"}, "'votes' must be a number"),
        (GOOD | {"votes": True}, "'votes' must be a number"),
        (GOOD | {"votes_chosen": 2.5, "votes": 5}, "'votes_chosen' must be a number"),
        (GOOD | {"gold_chosen": "high"}, "'gold_chosen' must be a number"),
        (GOOD | {"gold_chosen": math.nan}, "'gold_chosen' must be a finite number"),
        (GOOD | {"rating_rejected": -math.inf}, "'rating_rejected' must be a finite number"),
        (GOOD | {"votes_chosen": 1, "votes": 10**400}, "'votes' must be a finite number"),
        (GOOD | {"votes": 5}, "votes and votes_chosen need each other"),
        (GOOD | {"votes_chosen": 1}, "votes and votes_chosen need each other"),
        (GOOD | {"votes_chosen": 6, "votes": 5}, "votes_chosen must lie between 0 and votes"),
        (GOOD | {"votes_chosen": -1, "votes": 5}, "votes_chosen must lie between 0 and votes"),
        (GOOD | {"votes_chosen": 0, "votes": 0}, "votes_chosen must lie between 0 and votes"),
    ],
)
def test_a_bad_line_is_named_with_its_field(bad, said):
    with pytest.raises(UserError) as caught:
        pairs_from([GOOD, bad], "pairs.jsonl")
    assert caught.value.problem == said
    assert caught.value.where == "pairs.jsonl:2"


def test_a_file_without_pairs_is_an_error():
    with pytest.raises(UserError, match="no preference pairs"):
        pairs_from([], "pairs.jsonl")


def test_a_tie_is_half_a_vote_and_follows_rao_and_kupper():
    """P(win) = σ(gap − band), P(loss) = σ(−gap − band), the rest is called a tie."""
    count, band, gap = 4000, 0.8, 0.5
    pairs = labelled([[gap, 0.0]] * count, tie_band=band)
    votes = [p.votes_chosen if p.chosen == "story 0" else 2 - p.votes_chosen for p in pairs]
    assert {p.votes for p in pairs} == {2}
    win, loss = sigmoid(gap - band), sigmoid(-gap - band)
    assert within(votes.count(2), count * win, count)
    assert within(votes.count(0), count * loss, count)
    assert within(votes.count(1), count * (1 - win - loss), count)
    np.testing.assert_allclose(expected_vote(gap, tie_band=band), win + (1 - win - loss) / 2)
    p, known = label_probabilities(pairs[:1], PreferencesConfig(tie_band=band))
    assert known
    sign = 1 if pairs[0].chosen == "story 0" else -1
    np.testing.assert_allclose(p, expected_vote([sign * gap], tie_band=band))


def test_a_liking_for_what_is_shown_first_blurs_and_does_not_turn():
    found = expected_vote([0.0, 1.0], position_bias=2.0)
    np.testing.assert_allclose(found, [0.5, (sigmoid(3.0) + sigmoid(-1.0)) / 2])


def test_raters_vote_by_what_they_see_and_gold_stays_what_it_is():
    seen = np.array([[0.0, 3.0]] * 200)
    pairs = labelled([[1.0, -1.0]] * 200, raters=5, seen=seen)
    assert np.mean([p.chosen == "story 1" for p in pairs]) > 0.9
    assert all(p.gold_chosen == (1.0 if p.chosen == "story 0" else -1.0) for p in pairs)
    p, known = label_probabilities(pairs, PreferencesConfig(raters=5))
    assert known
    chose_seen = np.array([p.chosen == "story 1" for p in pairs])
    np.testing.assert_allclose(p, np.where(chose_seen, sigmoid(3.0), sigmoid(-3.0)))
    again = pairs_from(rows_of(pairs), "train.jsonl")
    assert again == pairs


def test_vote_i_is_by_rater_i_modulo_their_number():
    """Two raters sure of opposite things: of three votes the first has two, of one the only."""
    seen = np.array([[[60.0, 0.0]] * 50, [[0.0, 60.0]] * 50])
    for raters, share in ((1, 1.0), (2, 0.5), (3, 2 / 3), (4, 0.5)):
        pairs = labelled([[0.0, 0.0]] * 50, raters=raters, seen=seen)
        first = [p.chosen == "story 0" for p in pairs]
        votes = [
            p.votes_chosen if a else p.votes - p.votes_chosen
            for p, a in zip(pairs, first, strict=True)
        ]
        assert {v / raters for v in votes} == {share}
        p, known = label_probabilities(pairs, PreferencesConfig(raters=raters))
        assert known
        np.testing.assert_allclose(p, [share if a else 1 - share for a in first], atol=1e-12)
        assert pairs_from(json.loads(json.dumps(rows_of(pairs))), "train.jsonl") == pairs


@pytest.mark.parametrize("band", [0.0, 0.8])
def test_the_share_of_votes_is_the_mean_over_the_raters_that_cast_them(band):
    """Each by Rao and Kupper of their own gap, with flips; three have five votes, 2, 2 and 1."""
    count, gaps, flip = 3000, (1.5, -0.4, -2.0), 0.1
    seen = np.array([[[gap, 0.0]] * count for gap in gaps])
    dials = {"raters": 5, "tie_band": band, "flip_rate": flip}
    pairs = labelled([[9.0, 0.0]] * count, seen=seen, **dials)
    means, variance = [], 0.0
    for gap in (gaps * 2)[:5]:
        win, loss = sigmoid(gap - band), sigmoid(-gap - band)
        win, loss = (1 - flip) * win + flip * loss, (1 - flip) * loss + flip * win
        means.append(win + (1 - win - loss) / 2)
        variance += win + (1 - win - loss) / 4 - means[-1] ** 2
    shares = [
        (p.votes_chosen if p.chosen == "story 0" else p.votes - p.votes_chosen) / p.votes
        for p in pairs
    ]
    error = math.sqrt(variance / count) / 5
    assert abs(np.mean(shares) - np.mean(means)) < 4.5 * error
    assert error < 0.005
    p, _ = label_probabilities(pairs[:1], PreferencesConfig(**dials))
    expected = np.mean(means) if pairs[0].chosen == "story 0" else 1 - np.mean(means)
    np.testing.assert_allclose(p, [expected])


@pytest.mark.parametrize("raters", [1, 2, 5])
def test_two_votes_agree_as_often_as_all_pairs_of_votes_say(raters):
    config = PreferencesConfig(raters=raters, flip_rate=0.1)
    gaps = (1.5, -0.4, -2.0)
    pair = Pair("", "a", "b", 1, raters, 1.0, 0.0, seen_gaps=gaps)
    p = [0.1 + 0.8 * sigmoid(gap) for gap in (gaps * 2)[:raters]]
    both = [(a, b) for i, a in enumerate(p) for j, b in enumerate(p) if i != j or raters == 1]
    expected = np.mean([a * b + (1 - a) * (1 - b) for a, b in both])
    np.testing.assert_allclose(rater_agreement([pair], config), [expected])


def test_what_one_rater_saw_is_read_of_older_files_too():
    gold = {"gold_chosen": 1.0, "gold_rejected": 0.0}
    (pair,) = pairs_from([GOOD | gold | {"seen_chosen": 0.5, "seen_rejected": 2.0}], "train.jsonl")
    p, known = label_probabilities([pair, pair._replace(seen_gaps=None)], PreferencesConfig())
    assert known
    np.testing.assert_allclose(p, [sigmoid(-1.5), sigmoid(1.0)])


@pytest.mark.parametrize("gaps", [[], [1.0, None], [math.nan], 1.0, "a"])
def test_gaps_that_are_no_numbers_are_named(gaps):
    with pytest.raises(UserError, match="'seen_gaps' must be a list of finite") as refused:
        pairs_from([GOOD, GOOD | {"seen_gaps": gaps}], "train.jsonl")
    assert refused.value.where == "train.jsonl:2"


def test_coverage_is_the_share_of_pairs_that_is_labelled():
    pairs = labelled([[0.0, 1.0, 2.0, 3.0]] * 500, coverage=0.3)
    assert within(len(pairs), 0.3 * 3000, 3000)


def test_a_pair_fits_with_the_tokens_that_begin_and_end_its_texts():
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["abcdefgh "])
    pairs = [Pair("ab", "c", "def"), Pair("ab", "cdef", "c"), Pair("ab", "c", "defg")]
    assert fitting(pairs, tokenizer, 7) == pairs[:1]
    assert fitting(pairs, tokenizer, 8) == pairs
    with pytest.raises(UserError, match="all 3 pairs are longer") as caught:
        fitting(pairs, tokenizer, 6)
    assert "the shortest has 7 tokens, the longest 8" in str(caught.value)
    with pytest.raises(UserError, match="all 3 held-out pairs are longer") as refused:
        fitting(pairs, tokenizer, 6, "held-out pairs")
    assert refused.value.where == "reward.max_tokens"


@pytest.mark.parametrize("dials", [{}, {"tie_band": 0.5}, {"position_bias": 2.0}])
def test_votes_on_what_a_judge_finds_alike_are_refused(dials):
    """Five raters leave no tie, yet there was nothing but chance to train on."""
    raters = PreferencesConfig(raters=5, **dials)
    alike = labelled([[0.7] * 3] * 20, raters=5, **dials)
    with pytest.raises(UserError, match="their votes are noise") as refused:
        check_worth_training_on(alike, "judge.name", raters)
    assert refused.value.where == "judge.name"
    check_worth_training_on([*alike, *labelled([[0.0, 0.1]], raters=5, **dials)], "", raters)
    # In a file, gold is not what its raters judged by.
    check_worth_training_on(alike, "theirs.jsonl")


def test_raters_that_see_a_difference_where_gold_has_none_are_heard():
    pairs = labelled([[1.0, 1.0]] * 9, raters=5, seen=np.array([[0.0, 2.0]] * 9))
    check_worth_training_on(pairs, "preferences.rater_judge", PreferencesConfig(raters=5))
