"""The Ray Tune trainable: brings one trial after another to its goal, in one actor.

An actor lives across trials (`reuse_actors`), so imports, the base model and the rows are loaded once. Durable state is
the trial's own folder, not Ray's. With a storage the folder is a scratch one, and what is in the storage lasts.
"""

import json
from pathlib import Path
from typing import Any

from ray import tune

from halora.errors import StorageError, UserError
from halora.evaluation.chips import ChipScores
from halora.events import BaseScored, Failed, JobEvent, OutOfMemory, Reported, Scored, WorkerLost
from halora.files import no_room, write_json
from halora.heartbeat import HeartbeatSender
from halora.rank_workers import WorkerLostError, WorkerOutOfMemoryError
from halora.settings.trial import Goal, TrialConfig
from halora.storage import WorkFolder
from halora.training.memory import ran_out_of_memory
from halora.trial_folder import RESULT_FILE, adapter_folder
from halora.trial_runner import Training, TrialRunner, use_own_threads


class HaloraTrainable(tune.Trainable):
    """Ray Tune's view of a job: bringing a trial to a goal.

    The `config` given by the executor holds the `job`'s name, `number`, `folder`, `trial` (a resolved `TrialConfig`),
    `goal`, the trial's place in the `storage` (a URL, or nothing), and `heartbeats` with the name of that actor and the
    longest silence in seconds, and `final`, whether the trial's training ends with the goal. Every report is an `event`
    of `halora.events`: `Reported` until the goal, then what became of the job; `BaseScored` where there is no goal.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial of this actor."""
        use_own_threads()
        self._heart = HeartbeatSender(*config["heartbeats"])
        self._runner = TrialRunner()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial in the same actor."""
        self._end_training()
        self._files.close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next report, or evaluate once training is done."""
        try:
            event: JobEvent | BaseScored = self._step()
        except Exception as error:
            failure = self._classify_failure(error)
            if failure is None:
                raise
            self._end_training()
            event = failure
        return {"event": event, "done": not isinstance(event, Reported)}

    def _classify_failure(self, error: Exception) -> Failed | WorkerLost | OutOfMemory | None:
        """What an error makes of the trial; nothing where the actor is not to be trusted any more."""
        trial = self._number
        if isinstance(error, WorkerOutOfMemoryError) or ran_out_of_memory(error):
            training = self._config.training
            if self._trained:
                return Failed(trial=trial, cause="out of memory while it was scored; lower evaluation.batch_size")
            kind = OutOfMemory if training.micro_batch_divisible else Failed
            return kind(trial=trial, cause=f"out of memory with {training.micro_batch} rows at a time")
        if isinstance(error, WorkerLostError | StorageError):
            return WorkerLost(trial=trial, cause=str(error))
        if isinstance(error, UserError | FloatingPointError):  # this trial's own fault
            return Failed(trial=trial, cause=str(error))
        if no_room(error):
            return WorkerLost(trial=trial, cause=f"no space is left in '{self._folder}'")
        return None

    def cleanup(self) -> None:
        """Release the engine, the other workers and the scratch folder when the actor ends."""
        self._end_training()
        self._files.close()
        self._runner.end_peers()
        self._heart.stop()

    def _begin(self, config: dict[str, Any]) -> None:
        self._heart.job = config["job"]
        self._number, self._folder = int(config["number"]), Path(config["folder"])
        self._files = WorkFolder(self._folder, config.get("storage", ""))
        self._config = TrialConfig.model_validate(config["trial"])
        self._goal = Goal(**config["goal"]) if config["goal"] else None
        self._final = bool(config.get("final", True))
        self._training: Training | None = None
        self._trained = self._goal is None or self._goal.first_chip > 0

    def _step(self) -> Reported | Scored | BaseScored:
        goal = self._goal
        if goal is None:
            return BaseScored(scores=self._runner.evaluate(self._config, None).to_json())
        self._folder = self._files.fetch(goal)
        if not self._trained:
            if self._training is None:
                self._training = self._runner.train(self._config, self._folder, goal.steps)
            report = self._training.advance()
            self._files.put_checkpoint()
            self._trained = self._training.done
            return Reported.of(self._number, report)
        self._end_training()
        if not goal.chip_instances:
            return Scored(trial=self._number, step=goal.steps, metrics={}, accuracy_by_chip=[])
        result, config = self._folder / RESULT_FILE, goal.config(self._config)
        scores = self._runner.evaluate(config, adapter_folder(self._folder), first_chip=goal.first_chip)
        if goal.first_chip:
            scores = ChipScores.from_json(json.loads(result.read_text(encoding="utf-8"))).with_chips_after(
                goal.first_chip, scores
            )
        write_json(result, scores.to_json())
        self._files.put_result(goal)
        return Scored(
            trial=self._number,
            step=goal.steps,
            metrics=scores.summary(),
            accuracy_by_chip=scores.accuracy_by_chip,
            rows=len(scores.row_ids),
            final=self._final,
        )

    def _end_training(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None
