"""lm-evaluation-harness on chip instances: its tasks, prompts and metrics, read by our packed rows.

A document's requests that share their context are one row, as our own scoring has it, and its `id`, where it has one,
addresses the noise of reads: a task of our rows gives our own scores, on every chip instance. The package `lm-eval` is
imported when it is used; it comes with the extra `lm-eval`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from halora.errors import UserError, nearest
from halora.evaluation.generation import continued
from halora.evaluation.intervals import crossed, share
from halora.evaluation.scoring import option_sums
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip
from halora.hardware.instance import ChipInstance
from halora.settings.evaluation import EvaluationSettings
from halora.training.batches import Batch, PackedRow, encode_texts, pack_tokens
from halora.training.calibration import calibrate
from halora.training.models import BaseModel
from halora.training.rram import RramArray
from halora.training.tasks import Row

_NEW_TOKENS = 256  # where a task does not say, as the harness has it


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, clean and on every chip instance.

    Attributes:
        task: The task, as the harness names it.
        metric: The metric, likewise; with the name of its filter where that is another than `none`.
        documents: Number of documents.
        clean: On clean weights and exact converters.
        by_chip: On each chip instance, in their order.
        mean: Over chips.
        low: Lower end of the 95 % interval over documents and chips; none where the metric is none of single documents.
        high: Its upper end.
    """

    task: str
    metric: str
    documents: int
    clean: float
    by_chip: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_tasks(tasks: Sequence[str]) -> Any:
    """The harness's task manager, which knows these tasks.

    Args:
        tasks: Names of the harness's tasks, groups and tags, or paths of YAML files.

    Raises:
        UserError: `lm-eval` is not installed, or there are no such tasks.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "lm-evaluation-harness is not installed", "pip install 'halora-sweep[lm-eval]', and run again"
        ) from None
    manager = TaskManager()
    known = {*manager.all_tasks}
    problems = [
        f"lm-evaluation-harness has no task '{task}', and there is no such YAML file{nearest(task, known)}"
        for task in tasks
        if task not in known and not (task.endswith((".yaml", ".yml")) and Path(task).is_file())
    ]
    if problems or not tasks:
        raise UserError(problems or "no task of lm-evaluation-harness is named")
    return manager


def harness_scores(
    base: BaseModel,
    array: RramArray,
    chip: Chip,
    calibration_rows: Sequence[Row],
    settings: EvaluationSettings,
    tasks: Sequence[str],
    *,
    documents: int | None = None,
    first_chip: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[HarnessScore]:
    """Every metric of the harness's tasks, clean and on chip instances of the search pool.

    Args:
        base: Model; an attached adapter takes part.
        array: Its layers.
        chip: Description of the chips.
        calibration_rows: Training rows that set the converters' ranges.
        settings: Number of chip instances, batch size, converters.
        tasks: See `check_tasks`.
        documents: Documents of each task, the first ones; all of them when left out.
        first_chip: Number of the first chip instance.
        say: Told of the progress.

    Raises:
        UserError: See `check_tasks`; or a task's data are not available, or it asks for what is not decoded here.
    """
    from lm_eval.evaluator import simple_evaluate

    manager, model = check_tasks(tasks), _harness_model()(base, array, settings.batch_size)

    def score(what: str) -> Mapping[str, Any]:
        say(f"{', '.join(tasks)}: {what}")
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=documents,
                bootstrap_iters=0,
                log_samples=True,
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:  # what datasets and the harness raise at a task's data
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"lm-evaluation-harness cannot run {', '.join(tasks)}: {said}", "check its data and the network"
            ) from None
        assert found is not None  # there is one process
        return dict(found)

    array.clear()
    reads = calibrate(base, array, chip, calibration_rows, settings.calibration_tokens, settings.converters)
    clean, by_chip = score("clean"), []
    try:
        for number in range(first_chip, first_chip + settings.chip_instances):
            key = NoiseKey(role=Role.SEARCH, chip_seed=number)
            array.program(ChipInstance(chip, key, chip.noise.level), reads, digital=True)
            array.materialise()
            by_chip.append(score(f"chip instance {number}"))
    finally:
        array.clear()
    return _scores(clean, by_chip)


def _scores(clean: Mapping[str, Any], by_chip: Sequence[Mapping[str, Any]]) -> list[HarnessScore]:
    found = []
    for task, metrics in clean["results"].items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values = tuple(float(each["results"][task][name]) for each in by_chip)
            samples = [_of_documents(each, task, metric, kind) for each in (clean, *by_chip)]
            interval = _interval(samples[1:]) if all(of_one is not None for of_one in samples) else None
            low, high = (None, None) if interval is None else interval
            label = metric if kind == "none" else f"{metric}, {kind}"
            documents = len({sample["doc_id"] for sample in clean["samples"].get(task, ())})
            found.append(HarnessScore(task, label, documents, float(value), values, fmean(values), low, high))
    return found


def _of_documents(results: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float] | None:
    """A metric of each document; none where it is one of all documents together."""
    samples = [sample for sample in results["samples"].get(task, ()) if sample.get("filter", kind) == kind]
    values = [sample.get(metric) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
    return [float(value) for value in values] if values and all(isinstance(v, int | float) for v in values) else None


def _interval(samples: Sequence[Any]) -> tuple[float, float]:
    values = np.array(samples, dtype=float)  # (chips, documents)
    found = share(values) if np.isin(values, (0.0, 1.0)).all() else crossed(values).interval()
    return found.low, found.high


def _harness_model() -> type[Any]:
    """The harness's model; made here, as its base class is the harness's."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import handle_stop_sequences
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class PackedLM(LM):
        """A base on whatever chip lies under it."""

        def __init__(self, base: BaseModel, array: RramArray, batch_size: int) -> None:
            super().__init__()
            self._base, self._array, self.batch_size = base, array, batch_size
            self._longest = int(base.causal_lm.config.max_position_embeddings)

        @property
        def tokenizer_name(self) -> str:
            return str(self._base.name).replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(self._base.tokenizer.chat_template or "")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                self._base.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            rows: dict[tuple[str, str], list[int]] = {}
            continuations = []
            for index, request in enumerate(requests):
                context, continuation = request.args
                end = len(context.rstrip())  # spaces there belong to what follows, as the harness's own models have it
                rows.setdefault((_row_id(request), context[:end]), []).append(index)
                continuations.append(context[end:] + continuation)
            packed = []
            for (row_id, context), indices in rows.items():
                texts = [continuations[i] for i in indices]
                prompt, options = encode_texts(context, texts, self._base.tokenizer)
                packed.append(pack_tokens(row_id, self._cut(prompt, max(map(len, options))), options))
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for indices, of_row in zip(rows.values(), self._sums(packed), strict=True):
                for i, (log_likelihood, others) in zip(indices, of_row, strict=True):
                    found[i] = (log_likelihood, others == 0)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            totals = []
            for request in requests:
                (first, *_), (tokens,) = encode_texts("", [request.args[0]], self._base.tokenizer)
                windows = get_rolling_token_windows(tokens, first, self._longest, 1)
                packed = [
                    pack_tokens(f"{_row_id(request)}, window {i}", context, [continuation])
                    for i, (context, continuation) in enumerate(map(make_disjoint_window, windows))
                ]
                totals.append(sum(of_row[0][0] for of_row in self._sums(packed)))
            return totals

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            tokenizer, texts = self._base.tokenizer, []
            for request in requests:  # one by one: every task and document may ask for another end
                context, asked = request.args
                if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
                    raise UserError(
                        f"task '{request.task_name}' samples; a chip is scored by greedy decoding",
                        "set do_sample: false in its generation_kwargs",
                    )
                until = [stop for stop in handle_stop_sequences(asked.get("until"), None) if stop]
                most = int(asked.get("max_gen_toks", asked.get("max_new_tokens", _NEW_TOKENS)))
                prompt = self._cut(encode_texts(context, [" "], tokenizer)[0], most + 1)
                (tokens,) = continued(self._base, self._array, [(_row_id(request), prompt)], 1, most, until)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                ends = [text.index(stop) for stop in until if stop in text]
                texts.append(text[: min(ends)] if ends else text)
            return texts

        def _cut(self, prompt: list[int], room: int) -> list[int]:
            """The end of a prompt that leaves so much room, as the harness cuts what is too long."""
            return prompt[-max(self._longest + 1 - room, 1) :]  # the last token is predicted and not read

        def _sums(self, rows: Sequence[PackedRow]) -> list[list[list[float]]]:
            """Log-likelihood, and number of tokens that greedy decoding would not take, of every option."""

            def of_targets(batch: Batch) -> torch.Tensor:
                logits = batch.logits(self._base.causal_lm)
                targets = batch.targets.to(logits.device)
                scores = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                return torch.stack([scores, (logits.argmax(dim=-1) != targets).to(scores.dtype)], dim=1)

            return option_sums(self._array, rows, self.batch_size, of_targets)

    return PackedLM


def _row_id(request: Any) -> str:
    """The id of a request's document, or its place in its task."""
    own = request.doc.get("id") if isinstance(request.doc, Mapping) else None
    return f"{request.task_name}/{request.doc_id}" if own is None else str(own)
