"""What a run is: frozen, strict sections with a reason per default. Imports no JAX."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen section: unknown keys and wrong types are errors, never defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FablesCorpus(Section):
    """Stories from minilm's own grammar, each with its exact log-probability."""

    kind: Literal["fables"] = "fables"
    size: Literal["small", "full"] = "full"
    documents: Positive = 64_000
    held_out: Share = 0.06


class FoundCorpus(Section):
    """What texts of others share."""

    # Of a table. Rows without "text" that are a conversation (`messages`), `prompt` and
    # `completion`, or `instruction` and `output`, are read as such.
    column: str = "text"
    # "exact" drops a text that came before, "near" also nearly the same; "keep" counts them.
    duplicates: Literal["keep", "exact", "near"] = "keep"


class TextCorpus(FoundCorpus):
    """Local files: .txt (one document each), .jsonl, .csv or .parquet (a document a row)."""

    kind: Literal["text"] = "text"
    files: tuple[str, ...] = ()  # paths or globs
    # What ends a document in a .txt, such as "\n\n"; None: each file is one document.
    separator: Annotated[str, Field(min_length=1)] | None = None
    held_out: Share = 0.1


class HubCorpus(FoundCorpus):
    """A Hugging Face data set by name."""

    kind: Literal["hub"] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    max_documents: Positive | None = None
    held_out: Share = 0.05


class PydocCorpus(Section):
    """The language reference that ships with CPython: real English, always there."""

    kind: Literal["pydoc"] = "pydoc"
    held_out: Share = 0.1


Corpus = Annotated[FablesCorpus | TextCorpus | HubCorpus | PydocCorpus, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "characters", "bytes", "file"] = "bpe"
    # For "bpe": 256 bytes, two special tokens and the merges. An upper bound for small corpora.
    vocab_size: Annotated[int, Field(ge=258)] = 2048
    file: str | None = None  # for "file": a tokenizer.json of your own, as `tokenizers` writes it

    @model_validator(mode="after")
    def _one(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.file is not None):
            raise ValueError('kind "file" and a file belong together: --tokenizer.file PATH')
        return self


class ModelConfig(Section):
    """Shape of the Qwen3-type decoder: RMSNorm, rotary, grouped queries, QK-norm, SwiGLU."""

    num_layers: Positive = 4
    embed_dim: Positive = 128
    num_heads: Positive = 4
    num_kv_heads: Positive = 4
    head_dim: Positive = 32
    mlp_dim: Positive = 352
    rope_base: Rate = 1000.0  # short contexts: the 10 000 of the literature wastes channels
    tie_embeddings: bool = True
    # How it is computed, not what: "auto" is cuDNN's attention where a GPU can do it, else "plain".
    attention: Literal["auto", "plain", "xla", "cudnn"] = "auto"
    remat: bool = False  # activations are computed again in the backward pass, not kept
    scan_layers: bool = False  # one layer compiled for all: compiles faster, steps slower on CPU

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % (kv := self.num_kv_heads):
            problem = f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({kv}): "
            raise ValueError(problem + "each key head serves equally many query heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary turns pairs")
        return self


class BackendConfig(Section):
    """How the machine computes."""

    # "auto" measures in a child process and keeps the faster; a resume keeps the run's choice.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    xla_flags: Literal["auto", "none"] = "auto"


