"""The one training loop, which never loses a run."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minilm import checkpoint, parallel
from minilm.config import LoopConfig
from minilm.diagnose import alarms, should_stop
from minilm.errors import UserError
from minilm.metrics import MetricsLog, Progress, means, read
from minilm.step import TrainState
from minilm.trackers import Tracker

SAMPLE_AFTER = 40.0  # seconds of waiting before a first sample, which may take ten more


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; the state has been saved."""


def fit(
    state: TrainState,
    step: Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]],
    *,
    title: str,
    steps: int,
    loop: LoopConfig,
    folder: Path,
    metadata: dict,
    files: Mapping[str, Path],
    learning_rate: optax.Schedule,
    tokens_before: Callable[[int], int] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    best: str | Callable[[Mapping[str, Any]], float] | None = None,
    patience: int = 0,
    sample: Callable[[TrainState], str] | None = None,
    started: float | None = None,
    track: Callable[[int], Tracker] | None = None,
) -> tuple[TrainState, dict]:
    """Runs `steps` steps from wherever the newest valid checkpoint in `folder` stands.

    The order at a boundary is: read pending metrics, save, evaluate. A run killed at any instant
    and started again is, bit for bit, the run that was not killed.

    Args:
      state: the initial state; also the shape that a checkpoint must have.
      step: (state, k) -> (state, metrics); metrics are `Mean`s or numbers.
      metadata, files: stored with every checkpoint.
      tokens_before: (k) -> what the steps before step k read, where tokens are counted.
      evaluate: run at step 0, every `loop.evaluate_every` steps and at the end.
      best: an evaluated metric, or a function of an evaluation; its lowest checkpoint is kept too.
      patience: evaluations without a lower `best`, after which its checkpoint is the last; 0: off.
      sample: a text shown at a quarter, half and the end, and within a minute of `started`.
      started: `time.monotonic()` of when the stage began, if not now.
      track: (step to go on from) -> what is told every record too.
    Returns:
      The last state, and a record with `seconds` (of stepping, over all sessions),
      `tokens_per_second` and the last evaluation.
    Raises:
      Interrupted: after a signal, once the state is saved.
      UserError: non-finite updates `max_skipped` times in a row, a full disk.
    """
    started = started or time.monotonic()
    checkpoints = folder / "checkpoints"
    found = checkpoint.latest(checkpoints)  # of several processes the first alone saves
    done, seconds, logged = 0, 0.0, -1
    if found:
        stored = checkpoint.metadata(found)
        done, seconds = stored["step"], stored["seconds"]
        logged = stored.get("stopped_at", done)
    done, seconds, logged = parallel.said_by_first(done, seconds, logged)
    if done:
        state = parallel.read_by_first(state, lambda like: _restored(found, like))
    log = MetricsLog(folder / "metrics.jsonl", keep_until=logged, tracker=track and track(logged))
    evaluations = {r["step"]: r for r in read(folder / "metrics.jsonl") if r["kind"] == "eval"}
    if parallel.several():  # what one of them has evaluated, all evaluate again: in step
        evaluations.pop(done, None)
    milestones = {max(steps // 4, 1), max(steps // 2, 1), steps} if sample else set()

    def rank(figures: Mapping[str, Any]) -> float:
        return best(figures) if callable(best) else figures[best]  # pyright: ignore

    def tokens(count: int, *, since: int = 0) -> int:
        return tokens_before(count) - tokens_before(since) if tokens_before else 0

    def save(step_count: int, seconds: float) -> None:
        nonlocal saved
        own = parallel.gathered(state)
        if not parallel.is_first():
            return
        saved = checkpoint.save(
            checkpoints,
            step_count,
            own,
            metadata | {"seconds": seconds, "steps": steps, "metrics": last_metrics},
            keep=loop.keep_checkpoints,
            files=files,
        )

    def evaluate_now(step_count: int) -> None:
        if evaluate is None:
            return
        if step_count not in evaluations:
            values = {k: v for k, v in evaluate(state).items() if v is not None}
            log.log(step_count, values, kind="eval")
            evaluations[step_count] = {"step": step_count, "kind": "eval", **values}
            progress.note(_line(f"{title} {step_count}/{steps}", values))
        # Asked again on resume: the run may have been killed between the record and this.
        if best and saved and checkpoint.metadata(saved)["best"] is None:
            checkpoint.set_best(saved, rank(evaluations[step_count]))
        for verdict in alarms(read(folder / "metrics.jsonl")):
            if verdict.name not in warned:
                seen = "; ".join(map(str, verdict.evidence))
                progress.note(
                    f"{title} {step_count}/{steps}: {verdict.name.replace('_', ' ')}? {seen}"
                )
                warned.add(verdict.name)

    def stopped_early() -> bool:
        if not (best and patience):
            return False
        known = sorted(evaluations)
        ranks = [rank(evaluations[s]) for s in known]
        return parallel.any_says(saved is not None and should_stop(known, ranks, patience))

    warned: set[str] = set()
    last_metrics: dict = {}
    saved = found
    window: list[dict] = []
    sampled = done > 0
    opened = contextlib.closing(log)
    with opened, _Signals() as signals, Progress(title, steps, start=done) as progress:
        if done:
            progress.note(f"{title}: resumed at step {done}")
        if done == 0 or done == steps or done % loop.evaluate_every == 0:
            evaluate_now(done)
        previous = None
        clock = time.perf_counter()
        stopped = stopped_early()
        for k in range(done, done if stopped else steps):
            state, metrics = step(state, k)
            if previous is not None:  # reading step k - 1 while step k runs: no idle device
                window.append(jax.device_get(previous))
            previous = metrics
            due = (k + 1) % loop.evaluate_every == 0 or k + 1 == steps
            saving = due or (k + 1) % loop.checkpoint_every == 0
            # A signal waits for the next record, so that an interrupted run logs the same windows.
            if (k + 1) % loop.log_every and not saving:
                if len(window) % 4 == 1:
                    progress.update(k, means(window[-1:]), tokens(k + 1, since=k))
                continue
            window.append(jax.device_get(previous))
            previous = None
            now = time.perf_counter()
            seconds += now - clock
            last_metrics = means(window) | {"learning_rate": float(jnp.asarray(learning_rate(k)))}
            if tokens_before:
                read_now = tokens(k + 1, since=k + 1 - len(window))
                last_metrics["tokens_per_second"] = read_now / (now - clock)
            window = []
            log.log(k + 1, last_metrics)
            progress.update(k + 1, last_metrics, tokens(k + 1, since=k))
            in_a_row = int(state.extra["skipped_in_a_row"])
            _check_finite(in_a_row, last_metrics, loop, title, k + 1)
            caught = parallel.any_says(signals.caught)
            if saving or caught:
                save(k + 1, seconds)
            if caught:
                raise Interrupted(f"{title} saved at step {k + 1}; the same command goes on")
            if due:
                evaluate_now(k + 1)
                # At the last step a loss has had its time; a limit holds there too.
                stopped = (k + 1 < steps or callable(best)) and stopped_early()
                if stopped:
                    break
            early = parallel.any_says(not sampled and time.monotonic() - started > SAMPLE_AFTER)
            if sample and (early or any(k + 1 - loop.log_every < m <= k + 1 for m in milestones)):
                progress.note(f"{title} {k + 1}/{steps} writes: {sample(state)}")
                sampled = True
            clock = time.perf_counter()
        if parallel.any_says(signals.caught):  # while the last evaluation ran
            raise Interrupted(f"{title} is done; the same command goes on")
        last = made = steps
        if stopped:
            made = max(evaluations)
            kept = checkpoint.keep_best(checkpoints, made) if parallel.is_first() else None
            state = parallel.read_by_first(state, lambda like: _restored(kept, like))
            (last,) = parallel.said_by_first(checkpoint.metadata(kept)["step"] if kept else 0)
            back = "" if last == made else f", back to the best, step {last}"
            progress.note(f"{title}: stopped at step {made}{back}")
    record = {"seconds": seconds, **evaluations.get(last, {})}
    if tokens_before and seconds:
        record["tokens_per_second"] = tokens(made) / seconds
    return state, record


def _restored(found: Path | None, like: TrainState) -> TrainState:
    return checkpoint.restore(found, like) if found else like


def _check_finite(
    in_a_row: int, metrics: Mapping[str, float], loop: LoopConfig, title: str, step: int
) -> None:
    if in_a_row < loop.optimizer.max_skipped:
        return
    if not math.isfinite(metrics.get("objective/scores", 0.0)):
        problem = f"{title}, step {step}: what it is paid is not finite, {in_a_row} times in a row"
        hint = "train it again, at a lower rate: --redo reward"
        raise UserError(problem, where="reward", hint=hint)
    raise UserError(
        f"{title} diverged: {in_a_row} updates in a row were not finite by step {step}",
        where=f"{title}.optimizer.learning_rate",
        value=loop.optimizer.learning_rate,
        hint="lower the learning rate, lengthen the warm-up, or use compute_dtype float32; "
        "the checkpoint before the divergence is intact",
    )


def _line(head: str, values: Mapping[str, float]) -> str:
    shown = {k: v for k, v in values.items() if not k.startswith("reference/")}
    return head + "  " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())


class _Signals:
    """Ctrl-C and SIGTERM become a flag that the loop reads at its next boundary."""

    def __enter__(self):
        self.caught = False
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        except ValueError:  # not the main thread: a notebook's kernel handles its own signals
            pass
        return self

    def _catch(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)
