"""LoRA and HaLoRA as a competent user writes them: transformers, PEFT and torch, and of this project only its rows."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from halora.training.tasks import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHIP_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def load(folder: str, dtype: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """A causal language model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation=attention)
    return model, AutoTokenizer.from_pretrained(folder)


def dtype_name(model: Any) -> str:
    """The name in `DTYPES` of a model's dtype."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.dtype)


def with_adapter(model: Any, rank: int = 4, alpha: float = 8.0, seed: int = 0) -> PeftModel:
    """The model with a fresh LoRA adapter, everything else frozen."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_LAYERS), task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def example(prompt: str, option: str, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt followed by an option, of which only the option is learnt or scored."""
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    answered = tokenizer(option, add_special_tokens=False).input_ids
    tokens = asked + answered
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": [-100] * len(asked) + answered}


def training_batches(rows: Sequence[Row], tokenizer: Any, order: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
    """Batches of right answers, padded to the longest; `order` lists the rows of each step."""
    examples: Any = [example(row.prompt, row.options[row.answer], tokenizer) for row in rows]
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    return iter(DataLoader(examples, batch_sampler=order, collate_fn=collate))


class NoisyWeights:
    """Noise on the layers that a chip holds: W* = W + N, with N normal of standard deviation sigma x max |W|.

    Made before the adapter is attached. The clean weights are kept beside the noisy ones.
    """

    def __init__(self, model: Any, sigma: float) -> None:
        self.linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(CHIP_LAYERS)
        }
        self._clean = {name: linear.weight.data for name, linear in self.linears.items()}
        self._deviation = {name: sigma * weight.abs().max() for name, weight in self._clean.items()}

    def redraw(self) -> None:
        """Put fresh noise on all layers."""
        for name, linear in self.linears.items():
            clean = self._clean[name]
            linear.weight.data = torch.randn_like(clean).mul_(self._deviation[name]).add_(clean)

    def restore(self) -> None:
        """Take the noise away."""
        for name, linear in self.linears.items():
            linear.weight.data = self._clean[name]


class Training:
    """LoRA, and with noise and mu HaLoRA: L = L_task + mu L_reg on noisy weights, the noise redrawn at every step."""

    def __init__(
        self,
        model: PeftModel,
        batches: Iterator[dict[str, Tensor]],
        learning_rate: float,
        noise: NoisyWeights | None = None,
        mu: float = 0.0,
    ) -> None:
        self.model, self.batches, self.noise, self.mu = model, batches, noise, mu
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0)
        model.train()

    def step(self) -> tuple[float, Tensor]:
        """One optimiser step: its loss, and the labels it learnt, -100 where there is none."""
        batch = next(self.batches)
        if self.noise:
            self.noise.redraw()
        loss = self.model(**batch).loss
        if self.mu:
            loss = loss + self.mu * regulariser(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), batch["labels"]


def regulariser(model: PeftModel) -> Tensor:
    """HaLoRA's L_reg, the mean over modules of ||A A^T|| + ||B^T B||, in Frobenius norms."""
    weights = dict(model.named_parameters())
    norms = [
        torch.linalg.matrix_norm(a @ a.T) + torch.linalg.matrix_norm(b.T @ b)
        for a, b in ((weights[n], weights[n.replace("lora_A", "lora_B")]) for n in weights if "lora_A" in n)
    ]
    return torch.stack(norms).mean()


@torch.inference_mode()
def option_scores(
    model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, by_length: bool = False
) -> list[list[float]]:
    """Log-likelihood in nats of every option of every row, each in a sequence of its own behind the whole prompt."""
    places = [(i, k) for i, row in enumerate(rows) for k in range(len(row.options))]
    examples = {(i, k): example(rows[i].prompt, rows[i].options[k], tokenizer) for i, k in places}
    if by_length:
        places.sort(key=lambda place: len(examples[place]["input_ids"]))
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    scores = [[0.0] * len(row.options) for row in rows]
    model.eval()
    for batch in batched(places, batch_size):
        inputs = collate([examples[place] for place in batch])
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")  # 0 without a label
        for (i, k), loss in zip(batch, losses.view(labels.shape).sum(dim=1).tolist(), strict=True):
            scores[i][k] = -loss
    return scores


def margins(scores: Sequence[Sequence[float]], rows: Sequence[Row]) -> list[float]:
    """Score of every row's right option less that of the best wrong one, in nats."""

    def best_wrong(options: Sequence[float], answer: int) -> float:
        return max(score for k, score in enumerate(options) if k != answer)

    return [options[row.answer] - best_wrong(options, row.answer) for options, row in zip(scores, rows, strict=True)]
