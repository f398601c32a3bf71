"""One recipe's training as a stage: from the dataset and the base to the finished artifact."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.config.schema import Recipe
from tunesmith.config.schema.train import Train
from tunesmith.data import make_dataset
from tunesmith.ledger import Artifact, Draft
from tunesmith.ledger.store import Work
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log
from tunesmith.train import model as models
from tunesmith.train.batches import choose_rows
from tunesmith.train.checkpoint import whole_weights
from tunesmith.train.compressed import check_base
from tunesmith.train.devices import in_gib, peak_memory_bytes
from tunesmith.train.distil import Distillation
from tunesmith.train.examples import Examples
from tunesmith.train.language import (
    EVALUATION_FILE,
    TRAIN_FILE,
    Language,
    learn_language,
    read_language,
)
from tunesmith.train.loop import METRICS_FILE, Job, Trainer
from tunesmith.train.loss import Batch, TokenLoss, check_logits, collate, keep_documents_apart
from tunesmith.train.mend import mend_student
from tunesmith.train.progress import Progress
from tunesmith.train.ranks import main_first, write_together
from tunesmith.train.ready import check_device, check_memory, choose_layout, make_ready
from tunesmith.train.save import save_adapter, save_model
from tunesmith.train.sharding import fill, hollow, shard
from tunesmith.train.side import Layout
from tunesmith.train.tracking import tracked

_INITIAL = "initial"

_MENDED_FROM_ROWS = 64
"""Training rows that the size of each layer's inputs is measured on."""


@dataclass(frozen=True)
class Parts:
    """What a training starts from."""

    language: Language
    train: Examples
    evaluation: Examples
    model: Any
    dtype: torch.dtype
    parameters: models.Parameters


def make_base(stages: Stages, accelerator: Any) -> Artifact:
    """The base of a recipe: pre-trained here when it is a builtin, else recorded where it is."""
    if stages.builds_base:
        return train_stage(stages.builtin_base, accelerator)
    return main_first(lambda: stages.made(stages.base))


def make_trained_over(stages: Stages, accelerator: Any) -> Artifact:
    """The model that the training starts from: the base, or what `quantize` made of it.

    Raises UserError when that is not made yet, or `train` asks of quantized weights what they
    cannot give.
    """
    base = make_base(stages, accelerator)
    if stages.trained_over != stages.base:
        base = main_first(lambda: stages.made(stages.trained_over))
    assert stages.recipe.train
    check_base(base.root, stages.recipe.train)
    return base


def train_stage(stages: Stages, accelerator: Any) -> Artifact:
    """What `train` makes: an adapter, a checkpoint or a new base; found or trained.

    Raises WorkInterrupted when asked to stop; the next call resumes.
    """
    if found := stages.store.find(stages.trained.id):
        return found
    recipe = stages.recipe
    assert recipe.train
    dataset = main_first(lambda: make_dataset(stages))
    is_new = recipe.train.method == "pretrain"
    base = None if is_new else make_trained_over(stages, accelerator)
    lost_of = None
    if recipe.train.over and recipe.train.lora.init_lora_weights == "loftq":
        lost_of = stages.made(stages.base)
    return _learn(stages, stages.trained, recipe, dataset, base, accelerator, lost_of=lost_of)


def recover_stage(stages: Stages, scheme: str, recipe: Recipe, accelerator: Any) -> Artifact:
    """The adapter over one checkpoint that learns what its parent predicts; `recipe` says how.

    Raises WorkInterrupted when asked to stop; the next call resumes.
    """
    checkpoint, teacher = stages.made(stages.quantized(scheme)), stages.made(stages.unquantized)
    draft, dataset = stages.recovered(scheme), make_dataset(stages)
    return _learn(stages, draft, recipe, dataset, checkpoint, accelerator, teacher=teacher)


def _learn(
    stages: Stages,
    draft: Draft,
    recipe: Recipe,
    dataset: Artifact,
    base: Artifact | None,
    accelerator: Any,
    *,
    teacher: Artifact | None = None,
    lost_of: Artifact | None = None,
) -> Artifact:
    """The training of an artifact, as `recipe.train` says: from a teacher if there is one, and from
    what quantization took from the weights of a teacher or of `lost_of`."""
    assert recipe.train
    is_sharded = recipe.train.sharding == "full"
    with write_together(stages, draft) as work:
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        parts = prepare(recipe, dataset, base, accelerator)
        saved = hollow(parts.model) if is_sharded else parts.model
        loss = _taught(parts, teacher or lost_of, recipe, accelerator)
        if isinstance(loss, Distillation):
            work.metrics |= _mend(loss, parts, recipe, accelerator)
        if lost_of:
            loss.release()
            loss = TokenLoss(parts.model, parts.dtype)
        if is_sharded:
            shard(loss, accelerator)
        check_logits(loss, parts.train.rows[0], accelerator.device)
        layout = choose_layout(recipe, parts.train.rows, loss, accelerator)
        if isinstance(loss, Distillation) and layout.as_documents:
            rows, device = parts.train.rows, accelerator.device
            layout = Layout() if keep_documents_apart(loss.teacher, rows, device) else layout
        # A teacher has something to say of every token, not of the learnt ones alone.
        taught = parts.train.everywhere() if teacher else parts.train
        job = Job(
            loss,
            taught,
            parts.evaluation,
            layout,
            recipe.train,
            parts.dtype,
            recipe.seed,
            work.scratch,
        )
        if recipe.train.lora.changes_base and accelerator.is_main_process:
            parts.model.save_pretrained(work.scratch / _INITIAL, save_embedding_layers=False)
        with tracked(stages, draft, work.scratch, accelerator):
            progress = Trainer(job, accelerator).run()
        if is_sharded:
            fill(saved, whole_weights(parts.model, keep=accelerator.is_main_process))
        if accelerator.is_main_process:
            _save(replace(parts, model=saved), recipe.train, work, base)
        work.metrics |= _metrics(parts, recipe.train, progress, base)
        work.metrics["peak_memory_gib"] = in_gib(peak_memory_bytes(accelerator.device))
    return stages.made(draft)


