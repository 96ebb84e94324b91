"""The frame of a training loop: a run that resumes, saves, ends when it is asked to, and never trains on NaN.

    training = Training(run, cfg, trained, optimizer)
    for step in training.steps(plan):
        for each micro-batch:
            training.backward(losses, ids)
        row = training.update(learning_rate(step, cfg))     None: the step was not finite and changed nothing

A step whose loss or gradient is not finite on any process changes no weight on any process. It is counted, logged, and
shown with the samples that it came from; three in a row end the run.
"""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.files import not_finite
from runtime.options import Diverged, Interrupted, asked_to_stop, patient
from runtime.run import Run

MOST = 3  # steps in a row that may be not finite
NAMED = 8  # samples that a message names


class Training:
    """One run of an optimiser over `cfg.steps` steps. cfg: steps, batch_size, save_every."""

    def __init__(
        self,
        run: Run,
        cfg,
        trained: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        preview: Callable[[int], bool] | None = None,
    ):
        """trained: the parameters by name; they and optimizer get what the newest whole checkpoint holds.

        preview: shows what the model does after so many steps, and returns whether a process was asked to stop
        meanwhile. It is called every cfg.preview_every steps, at the start and at the end, by all processes.
        """
        self.run, self.cfg, self.trained, self.optimizer, self.preview = run, cfg, trained, optimizer, preview
        self.first = self._saved = run.resume(trained, optimizer)
        self._seen: list[tuple[Sequence[str], Tensor]] = []  # the samples of this step, and their losses
        self._stop = False

    def steps(self, plan: str) -> Iterator[int]:
        """The steps that are left, from 0. plan: what is done in all, in words.

        After each it saves where that is due. Interrupted at the end of a step, which is saved, if any process was
        asked to stop. Diverged if the weights are not finite in the end.
        """
        with patient(), self.run.progress(self.cfg.steps, self.first, plan=plan) as self.bar:
            self._show(self.first)
            for step in range(self.first, self.cfg.steps):
                if self._stop:
                    self._save(step)
                    raise Interrupted(asked_to_stop() or signal.SIGTERM)
                self._step, done = step, step + 1
                yield step
                self.bar.update()
                if done % self.cfg.save_every == 0:
                    self._save(done)
                self._show(done)
        self._check()

    def _save(self, done: int) -> None:
        """Saves after so many steps, unless that was done, or the result is about to be written."""
        if self._saved < done < self.cfg.steps:
            self._check()
            self.run.save(done, self.trained, self.optimizer)
            self._saved = done

    def _show(self, done: int) -> None:
        """Previews, where they are due. A run that resumes makes those again that were cut."""
        due = self.preview and (done == self.cfg.steps or done % self.cfg.preview_every == 0)
        if due and not self._stop:
            self._stop = self.preview(done)

    def backward(self, losses: Tensor, ids: Sequence[str]) -> None:
        """Adds the gradient of a micro-batch. losses (B,), ids: of its samples."""
        (losses.sum() / self.cfg.batch_size).backward()
        self._seen.append((ids, losses.detach()))

    def update(self, lr: float, sums: Mapping[str, Tensor] = {}) -> dict[str, float] | None:
        """The optimiser's step at rate lr, by the gradient of the global batch clipped to a norm of 1.

        Returns the mean loss, the norm before it was clipped, and what `sums` () add up to over all processes. Returns
        None, and changes nothing, if loss or norm are not finite.
        """
        group, parameters = self.run.group, list(self.trained.values())
        group.meet(f"step {self._step + 1}")
        group.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        local = {"loss": torch.cat([losses for _, losses in self._seen]).sum(), "stop": bool(asked_to_stop())}
        total = group.sum(local | {f"sum {name}": value for name, value in sums.items()})
        self._stop = total["stop"] > 0
        row = {"loss": total["loss"] / self.cfg.batch_size, "grad_norm": norm.item()}
        finite = all(map(math.isfinite, row.values()))
        if finite:
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        seen, self._seen = self._seen, []
        if finite:
            return row | {name: total[f"sum {name}"] for name in sums}
        self._skip(seen)

    def log(self, row: Mapping[str, float], **shown: str) -> None:
        """Writes a step's line to metrics.jsonl. shown: what the progress bar tells."""
        self.run.log(self._step + 1, **row)
        self.bar.set_postfix(shown, refresh=False)

    def say(self, sentence: str) -> None:
        """Prints a sentence above the progress bar, once."""
        if self.run.group.main:
            self.bar.write(sentence, file=sys.stderr)

    def _skip(self, seen: list[tuple[Sequence[str], Tensor]]) -> None:
        """Counts, logs and shows a step that was not finite. Diverged at the third in a row."""
        done, skipped = self._step + 1, self.run.skipped
        bad = [name for ids, losses in seen for name, ok in zip(ids, losses.isfinite().tolist()) if not ok]
        what = "its loss is not finite at"
        if not (bad := self._gather(bad)):
            what, bad = "its gradient is not finite, of", self._gather([name for ids, _ in seen for name in ids])
        named = ", ".join(map(repr, bad[:NAMED])) + f" and {len(bad) - NAMED} more" * (len(bad) > NAMED)
        skipped.append(done)
        self.run.log(done, skipped=len(skipped))
        self.say(f"{self.run.stage}: step {done} changed nothing: {what} {named}; {len(skipped)} skipped so far")
        if skipped[-MOST:] == list(range(done - MOST + 1, done + 1)):
            self._end(f"{MOST} steps in a row were not finite, up to step {done}, the last at {named}")

    def _gather(self, names: list[str]) -> list[str]:
        """The names of all processes, which must all call it."""
        if self.run.group.size == 1:
            return names
        every = [None] * self.run.group.size
        dist.all_gather_object(every, names)
        return [name for some in every for name in some]

    def _check(self) -> None:
        """Diverged if the weights are not finite: nothing is saved of them."""
        if bad := not_finite(self.trained):
            self._end(f"after step {self._step + 1} the weights are not finite, {bad} for one")

    def _end(self, why: str) -> None:
        kept = sorted(path.name for path in (self.run.folder / "checkpoints").glob("step-*"))
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise Diverged(f"{why}; {last}. Lower --lr, or look at these samples, and use another --out")
