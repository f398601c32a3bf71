"""The recipe: one strict, frozen model per section; each docstring is its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Money = Annotated[float, Field(ge=0.0)]

Dtype = Literal["bfloat16", "float16", "float32"]
Method = Literal["lora", "qlora", "full", "pretrain"]
DataFormat = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference"]
Learn = Literal["all", "last"]
Truncation = Literal["end", "start", "drop", "error"]
Scheme = Literal["w8a8-int8", "w4a16", "fp8-dynamic"]
Tracker = Literal["tensorboard", "mlflow", "wandb"]
Task = Literal["completion_loss", "chrf", "rouge_l"]
Variant = Literal["base", "tuned", "adapter", "w8a8-int8", "w4a16", "fp8-dynamic"]


class Store(Section):
    """Where artifacts and their index live; it never changes what is made."""

    folder: Path = Path(".tunesmith")
    """Folder for artifacts and work in progress, relative to the working directory."""

    ledger: str | None = None
    """SQLAlchemy URL of a shared ledger (`postgresql+psycopg://…`); a SQLite file in `folder`
    when null."""


class Model(Section):
    """The model that every section of the recipe speaks of."""

    base: str | None = None
    """Hub id, local folder, artifact id, or `builtin/tiny-llama`; null only for
    `train.method: pretrain`, which makes a base."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it resolves to is recorded."""

    dtype: Dtype = "bfloat16"
    """Precision of the weights in training, merging and serving."""

    chat_template: Path | None = None
    """A Jinja chat template to use in place of the tokenizer's own, in training and serving."""

    trust_remote_code: bool = False
    """Allow Python code that comes with a hub model to run."""


class Source(Section):
    """One of several sources of training rows."""

    source: str
    """JSONL, JSON, Parquet or CSV file, hub data set id, or `builtin/stdlib`."""

    format: DataFormat | None = None
    """Shape of its rows; `data.format` when null."""

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """How often each of its rows is used per epoch: 2 is twice, 0.5 half of the rows, 1.5 all of
    them and half a second time, chosen by `seed`."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit it resolves to is recorded."""


def _is_list(value: Any) -> str:
    return "tuple" if isinstance(value, (list, tuple)) else "str"


Sources = Annotated[
    Annotated[str, Tag("str")] | Annotated[tuple[Source, ...], Tag("tuple")],
    Discriminator(_is_list),
]


class Data(Section):
    """What the model learns from, and what it is judged on."""

    train: Sources
    """JSONL, JSON, Parquet or CSV file, hub data set id, or `builtin/stdlib`; or a list of them
    with weights."""

    evaluation: str | None = None
    """Held-out rows, in the same forms; `evaluation_fraction` of `train` when null."""

    format: DataFormat = "messages"
    """Shape of a row."""

    revision: str | None = None
    """Branch, tag or commit of a hub data set (of `evaluation` alone where `train` is a list); the
    commit it resolves to is recorded."""

    evaluation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of `train` that is held out when `evaluation` is null, chosen by hash of the row."""

    max_length: Positive = 2048
    """Longest training example, in tokens; what becomes of longer ones says `truncation`."""

    truncation: Truncation = "end"
    """Cut longer examples at their `end` or their `start`, `drop` them (all of this is counted), or
    stop with an `error`. Rows of `text` are divided and never cut."""

    learn: Learn = "all"
    """Learn `all` answers of a conversation or only the `last`. A message with `"weight": 0` is not
    learnt either way."""

    max_rows: Positive | None = None
    """Use only this many training rows, chosen by `seed`; all when null."""

    max_error_rate: Fraction = 0.0
    """Share of rows that may be malformed before the run stops; they are kept in
    `errors.jsonl` either way."""

    max_dropped_rate: Fraction = 0.1
    """Share of examples that may have nothing to learn within `max_length`, or be dropped as
    longer, before the run stops."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What `train` names."""
        if isinstance(self.train, str):
            return (Source(source=self.train, revision=self.revision),)
        return self.train

    @model_validator(mode="after")
    def _settings_fit_the_format(self) -> Data:
        if not self.sources:
            raise ValueError("train: a list of sources has at least one")
        kinds = {_kind(source.format or self.format) for source in self.sources}
        if kinds != {_kind(self.format)}:
            raise ValueError(
                f"train: sources of format {', '.join(sorted(kinds))} cannot be mixed with "
                f"data.format: {self.format}; conversations, preferences and text are learnt in "
                "different ways"
            )
        if self.format == "text" and self.learn != "all":
            raise ValueError("learn: last is of conversations; of format: text all is learnt")
        return self