class OptimizerConfig(Section):
    """One optimizer: name, rate, schedule. Weight decay falls on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Rate = 1e-3
    # Muon's own rate for matrices, in units of consistent update RMS (0.2 sqrt(max(dim))); the
    # embedding, the head and the norms take `learning_rate` through Adam.
    muon_learning_rate: Rate = 5e-3
    weight_decay: NonNegative = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Rate = 1e-8
    clip_norm: Rate = 1.0  # global norm of the gradient
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_steps: Natural = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the peak rate, at the end
    decay_fraction: Share = 0.2  # "wsd": share of the steps spent decaying
    max_skipped: Positive = 20  # stop after so many non-finite updates in a row


class LoopConfig(Section):
    """What every training stage shares."""

    accumulation: Positive = 1  # micro-batches a step; the batch is the whole step's
    optimizer: OptimizerConfig = OptimizerConfig()
    log_every: Positive = 10
    evaluate_every: Positive = 500
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2


class SupervisedConfig(LoopConfig):
    """A stage that reads batches of a data set."""

    batch_size: Positive = 8
    # Of an average of the weights, which is then judged and handed on (0.999 is usual); 0: none,
    # since a rate that ends at zero averages too.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    log_layers: bool = False  # gradient and update norms of each layer, in metrics.jsonl

    @model_validator(mode="after")
    def _divides(self) -> "SupervisedConfig":
        batch, parts = self.batch_size, self.accumulation
        if batch % parts:
            raise ValueError(f"batch_size ({batch}) must be a multiple of accumulation ({parts})")
        return self


class PretrainConfig(SupervisedConfig):
    """Next-token cross-entropy on the corpus."""

    steps: Positive = 1500
    # Rows of the first batches, which double at even intervals until, after batch_warmup_steps,
    # they are batch_size: linear in tokens, as Brown et al. (2020), App. B. None: one size.
    batch_start: Positive | None = None
    batch_warmup_steps: Natural = 0
    sequence_length: Annotated[int, Field(ge=8)] = 256
    document_attention: bool = True  # False: a token also sees the documents before its own
    # Positions whose logits are in memory at once; 0: all. Costs the head's product once more, and
    # pays where the vocabulary is large: 16 x 1,024 positions of 50,304 logits are 3.3 GB.
    logits_chunk: Natural = 0
    validation_documents: Positive = 512  # read during training; the end reads the whole split
    patience: Natural = 0  # evaluations without a lower loss, then back to the best; 0: never
    sample_count: Positive = 512  # stories sampled at the end for the parse share
    max_new_tokens: Positive = 160  # of a sample

    @model_validator(mode="after")
    def _grows(self) -> "PretrainConfig":
        start, full, steps = self.batch_start, self.batch_size, self.batch_warmup_steps
        if (start is None) != (steps == 0):
            raise ValueError("batch_start and batch_warmup_steps belong together: rows and steps")
        if start is None:
            return self
        times, rest = divmod(full, start)
        if rest or times < 2 or times & (times - 1):  # each size is compiled: doublings are few
            raise ValueError(f"batch_size ({full}) must be batch_start ({start}) times 2, 4, 8, …")
        if start % self.accumulation:
            raise ValueError(f"batch_start ({start}) must be a multiple of accumulation")
        if not (least := times.bit_length() - 1) <= steps < self.steps:
            problem = f"batch_warmup_steps ({steps}) must be at least {least}, a step for each size"
            raise ValueError(f"{problem} before the last, and below steps ({self.steps})")
        return self


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on the user's own examples; left out where there are none."""

    file: str | None = None  # JSON Lines: prompt and completion, messages, or text
    epochs: Positive = 1
    sequence_length: Annotated[int, Field(ge=8)] = 256  # examples are packed into such rows
    held_out: Share = 0.1  # of the examples, by whole prompts


class PromptsConfig(Section):
    """Openings of held-out documents: disjoint sets, so nothing is tuned on what is reported."""

    sentences: Positive = 2  # of the document make the prompt
    max_tokens: Positive = 64  # longer prompts are left out
    preferences: Positive = 1400
    rlhf: Positive = 1500
    development: Positive = 256  # read during RLHF; settings are tuned on these
    evaluation: Positive = 512  # read once, at the end
    max_new_tokens: Positive = 112  # of a completion


class JudgeConfig(Section):
    """Gold: the truth that only evaluation and the simulated raters see."""

    # A row of minilm.judges.JUDGES, "module:function", or "none" where there is no truth.
    name: str = "fables"
    options: dict[str, str | int | float | bool] = {}