def _taught(parts: Parts, teacher: Artifact | None, recipe: Recipe, accelerator: Any) -> TokenLoss:
    """What the model answers with: the loss of each token, or how far it is from its teacher."""
    if teacher is None:
        return TokenLoss(parts.model, parts.dtype)
    trust = recipe.model.trust_remote_code
    loaded = models.load_base(
        teacher.root, parts.dtype, accelerator.device, trust_remote_code=trust
    )
    return Distillation(parts.model, loaded, parts.dtype)


def _mend(loss: Distillation, parts: Parts, recipe: Recipe, accelerator: Any) -> dict[str, float]:
    """Have the student begin from what its weights lack of its teacher's; the divergence of the
    base alone, and of that beginning, on the held-out rows that are evaluated."""
    assert recipe.train

    def batches(examples: Examples, limit: int) -> list[Batch]:
        chosen = choose_rows(len(examples.rows), limit, recipe.seed)
        # Alone, because padding would count as an input.
        return [collate([examples.rows[at]]).to(accelerator.device) for at in chosen]

    seen = batches(parts.train.everywhere(), _MENDED_FROM_ROWS)
    before, after = mend_student(loss, seen, batches(parts.evaluation, recipe.train.max_eval_rows))
    if accelerator.is_main_process:
        log(f"divergence from the unquantized model: {before:.5f} nats; once mended {after:.5f}")
    return {"kl_nats_before": before, "kl_nats_mended": after}


def prepare(recipe: Recipe, dataset: Artifact, base: Artifact | None, accelerator: Any) -> Parts:
    """The rows in tokens and the model made ready; seeds every random choice."""
    assert recipe.train and recipe.data
    train, device = recipe.train, accelerator.device
    check_device(train, device)
    dtype = models.torch_dtype(recipe.model.dtype, device)
    language = read_language(base.root, recipe) if base else learn_language(dataset, recipe)
    examples = language.tokenise(dataset, TRAIN_FILE, recipe.data, texts_apart=train.packing)
    held_out = language.tokenise(dataset, EVALUATION_FILE, recipe.data, texts_apart=train.packing)
    check_memory(recipe, language, base.root if base else None, examples, held_out)
    torch.manual_seed(recipe.seed)
    if base is None:
        assert train.architecture
        model = models.new_model(train.architecture, language.tokenizer)
    else:
        is_adapter, is_packed = train.method in ("lora", "qlora"), train.method == "qlora"
        is_sharded = train.sharding == "full"
        model = models.load_base(
            base.root,
            # Weights that are trained, or that an adapter's beginning is taken out of, keep their
            # full precision; the matmuls do not need it.
            dtype if is_adapter and not train.lora.changes_base else torch.float32,
            # What is divided goes from the host to the device a layer at a time.
            torch.device("cpu") if is_sharded and not is_packed else device,
            nf4=is_packed,
            packed_in=dtype if is_sharded else torch.uint8,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    sides = (examples, held_out)
    models.check_sizes(
        model,
        longest=max(int(side.lengths().max()) for side in sides),
        largest_id=max(side.largest_id for side in sides),
    )
    model = make_ready(model, train, base.root if base else None)
    parameters = models.count_parameters(model)
    if accelerator.is_main_process:
        if train.method in ("lora", "qlora"):
            log(f"adapting {models.adapted_layers(model)}")
        log(
            f"training {parameters.trainable:,} of {parameters.total:,} weights "
            f"({parameters.share:.2%}) on {len(examples.rows):,} sequences"
        )
    return Parts(language, examples, held_out, model, dtype, parameters)


def _save(parts: Parts, train: Train, work: Work, base: Artifact | None) -> None:
    shutil.copy(work.scratch / METRICS_FILE, work.out / METRICS_FILE)
    if base and train.method in ("lora", "qlora"):
        initial = work.scratch / _INITIAL if train.lora.changes_base else None
        save_adapter(parts.model, parts.language, work.out, base.id, initial)
    else:
        save_model(parts.model, parts.language, work.out, parts.dtype)


def _metrics(
    parts: Parts, train: Train, progress: Progress, base: Artifact | None
) -> dict[str, Any]:
    examples = parts.train
    metrics = {
        "method": train.method,
        "steps": progress.step,
        "final_loss": progress.final_loss,
        "eval_loss_before": progress.eval_losses[0],
        "eval_loss_after": (
            min(progress.eval_losses) if train.load_best_model_at_end else progress.eval_losses[-1]
        ),
        "best_step": progress.best_step,
        **{
            f"eval_{name}": value for name, value in progress.eval_figures.items() if name != "loss"
        },
        "train_s": round(progress.train_s, 3),
        "supervised_tokens_seen": progress.supervised_tokens,
        "supervised_tokens_per_s": round(progress.supervised_tokens / progress.train_s, 1),
        "fill": round(progress.tokens / progress.slots, 4),
        "examples": len(examples.rows),
        "tokens": int(examples.lengths().sum()),
        "supervised_tokens": int(examples.supervised().sum()),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "refused": len(examples.faults),
        "trainable_parameters": parts.parameters.trainable,
        "total_parameters": parts.parameters.total,
        "template_sha256": parts.language.template_sha256,
    }
    if base:
        metrics["base"] = base.id
    if train.method in ("lora", "qlora"):
        metrics["adapted_layers"] = models.adapted_layers(parts.model)
    return metrics
