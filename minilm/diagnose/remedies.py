"""What to do about each verdict, in words, and the next command to try."""

from typing import NamedTuple


class Remedy(NamedTuple):
    """A `{stage}` in the command is the stage's name, `{config}` the config file, `{to_best}` and
    `{twice}` the option that ends it at its best step, or makes it twice as long."""

    text: str
    command: str


REMEDIES: dict[str, Remedy] = {
    "nonfinite": Remedy(
        "A loss or gradient was not a number: lower the rate, warm up longer, compute in float32, "
        "and look for token ids beyond the vocabulary and empty or infinite weights in the data.",
        "minilm run {config} --redo {stage} --backend.compute-dtype float32",
    ),
    "vanishing_gradients": Remedy(
        "The gradient is as good as zero while the loss is not: look for a cut in the graph "
        "(stop_gradient, frozen or all-zero parameters), a saturated output, a loss divided twice, "
        "half precision without loss scaling.",
        "minilm audit {config}",
    ),
    "exploding_gradients": Remedy(
        "The gradient is far larger than the loss warrants, and clipping decides every step: check "
        "initial scales and norm gains, a loss scale that is never undone, sums where means are "
        "meant; warm up longer.",
        "minilm run {config} --redo {stage} --{stage}.optimizer.warmup-steps 100",
    ),
    "diverging": Remedy(
        "The loss rises: go back to the checkpoint before the rise, lower the rate, and check the "
        "schedule and the sign of every term.",
        "minilm lr-range {config}",
    ),
    "learning_rate_too_high": Remedy(
        "Steps are too long to settle: lower the rate three- to tenfold, or warm up longer.",
        "minilm lr-range {config}",
    ),
    "spikes": Remedy(
        "Single steps throw the loss up: look at the batches of those steps, clip harder, warm up "
        "longer, or lower beta2.",
        "minilm run {config} --redo {stage} --{stage}.optimizer.clip-norm 0.3",
    ),
    "repeated_data": Remedy(
        "What is trained on comes back: the loss repeats itself, or falls far below a validation "
        "that stays. Take more documents or fewer steps; check that the loader shuffles and that a "
        "resumed run goes on where it stopped.",
        "minilm audit {config}",
    ),
    "validation_mismatch": Remedy(
        "Training and validation differ from the start, so it is not overfitting: check that both "
        "come from one source, through one tokenizer, with one mask, in one unit.",
        "minilm audit {config}",
    ),
    "overfitting": Remedy(
        "Validation rises while training falls: take the checkpoint of the best step, stop there, "
        "or get more data; then a smaller model or more weight decay.",
        "minilm run {config} --redo {stage} {to_best}",
    ),
    "learning_rate_too_low": Remedy(
        "The loss creeps: raise the rate three- to tenfold.", "minilm lr-range {config}"
    ),
    "plateau": Remedy(
        "Progress stopped at once: check that the rate did not fall too soon and that updates "
        "reach the parameters; else raise the rate or lengthen its decay.",
        "minilm lr-range {config}",
    ),
    "underfitting": Remedy(
        "Training itself stays far above the floor: a larger model, less weight decay, parameters "
        "that are frozen by mistake, inputs that lack what the targets depend on.",
        "minilm run {config} --redo {stage} --model.embed-dim 256 --model.mlp-dim 704",
    ),
    "too_short": Remedy(
        "It was still falling when it ended: train longer.",
        "minilm run {config} --redo {stage} {twice}",
    ),
    "improving": Remedy("Still getting better: nothing to mend.", "minilm report {run}"),
    "converged": Remedy("As low as it will get: nothing to mend.", "minilm report {run}"),
    "zero_reward_variance": Remedy(
        "Completions of a prompt all score the same, so there is nothing to learn: sample at "
        "temperature 1, give them room to end, check the reward model on a few pairs.",
        "minilm run {config} --redo rlhf --rlhf.temperature 1.0 --prompts.max-new-tokens 160",
    ),
    "value_function_failure": Remedy(
        "The critic does not predict the return: normalise rewards, raise value_coef, or use an "
        "algorithm without a critic.",
        "minilm run {config} --redo rlhf --rlhf.algorithm rloo",
    ),
    "entropy_collapse": Remedy(
        "The policy says one thing only: raise kl_coef or lower the rate, check the sign of an "
        "entropy term.",
        "minilm run {config} --redo rlhf --rlhf.kl-coef {kl_coef}",
    ),
    "length_gaming": Remedy(
        "Completions grow and the reward with them: check longer_chosen in the preferences, "
        "balance the pairs by length, raise kl_coef.",
        "minilm run {config} --redo rlhf --rlhf.kl-coef {kl_coef}",
    ),
    "reward_hacking": Remedy(
        "The proxy rises and the truth does not: stop at the best step, raise kl_coef, train the "
        "reward model on more pairs.",
        "minilm run {config} --redo rlhf --rlhf.steps {best_step}",
    ),
    "kl_blow_up": Remedy(
        "The policy left the reference for more than the reward was worth: raise kl_coef, lower "
        "the rate, check the sign of the penalty; where KL is a loss (grpo, dr_grpo), kl_estimator "
        "k2 holds a policy that k3 does not.",
        "minilm run {config} --redo rlhf --rlhf.kl-coef {kl_coef} "
        "--rlhf.optimizer.learning-rate 1e-4",
    ),
}