class PreferencesConfig(Section):
    """Bradley-Terry labels on pairs of completions, or a file of the user's own."""

    file: str | None = None
    completions: Annotated[int, Field(ge=2)] = 4  # a prompt; all pairs of them are labelled
    temperature: Rate = 1.0  # of sampling
    rater_temperature: Rate = 1.0  # P(chosen) = sigmoid(gold difference / rater_temperature)
    raters: Positive = 5  # votes a pair; the label is their share
    flip_rate: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    # Differences up to about so many temperatures are called a tie: Rao and Kupper (1967).
    tie_band: NonNegative = 0.0
    # Raters may see otherwise than gold: by another judge (or each by one), liking each word more,
    # and what is shown first (in temperatures; which is first is drawn anew for each rater).
    rater_judge: str | None = None
    length_bias: Finite = 0.0
    position_bias: NonNegative = 0.0
    coverage: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the pairs that is labelled
    held_out: Share = 0.25  # of the prompts, for the reward model's evaluation
    max_pairs: Positive | None = None  # for training; None keeps all
    batch_size: Positive = 64  # of the sampler


class RewardConfig(SupervisedConfig):
    """A scalar head on the pretrained model, Bradley-Terry loss."""

    num_layers: Positive | None = None  # of the pretrained model's, from the bottom; None: all
    members: Positive = 1  # of an ensemble: models that differ in their head and order of batches
    epochs: Positive = 1
    max_tokens: Positive = 192  # of prompt and completion; longer pairs are left out
    max_pairs: Positive | None = None  # of the stage before; None: all


class RLHFConfig(LoopConfig):
    """Fine-tune the policy on the learned reward; a step has prompts x group completions."""

    algorithm: str = "rloo"  # a row of minilm.algorithms.ALGORITHMS
    seed: Natural = 0  # of rollouts alone: seeds of one reward model can be compared
    steps: Positive = 60
    prompts_per_step: Positive = 16
    group_size: Annotated[int, Field(ge=1)] = 8  # completions a prompt
    epochs: Positive = 1  # passes over a rollout
    minibatches: Positive = 1
    kl_coef: NonNegative = 0.04
    # Where its price is paid, and by which estimator; None: as in the algorithm's paper.
    kl_in: Literal["reward", "loss"] | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    # Adaptive: kl_coef starts there and moves until KL is so many nats a completion, by at most
    # 0.2 n / kl_horizon a step of n completions. Ziegler et al. (2019), section 2.2. None: fixed.
    kl_target: Rate | None = None
    kl_horizon: Rate = 10_000.0  # completions; a run of few steps wants less
    # Early stopping: the last policy whose exact KL on the development prompts was within it.
    kl_budget: Rate | None = None
    # How the members of a reward ensemble are one: "penalized" is mean - ensemble_penalty * std.
    ensemble: Literal["mean", "worst", "penalized"] = "mean"
    ensemble_penalty: NonNegative = 1.0
    # The reward is a weighted sum, its parts in standard deviations of the reference's completions.
    learned_weight: NonNegative = 1.0  # of the reward model
    judge_weight: NonNegative = 0.0  # of gold itself: an oracle, or a rule one wants kept
    # What is done to that sum: clipped to ± so much (openai/lm-human-preferences left it as it
    # is), then less so much for each token of the completion.
    reward_clip: Rate | None = None
    length_penalty: NonNegative = 0.0
    # Token rewards divided by their spread, their mean kept: Huang et al. (2024), arXiv:2403.17031,
    # detail 21 (TRL's `whiten_rewards`).
    whiten_rewards: bool = False
    # Next-token loss on ptx_rows pretraining rows an update: Ouyang et al. (2022), eq. 2. A weight
    # of 1 drowned the reward: take 0.05; its gradient is at most ptx_clip times the rest's.
    ptx_coef: NonNegative = 0.0
    ptx_rows: Positive = 8
    ptx_clip: Annotated[float, Field(gt=0, le=1)] = 0.5
    value_warmup_steps: Natural = 0  # steps that train the value alone; shared layers move too
    clip: Rate = 0.2
    clip_high: Rate = 0.28  # how far "dapo" lets a token become likelier
    value_clip: Rate = 0.2
    value_coef: NonNegative = 0.1
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    temperature: Rate = 1.0  # divides the logits in rollout and update alike
    # Score of a completion without end-of-text, in units of the reference's standard deviation.
    missing_eos_score: float = -3.0
    references: Positive = 4  # reference completions a prompt that the policy is compared with

    @model_validator(mode="after")
    def _splits(self) -> "RLHFConfig":
        size = self.prompts_per_step * self.group_size
        if size % (self.minibatches * self.accumulation):
            problem = f"the {size} completions of a step (prompts_per_step x group_size) do not "
            problem += f"split into {self.minibatches} minibatches of {self.accumulation} parts"
            raise ValueError(f"{problem} (minibatches, accumulation)")
        if self.ptx_coef and self.ptx_rows % self.accumulation:
            problem = f"ptx_rows ({self.ptx_rows}) must be a multiple of accumulation"
            raise ValueError(f"{problem} ({self.accumulation})")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target moves kl_coef by factors, so it must begin above 0")
        return self


