"""The page is whole, safe and the same each time, whatever stages there are."""

import re
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from minilm.errors import UserError
from minilm.report import plots, write
from minilm.report.files import RunFolder
from minilm.report.page import goodhart, render

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Reader(HTMLParser):
    """Checks nesting, and collects text, ids and whatever would be loaded."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.loads, self.ids, self.tags, self.words = [], [], [], set(), []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.loads += [v for k, v in attrs if k in LOADING and not v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "pre"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(builder) -> tuple[str, Reader]:
    page = write(builder.path).read_text(encoding="utf-8")
    return page, Reader(page)


def full(builder, path):
    return builder(path).pretrain().preferences().reward().rlhf()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures left empty, for tests of the text: drawing is what takes the time."""
    monkeypatch.setattr(plots, "_svg", lambda *args: Markup("<svg></svg>"))


REAL = '[corpus]\nkind = "text"\nfiles = ["a.txt"]\n[judge]\nname = "none"\n'
RUNS = {
    "new": lambda b, p: b(p),
    "pretrained": lambda b, p: b(p).pretrain(),
    "full": full,
    "real text, no judge": lambda b, p: (
        b(p, REAL).pretrain().preferences(gold=False).reward(gold=False).rlhf(golds=None)
    ),
}


@pytest.mark.parametrize("stages", RUNS)
def test_a_run_gives_one_self_contained_file(stages, builder, tmp_path):
    page, read = page_of(RUNS[stages](builder, tmp_path / "r"))
    assert not read.loads  # no network, no other file
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert "script" not in read.tags
    assert len(read.ids) == len(set(read.ids))
    assert len(page) < 1_500_000
    assert not re.search(r"\b(None|nan|Undefined|Markup)\b", read.text)
    for reference in re.findall(r'(?:url\(|href=")#([\w-]+)', page):
        assert reference in read.ids


def test_headline_figures_stand_in_the_page(builder, tmp_path, undrawn):
    _, read = page_of(full(builder, tmp_path / "r"))
    for figure in (
        *("0.0123", "0.600", "81 %", "73.3 %", "85 % of the way", "77.6 %", "80.0 %"),
        *("95 % between 77 % and 83 %", "21,345 tokens/s", "0.455 nats", "3.9 nats"),
    ):
        assert figure in read.text
    assert "Not run yet" not in read.text and "Goodhart" not in read.text


@pytest.mark.parametrize("stages", range(5))
def test_missing_stages_say_so(stages, builder, tmp_path, undrawn):
    run = builder(tmp_path / "r")
    for stage in ("pretrain", "preferences", "reward", "rlhf")[:stages]:
        getattr(run, stage)()
    _, read = page_of(run)
    # Text, pretraining and the coloured story all come from the first stage.
    assert read.text.count("Not run yet") == (4 - stages if stages else 6)
    assert ("0.0123" in read.text) == (stages > 0)


def test_a_stage_under_way_shows_its_curve(builder, tmp_path, undrawn):
    run = builder(tmp_path / "r").pretrain()
    (run.path / "pretrain" / "done.json").unlink()
    _, read = page_of(run)
    assert "Excess over the floor" in read.text


@pytest.mark.parametrize("moved", [False, True])
def test_the_pretrained_model_of_another_run_is_shown(moved, builder, tmp_path, undrawn):
    builder(tmp_path / "first").pretrain()
    init = "elsewhere/first" if moved else str(tmp_path / "first")
    run = builder(tmp_path / "second", init=init).preferences().reward().rlhf()
    page, read = page_of(run)
    assert "0.0123" in read.text and f"pretrained model taken from {init}" in read.text
    # The other run's seed is fixed with its model, so another seed is one of rollouts alone.
    assert f"--init {init} --rlhf.seed 1" in page


def test_a_pretrained_model_that_has_gone_is_no_error(builder, tmp_path, undrawn):
    _, read = page_of(builder(tmp_path / "r", init="runs/gone").preferences())
    assert "from runs/gone, which is no longer there" in read.text


def test_without_a_judge_nothing_is_said_of_gold(builder, tmp_path, undrawn):
    _, read = page_of(RUNS["real text, no judge"](builder, tmp_path / "r"))
    assert "Proxy against KL" in read.text and "no judge" in read.text
    assert "gold win rate" not in read.text and "Bayes ceiling" not in read.text
    assert "0.130 nats/character" in read.text


def test_texts_cannot_break_out(builder, tmp_path, undrawn):
    bad = "<script>alert(1)</script><img src=x onerror=y> \"' & \x00\x1b[31m \u202e \ud800 end"
    run = builder(tmp_path / "r").pretrain((bad, bad)).preferences().reward().rlhf(text=bad)
    page, read = page_of(run)
    assert not read.tags & {"script", "img"}
    assert page.count("&lt;script&gt;") >= 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)
    assert r"\x00\x1b[31m \u202e \ud800 end" in read.text


def test_the_same_files_give_the_same_page(builder, tmp_path):
    run = full(builder, tmp_path / "r")
    first = write(run.path).read_bytes()
    assert write(run.path).read_bytes() == first


def test_a_token_is_coloured_by_its_charge_in_both_rows(builder, tmp_path, undrawn):
    page, read = page_of(builder(tmp_path / "r").pretrain())
    assert page.count('title="proud: loss 0.050 nats, exact 0.045"') == 2
    # sqrt(0.05 / 5) and sqrt(0.045 / 5): a colour's strength
    assert 'style="--a:0.10" title="proud' in page and 'style="--a:0.09" title="proud' in page
    assert "⟨end⟩" in read.text


def test_failures_are_told_apart_and_the_break_is_underlined(builder, tmp_path, undrawn):
    page, read = page_of(builder(tmp_path / "r").pretrain())
    for kind, share in (("slip", "10.0 %"), ("break", "5.0 %"), ("no end", "4.0 %")):
        assert re.search(rf"{kind}: [a-z ]+ {share}", read.text)
    assert re.search(r'class="off"[^>]*>upon a time there was nothing\.<', page)


def rows(golds, proxies):
    return [
        {"step": 10 * i, "kl": 2.0 * i, "gold": g, "proxy": p}
        for i, (g, p) in enumerate(zip(golds, proxies, strict=True))
    ]


def test_goodhart_is_told_with_its_figures(builder, tmp_path, undrawn):
    run = builder(tmp_path / "r").pretrain().preferences().reward().rlhf((0.1, 0.75, 0.5, -0.25))
    sentence = (
        "Goodhart: gold peaked at 0.75 at KL 1.3 (step 10) and then fell by 1.00 to −0.25 at "
        "KL 3.9, while proxy rose from 0.62 to 1.82."
    )
    assert sentence in page_of(run)[1].text


@pytest.mark.parametrize(
    ("golds", "proxies"),
    [
        ((0.1, 0.7, 0.5), (0.0, 1.0, 2.0)),  # a drop of 0.2 is noise
        ((0.1, 0.7, 0.1), (0.0, 1.0, 0.5)),  # proxy fell too: collapse, not Goodhart
        ((0.1, 0.7, 1.1), (0.0, 1.0, 2.0)),
        ((None, None, None), (0.0, 1.0, 2.0)),
        ((), ()),
    ],
)
def test_what_is_not_goodhart_is_not_called_so(golds, proxies):
    assert goodhart(rows(golds, proxies)) is None


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml"):
        write(tmp_path)


def test_a_damaged_file_is_named(builder, tmp_path):
    run = full(builder, tmp_path / "r")
    (run.path / "reward" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        render(RunFolder(run.path))
