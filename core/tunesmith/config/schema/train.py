"""The `train` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.config.schema.base import Fraction, Positive, SchemeName, Section

Method = Literal["lora", "qlora", "full", "pretrain"]
Tracker = Literal["tensorboard", "mlflow", "wandb"]


class Lora(Section):
    """The low-rank adapter, in PEFT's names."""

    r: Positive = 16
    """Rank of the update matrices."""

    lora_alpha: Positive = 32
    """Scale of the update; it is multiplied by `lora_alpha / r`."""

    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapter, as a probability."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Names or endings of the linear layers to adapt, or `all-linear`."""

    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` in place of `lora_alpha / r`."""

    use_dora: bool = False
    """Learn the length of each column apart from its direction (DoRA). vLLM serves such a model
    merged, never the adapter by itself."""

    init_lora_weights: Literal["zeros", "pissa", "loftq"] = "zeros"
    """`zeros` starts from the base as it is; `pissa` puts the base's principal components into the
    adapter, for a faster start, and takes them out of it again when it is saved (at rank 2 r);
    `loftq` starts from what quantization took from the base (`qlora`, or with `over`)."""

    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+)."""

    @property
    def changes_base(self) -> bool:
        """Whether the adapter's beginning is taken out of the base's weights."""
        return self.init_lora_weights == "pissa"


class Architecture(Section):
    """The shape of a Llama-style model to pre-train from nothing."""

    hidden_size: Positive = 256
    """Width of the residual stream."""

    intermediate_size: Positive = 768
    """Width of the feed-forward layer."""

    num_hidden_layers: Positive = 4
    """Depth."""

    num_attention_heads: Positive = 4
    """Attention heads; must divide `hidden_size`."""

    num_key_value_heads: Positive = 2
    """Key-value heads; must divide `num_attention_heads`."""

    vocab_size: Annotated[int, Field(ge=512)] = 4096
    """Size of the byte-level BPE vocabulary that is learned from the data."""

    max_position_embeddings: Positive = 2048
    """Longest sequence the model can be asked for, in tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class Preference(Section):
    """How much an answer has to be preferred, in TRL's names."""

    loss_type: Literal["dpo", "orpo"] = "dpo"
    """`dpo` compares with the model as it was before training; `orpo` learns the chosen answers at
    the same time and needs no comparison."""

    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """`dpo`: how closely the model stays with what it was; `orpo`: weight of the preference."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be the wrong way round (`dpo`)."""


class Train(Section):
    """Fine-tuning or pre-training, in the names of Hugging Face `TrainingArguments`."""

    method: Method
    """`lora` and `qlora` train an adapter, `full` every weight, `pretrain` a new model on text."""

    lora: Lora = Lora()
    """The adapter, for `lora` and `qlora`."""

    preference: Preference | None = None
    """Learn which of two answers is better, from rows of `data.format: preference` (and only
    those)."""

    architecture: Architecture | None = None
    """The new model's shape, for `pretrain` (and only there)."""

    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate."""

    num_train_epochs: Annotated[float, Field(gt=0.0)] = 1.0
    """Passes over the training rows, unless `max_steps` is given."""

    max_steps: Positive | None = None
    """Optimizer steps; overrides `num_train_epochs`."""

    per_device_train_batch_size: Positive = 8
    """Sequences per forward pass on each device."""

    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step."""

    packing: bool = False
    """Fill blocks of `data.max_length` tokens with several rows, each of which sees itself alone;
    batch sizes then count blocks."""

    per_device_eval_batch_size: Positive = 8
    """Sequences per forward pass on each device while evaluating."""

    warmup_steps: Annotated[float, Field(ge=0.0)] = 0.03
    """Optimizer steps of linear warm-up; a value below 1 is a share of all steps."""

    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""

    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = (
        "adamw_torch_fused"
    )
    """Optimizer."""

    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay on matrices."""

    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""

    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""

    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    neftune_noise_alpha: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of the noise on the input embeddings while training (NEFTune); 0 is none."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    preflight: bool = False
    """Before the first step run the passes that take the most memory, an optimizer step, an
    evaluation and a checkpoint, so that what is too large fails at once; the result is the same."""

    processes: Positive = 1
    """Processes that train together, each on a GPU of its own; a step's batch grows with them. They
    are started on this machine, unless `torchrun` or another launcher started this one."""

    sharding: Literal["none", "full"] = "none"
    """`none` keeps the whole model in every process; `full` divides weights, gradients and
    optimizer over them (FSDP2), for models that are too large for one device."""

    torch_compile: bool = False
    """Compile the decoder layer by layer: a minute at the start, faster steps after it. Worth it on
    a GPU for more than some hundred steps; the result is the same up to rounding."""

    base_precision: Literal["same", "fp8"] = "same"
    """Precision of the frozen linear layers, for `lora`: `same` is `model.dtype`; `fp8` halves
    their memory and speeds up their products, on NVIDIA GPUs of Ada, Hopper or newer only. For
    4 bits there is `method: qlora`."""

    over: SchemeName | None = None
    """Fit the adapter to the base in this form, one of `quantize.scheme`, and serve it over that:
    the base is quantized first, and nothing is merged; for `lora`."""

    eval_steps: Annotated[float, Field(gt=0.0)] = 0.25
    """Steps between evaluations; a value below 1 is a share of all steps."""

    load_best_model_at_end: bool = False
    """End with the weights that had the lowest held-out loss, in place of the last ones."""

    early_stopping_patience: Positive | None = None
    """Evaluations in a row without a lower loss after which training ends; never when null."""

    max_eval_rows: Positive = 256
    """Held-out rows used for the evaluation loss during training."""

    save_steps: Annotated[float, Field(gt=0.0)] = 0.25
    """Steps between checkpoints; a value below 1 is a share of all steps."""

    logging_steps: Positive = 10
    """Steps between lines of `metrics.jsonl`."""

    report_to: tuple[Tracker, ...] = ()
    """Trackers that are shown the lines of `metrics.jsonl` too: `tensorboard`, `mlflow`, `wandb`;
    each has an extra of its name."""

    merge: bool = True
    """Also write the adapter merged into its base as a checkpoint; false by default with `over`,
    whose base cannot take it without being quantized anew."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_merged_into_quantized_weights(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("over") and "merge" not in given:
            return given | {"merge": False}
        return given

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> Train:
        if (self.method == "pretrain") != (self.architecture is not None):
            raise ValueError("architecture is given exactly when method is pretrain")
        if self.method == "qlora" and self.lora.init_lora_weights == "pissa":
            raise ValueError("lora.init_lora_weights: pissa needs unquantized weights: method lora")
        if self.lora.init_lora_weights == "loftq" and self.method != "qlora" and not self.over:
            raise ValueError(
                "lora.init_lora_weights: loftq is for quantized weights: method qlora, or over"
            )
        if self.sharding == "full" and self.over and self.lora.init_lora_weights == "loftq":
            raise ValueError("lora.init_lora_weights: loftq needs whole weights: sharding none")
        if self.packing and self.preference:
            raise ValueError("packing is for single rows; preference learns pairs")
        if self.packing and self.neftune_noise_alpha:
            raise ValueError("neftune_noise_alpha depends on a row's length; turn packing off")
        if self.sharding == "full" and self.processes == 1:
            raise ValueError("sharding: full divides the model over processes: set processes")
        if self.sharding == "full" and self.lora.changes_base:
            raise ValueError("lora.init_lora_weights: pissa needs whole weights: sharding none")
        if self.sharding == "full" and "8bit" in self.optim:
            raise ValueError("optim: 8-bit optimizers cannot be divided: sharding none")
        if self.base_precision != "same":
            if self.method != "lora":
                raise ValueError("base_precision is for method: lora")
            if self.lora.use_dora or self.lora.changes_base:
                raise ValueError("base_precision: fp8 goes with neither lora.use_dora nor pissa")
        if self.over:
            self._check_over()
        return self

    def _check_over(self) -> None:
        """What is served over quantized weights has to be an adapter that leaves them alone."""
        if self.method != "lora":
            raise ValueError("over is for method: lora")
        if self.merge:
            raise ValueError("over: the base stays as it is quantized: merge: false")
        if self.lora.use_dora or self.lora.changes_base:
            raise ValueError("over goes with neither lora.use_dora nor pissa")
        if self.base_precision != "same":
            raise ValueError("over says what the base is like: leave base_precision out")