class TermConfig(Section):
    """A term of the objective: one of minilm.terms, or one that a stage has, given other weight."""

    weight: Finite
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    final_weight: Finite = 0.0  # which the schedule ends at
    begin: Natural = 0  # the step at which the weight starts to move
    end: Positive | None = None  # ... and has arrived ("step": jumps at begin); None: the last
    stages: tuple[Literal["pretrain", "sft", "reward", "rlhf"], ...] = ()  # empty: all that know it
    options: dict[str, str | int | float | bool] = {}  # of the loss


class BalanceConfig(Section):
    """Weights that find themselves, on top of the terms' own; for pretraining and reward."""

    method: Literal["none", "uncertainty", "gradnorm"] = "none"
    learning_rate: Rate = 0.02  # of the weights
    alpha: NonNegative = 1.5  # "gradnorm": how much harder slow terms pull


class StudyConfig(Section):
    """`minilm overoptimize`: arms, each run over seeds of RL and compared with best-of-n."""

    arms: dict[str, str] = {"main": ""}  # by name: options laid over this config
    seeds: Positive = 4  # RL runs an arm, on one reward model; an interval needs several
    best_of: Annotated[int, Field(ge=2)] = 512  # completions of the reference a prompt
    best_of_prompts: Positive = 64  # of the development prompts
    kl_budgets: tuple[Rate, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # nats; where to stop


class ParallelConfig(Section):
    """One mesh of devices for pretraining and fine-tuning: docs/scaling.md. Of no stage: a run
    may go on with another."""

    data: Positive = 1  # devices that each take a part of the batch
    fsdp: Positive = 1  # the same, and the parameters and the optimizer's state are split too
    tensor: Positive = 1  # devices that share each row's heads and hidden units
    # Of several processes: HOST:PORT of the first; "auto" where SLURM, Open MPI or a TPU pod say.
    coordinator: str | None = None
    processes: Positive = 1
    process: Natural = 0  # this one's number


class TrackingConfig(Section):
    """Where metrics go besides each stage's metrics.jsonl. Of no stage: it changes no figure."""

    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # the extra `track`
    project: str = "minilm"  # of Weights & Biases and trackio


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    corpus: Corpus = FablesCorpus()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    backend: BackendConfig = BackendConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    prompts: PromptsConfig = PromptsConfig()
    judge: JudgeConfig = JudgeConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward: RewardConfig = RewardConfig()
    rlhf: RLHFConfig = RLHFConfig()
    objective: dict[str, TermConfig] = {}  # by name, beside each stage's own
    balance: BalanceConfig = BalanceConfig()
    parallel: ParallelConfig = ParallelConfig()
    tracking: TrackingConfig = TrackingConfig()
    study: StudyConfig = StudyConfig()  # read by `minilm overoptimize` alone
