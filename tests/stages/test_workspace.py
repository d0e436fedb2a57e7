"""Where stages find their inputs, and what they say when these do not fit."""

import jax
import numpy as np
import pytest
from flax import nnx

from minilm import checkpoint
from minilm.config import Config, ModelConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.files import write_json, write_jsonl
from minilm.model import Transformer
from minilm.stages.workspace import Workspace, load_model
from minilm.text.store import Document
from minilm.text.tokenizer import train_tokenizer

TINY = ModelConfig(
    num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
)  # fmt: skip
CONFIG = Config(model=TINY, tokenizer=TokenizerConfig(kind="bytes"))
BYTES = train_tokenizer(CONFIG.tokenizer, [])
LETTERS = train_tokenizer(TokenizerConfig(kind="characters"), ["abc"])


def model(*, scalar_head: bool = False) -> Transformer:
    """Each number another, so that nothing is mistaken for anything else."""
    shape = jax.eval_shape(
        lambda: Transformer(TINY, BYTES.vocab_size, scalar_head=scalar_head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shape)


@pytest.fixture
def ws(tmp_path) -> Workspace:
    """A run with a pretrained model and a reward model."""
    ws = Workspace(CONFIG, tmp_path, None, "float32")
    BYTES.save(ws.tokenizer_file)
    for stage, head in (("pretrain", False), ("reward", True)):
        checkpoint.save(
            ws.stage(stage) / "checkpoints", 5, {"model": model(scalar_head=head)},
            ws.metadata(stage, scalar_head=head) | {"steps": 5}, keep=1,
        )  # fmt: skip
        write_json(ws.stage(stage) / "done.json", {})
    write_jsonl(ws.stage("pretrain") / "held_out.jsonl", [{"text": "a", "id": "1"}])
    return ws


def arrays(module) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in checkpoint.flatten(module).items()}


def test_a_stages_model_comes_back_as_saved(ws):
    found, expected = arrays(ws.load("pretrain")), arrays(model())
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert ws.load("reward").score is not None


def test_a_scalar_head_is_added_as_zeros_and_taken_away_and_nothing_else_changes(ws):
    plain = arrays(model())
    added = arrays(ws.load("pretrain", scalar_head=True))
    np.testing.assert_array_equal(added.pop("score"), 0)
    with_head = arrays(model(scalar_head=True))
    removed = arrays(ws.load("reward", scalar_head=False))
    del with_head["score"]
    for found, expected in ((added, plain), (removed, with_head)):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_checkpoint_alone_tells_its_models_shape_and_dtype(ws):
    path = checkpoint.find(ws.stage("reward"))
    found, meta = load_model(path)
    assert (found.config, found.compute_dtype, meta["scalar_head"]) == (TINY, "float32", True)
    assert load_model(path, compute_dtype="bfloat16")[0].compute_dtype == "bfloat16"


def test_a_model_of_another_tokenizer_is_refused(ws):
    LETTERS.save(ws.tokenizer_file)
    other = Workspace(CONFIG, ws.out, None, "float32")
    with pytest.raises(UserError, match="reward model was trained with another tokenizer"):
        other.load("reward")


def test_a_checkpoint_that_does_not_hold_the_models_parameters_names_them(ws):
    checkpoint.save(
        ws.stage("rlhf") / "checkpoints", 1, {"model": model()},
        ws.metadata("rlhf", scalar_head=True), keep=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"model\.score"):
        ws.load("rlhf")


def test_an_earlier_checkpoint_is_no_finished_stage(ws):
    """Good enough to resume from; but a reward model on half a policy would be silently worse."""
    stage, tree = ws.stage("reward") / "checkpoints", {"model": model(scalar_head=True)}
    facts = ws.metadata("reward", scalar_head=True) | {"steps": 9}
    last = checkpoint.save(stage, 9, tree, facts, keep=2)
    checkpoint.save(stage, 7, tree, facts, keep=2)
    checkpoint.save(stage, 9, tree, facts, keep=2)
    ws.load("reward")
    (last / "tokenizer.json").unlink(missing_ok=True)
    (last / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="step 7 of 9"):
        ws.load("reward")


def test_a_stage_without_a_checkpoint_says_so(ws):
    with pytest.raises(UserError):
        ws.load("rlhf")


def test_another_runs_pretrained_model_tokenizer_and_held_out_documents_are_read(ws, tmp_path):
    new = Workspace(CONFIG, tmp_path / "new", ws.out, "float32")
    assert new.tokenizer.digest == BYTES.digest
    assert new.held_out() == [Document("a", "1")]
    assert new.stage("reward") == tmp_path / "new" / "reward"
    new.load("pretrain")


def test_where_an_average_was_kept_it_is_the_model(ws):
    average = jax.tree.map(lambda x: 2 * x, model())
    state = {"model": model(), "extra": {"average": average}}
    facts = ws.metadata("pretrain") | {"seconds": 1.0, "steps": 5}
    checkpoint.save(ws.stage("pretrain") / "checkpoints", 5, state, facts, keep=1)
    found = checkpoint.flatten(ws.load("pretrain"))
    for name, array in checkpoint.flatten(average).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