def _kind(row_format: DataFormat) -> str:
    return row_format if row_format in ("text", "preference") else "messages"


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
    `loftq` starts from what 4-bit quantization took from the base (`qlora`)."""

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
    """Also write the adapter merged into its base as a checkpoint."""

    @model_validator(mode="after")
    def _methods_have_what_they_need(self) -> Train:
        if (self.method == "pretrain") != (self.architecture is not None):
            raise ValueError("architecture is given exactly when method is pretrain")
        if self.method == "qlora" and self.lora.init_lora_weights == "pissa":
            raise ValueError("lora.init_lora_weights: pissa needs unquantized weights: method lora")
        if self.method != "qlora" and self.lora.init_lora_weights == "loftq":
            raise ValueError("lora.init_lora_weights: loftq is for 4-bit weights: method qlora")
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
        return self


class Quantize(Section):
    """Compressed checkpoints of the tuned model (of the base where the recipe trains nothing), in
    the format that vLLM loads."""

    scheme: Scheme | tuple[Scheme, ...]
    """One scheme or several; each becomes a checkpoint of its own."""

    calibration_rows: Positive = 128
    """Training conversations used to calibrate, rendered with the recipe's own template."""


class Evaluate(Section):
    """Quality of each model on held-out rows, in the engine that serves it."""

    variants: tuple[Variant, ...] | None = None
    """Which models of the recipe are measured; when null all, the unmerged adapter only where
    there is no merged model."""

    tasks: tuple[Task, ...] = ("completion_loss", "chrf")
    """What is measured, row by row and paired between models."""

    max_rows: Positive | None = 200
    """Held-out rows, chosen by `seed`; all when null."""

    max_tokens: Positive = 48
    """Longest generated answer."""

    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of the confidence intervals."""


class Engine(Section):
    """vLLM, as evaluation, batch, serving and benchmarks start it."""

    max_model_len: Positive | None = None
    """Longest prompt plus answer, in tokens; the model's own limit when null."""

    max_num_seqs: Positive = 64
    """Sequences decoded together."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of GPU memory the engine may take."""

    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """Size of the key-value cache on a CPU."""

    tensor_parallel_size: Positive = 1
    """GPUs that share one copy of the model."""

    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: faster start, slower decoding. CPUs always skip them."""

    start_timeout_s: Positive = 600
    """How long a model may take to load."""


class Batch(Section):
    """Answers for a file of prompts."""

    input: Path
    """JSONL; each row has `messages` or `prompt`, and may have `id`, `max_tokens`,
    `temperature`."""

    output: Path
    """JSONL, one row per input row, in input order."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null."""

    max_tokens: Positive = 128
    """Longest answer, unless the row says otherwise."""

    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature, unless the row says otherwise; 0 is greedy."""

    max_error_rate: Fraction = 0.0
    """Share of rows that may fail before the command ends with exit code 3."""


class Serve(Section):
    """The OpenAI API on one port."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback asks for `api_key_env`."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port."""

    model: Variant | None = None
    """Which model of the recipe answers; the last quantized, else the tuned one, when null."""

    api_key_env: str | None = None
    """Environment variable that holds the key clients must send; no key when null."""

    drain_timeout_s: Positive = 30
    """How long open requests may finish after a stop is asked for."""


class Slo(Section):
    """The promise that goodput is counted against."""

    ttft_p95_ms: Annotated[float, Field(gt=0.0)] = 500.0
    """Time to first token."""

    tpot_p95_ms: Annotated[float, Field(gt=0.0)] = 50.0
    """Time per output token after the first."""


class Bench(Section):
    """Throughput, latency and cost of the tuned and quantized models."""

    requests: Positive = 64
    """Measured requests per model and mode."""

    concurrency: Positive = 32
    """Requests in flight for batch throughput."""

    request_rate: Annotated[float, Field(gt=0.0)] = 4.0
    """Mean arrivals per second of the real-time load (Poisson)."""

    max_tokens: Positive = 32
    """Output tokens of each request; the end-of-turn token is ignored."""

    slo: Slo = Slo()
    """What a good request is."""


class Price(Section):
    """What the hardware costs."""

    gpu_hour_usd: Money
    """Price of one device-hour (a GPU, or this whole machine where there is none), in USD."""


class Recipe(Section):
    """One file from a data set to a served, quantized, costed model; every section is optional
    except `name` and `model`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """What versions and aliases are filed under: lower case, digits, `.`, `_`, `-`."""

    seed: NonNegative = 17
    """Seed of every random choice."""

    store: Store = Store()
    """Where results are kept."""

    model: Model
    """The base model."""

    data: Data | None = None
    """Training and held-out rows."""

    train: Train | None = None
    """Makes the tuned model."""

    quantize: Quantize | None = None
    """Makes smaller copies of it."""

    evaluate: Evaluate | None = None
    """Measures the quality of each."""

    engine: Engine = Engine()
    """How vLLM runs."""

    batch: Batch | None = None
    """Answers a file of prompts."""

    serve: Serve | None = None
    """Answers requests."""

    bench: Bench | None = None
    """Measures speed and cost."""

    price: Price | None = None
    """Turns device time into USD."""

    @property
    def serves_adapter(self) -> bool:
        """Whether any section has the engine load the adapter over its base."""
        asked: list[str | None] = [part.model for part in (self.batch, self.serve) if part]
        asked += (self.evaluate.variants or [None]) if self.evaluate else []
        asked += [None] if self.bench else []
        by_default = self.train is not None and not self.train.merge and None in asked
        return "adapter" in asked or by_default

    @model_validator(mode="after")
    def _sections_have_what_they_need(self) -> Recipe:
        pretrain = self.train is not None and self.train.method == "pretrain"
        if pretrain == (self.model.base is not None):
            raise ValueError("model.base is required, except for train.method: pretrain")
        if self.train and not self.data:
            raise ValueError("train needs a data section")
        prefers = self.train is not None and self.train.preference is not None
        if self.train and self.data and prefers != (self.data.format == "preference"):
            raise ValueError("train.preference is given exactly when data.format is preference")
        if prefers and pretrain:
            raise ValueError("train.preference needs a model that answers already, so a base")
        if self.train and self.train.base_precision == "fp8" and self.model.dtype != "bfloat16":
            raise ValueError("train.base_precision: fp8 needs model.dtype: bfloat16")
        if self.quantize and not self.data:
            raise ValueError("quantize needs a data section to calibrate on")
        adapts = self.train and self.train.method in ("lora", "qlora") and not self.train.merge
        if self.quantize and adapts:
            raise ValueError("quantize needs the merged model: train.merge: true")
        if self.evaluate and not self.data:
            raise ValueError("evaluate needs a data section")
        if self.train and self.train.sharding == "full" and self.model.dtype == "float16":
            raise ValueError("train.sharding: full needs model.dtype bfloat16 or float32")
        if self.train and self.train.lora.use_dora and self.serves_adapter:
            raise ValueError(
                "vLLM cannot serve a DoRA adapter over its base: use the model tuned, with "
                "train.merge: true"
            )
        if self.train and self.train.lora.init_lora_weights == "loftq" and self.serves_adapter:
            raise ValueError(
                "a LoftQ adapter mends 4-bit weights, which vLLM does not serve: use the model "
                "tuned, with train.merge: true"
            )
        return self
